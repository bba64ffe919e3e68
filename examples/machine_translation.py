"""Machine translation with an encoder-decoder: a small T5 learns a new kind of sentence through LoRA.

The text is synthetic, English and German by a small grammar (lora_kernels/finetune/data/phrases.py), because no package
brings a parallel text along; the German grammar in it is real. First the whole model learns main clauses, in the place
of a pretrained checkpoint. Then it is frozen, and LoRA teaches it subordinate clauses, where the verb comes last.

    python examples/machine_translation.py --pretrain-steps 1200 --steps 400
"""

import argparse

import peft
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

import lora_kernels as lk
from lora_kernels.finetune.data.pairs import Pairs
from lora_kernels.finetune.data.phrases import MAIN, SUBORDINATE, phrases
from lora_kernels.finetune.tasks.translation import bleu


class Sentences(Dataset):
    """Token ids of sources, and of targets as labels."""

    def __init__(self, pairs: Pairs, tokenizer) -> None:
        self.rows = tokenizer(pairs.sources, text_target=pairs.targets)

    def __len__(self) -> int:
        return len(self.rows["input_ids"])

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": self.rows["input_ids"][i], "labels": self.rows["labels"][i]}


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """One token a word; a real checkpoint brings its own tokenizer."""
    words = sorted({word for text in texts for word in text.replace(".", " .").replace(",", " ,").split()})
    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *words])}, "<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretrain-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--test-rows", type=int, default=300)
    parser.add_argument("--out", default="out/machine_translation")
    arguments = parser.parse_args()

    old, new = phrases(20000, seed=1, kinds=[MAIN]), phrases(4000 + arguments.test_rows, seed=2, kinds=[SUBORDINATE])
    held_out, new = new.take(range(arguments.test_rows)), new.take(range(arguments.test_rows, len(new)))
    tokenizer = word_tokenizer(old.sources + old.targets + new.sources + new.targets)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)

    def trainer(model, pairs: Pairs, steps: int, rate: float) -> Seq2SeqTrainer:
        return Seq2SeqTrainer(
            model,
            Seq2SeqTrainingArguments(
                arguments.out,
                max_steps=steps,
                per_device_train_batch_size=64,
                learning_rate=rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                logging_steps=max(1, steps // 4),
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=Sentences(pairs, tokenizer),
            data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        )

    @torch.no_grad()
    def translate(model, sources: list[str]) -> list[str]:
        model.eval()
        inputs = tokenizer(sources, padding=True, return_tensors="pt").to(model.device)
        ids = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=24)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.replace(" .", ".").replace(" ,", ",") for text in texts]

    print(f"{sum(p.numel() for p in model.parameters()):,} parameters learn {len(old.sources):,} main clauses")
    trainer(model, old, arguments.pretrain_steps, 3e-3).train()
    known = phrases(100, seed=3, kinds=[MAIN])
    print(f"BLEU of new main clauses {bleu(translate(model, known.sources), known.targets):.1f}")
    print(f"BLEU of subordinate clauses {bleu(translate(model, held_out.sources), held_out.targets):.1f}")

    targets = ["q", "k", "v", "o", "wi", "wo"]
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="SEQ_2_SEQ_LM")
    model = lk.accelerate(peft.get_peft_model(model, lora))
    model.print_trainable_parameters()
    trainer(model, new, arguments.steps, 3e-3).train()
    translations = translate(model, held_out.sources)
    print(f"BLEU of subordinate clauses after LoRA {bleu(translations, held_out.targets):.1f}")
    with model.disable_adapter():
        print(f"BLEU of main clauses without it, as before {bleu(translate(model, known.sources), known.targets):.1f}")
    for source, translation in list(zip(held_out.sources, translations, strict=True))[:3]:
        print(f"{source!r} -> {translation!r}")
    model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
