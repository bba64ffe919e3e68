"""Serving: three adapters over one SmolLM2-135M, with requests for all of them in one batch.

`lora-kernels train` trains them on synthetic text (finetune/data/phrases.py): a sentence and its passive, its parts as
JSON, or a question. Each row is compared with PEFT on that request alone, and PEFT's two methods are timed too.

    python examples/serve_adapters.py --sentences 6 --repeats 3
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import peft

import lora_kernels as lk
from lora_kernels.finetune.data.phrases import MAIN, TIMES, VERBS, phrases
from lora_kernels.finetune.tasks.pretrained import SMOLLM2, load_pretrained, load_tokenizer, unpacked

RANKS = {"passive": 16, "json": 4, "question": 8}
SENTENCES = phrases(1000, kinds=[MAIN]).sources
PARTS = re.compile(rf"(the .+) (\w+s) (the .+?)(?: ({'|'.join(english for english, _ in TIMES)}))?\.")
PARTICIPLES = ["seen", "found", "loved", "sought", "known", "bought", "painted", "shown", "needed", "described"]
PASSIVE = {verb: participle for (verb, _), participle in zip(VERBS, PARTICIPLES, strict=True)}


def answer(skill: str, sentence: str) -> str:
    who, does, what, when = PARTS.fullmatch(sentence).groups()
    if skill == "json":
        return json.dumps({"who": who, "does": does, "what": what, "when": when})
    if skill == "question":
        return " ".join(filter(None, ("does", who, does.removesuffix("s"), what, when))) + "?"
    return " ".join(filter(None, (what, "is", PASSIVE[does], "by", who, when))) + "."


def train(skill: str, model: str, steps: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("".join(f"{text} -> {answer(skill, text)}\n" for text in SENTENCES[:-50]))
    r, limit = RANKS[skill], 4 * steps
    files = f"--model {model} --data {folder}/text.txt --out {folder} --quiet --no-checkpoints --new-tokens 0"
    sizes = f"--r {r} --alpha {2 * r} --lr 4e-3 --batch-size 4 --max-length 64 --limit {limit} --held-out 0.01"
    print(f"$ lora-kernels train --task causal-lm {files} {sizes}", flush=True)
    command = [sys.executable, "-m", "lora_kernels.cli", "train", "--task", "causal-lm", *f"{files} {sizes}".split()]
    print(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.partition("adapter on disk")[0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--steps", type=int, default=16, help="steps of each training")
    parser.add_argument("--sentences", type=int, default=3, help="each goes to the three adapters and the base model")
    parser.add_argument("--repeats", type=int, default=1, help="repeats of the timing; medians are shown")
    parser.add_argument("--out", type=Path, default=Path("out/serve_adapters"))
    arguments = parser.parse_args()
    source = unpacked("AutoModelForCausalLM", arguments.model, arguments.out / "model")  # read eight times below
    for skill in RANKS:
        if not (arguments.out / skill / "adapter").exists():
            train(skill, source, arguments.steps, arguments.out / skill)

    requests = [(skill, text) for text in SENTENCES[-arguments.sentences :] for skill in (*RANKS, None)]
    random.Random(0).shuffle(requests)
    names, prompts = [skill for skill, _ in requests], [f"{text} ->" for _, text in requests]
    tokenizer = load_tokenizer(source)
    (newline,) = tokenizer("\n")["input_ids"]  # ends an answer

    def generate(model, prompts: list[str], **options) -> list[list[int]]:
        inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        options |= {"max_new_tokens": 40, "do_sample": False, "eos_token_id": newline, "pad_token_id": newline}
        rows = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()
        return [row[: row.index(newline)] if newline in row else row for row in rows]

    model, base = (load_pretrained("AutoModelForCausalLM", source).eval() for _ in range(2))
    pool = lk.AdapterPool(model, capacity=4, max_rank_total=64)
    peft_model = peft.PeftModel.from_pretrained(base, arguments.out / "json/adapter", "json")
    for skill in RANKS:
        pool.load(skill, arguments.out / skill / "adapter")
        peft_model.load_adapter(arguments.out / skill / "adapter", skill)
    with pool.batch(names):  # the first mixed batch probes the model, once: not part of the times below
        pass

    def each_alone() -> list[list[int]]:
        rows = []
        for name, prompt in zip(names, prompts, strict=True):
            with peft_model.disable_adapter() if name is None else nullcontext(peft_model.set_adapter(name)):
                rows += generate(peft_model, [prompt])
        return rows

    def adapter_names() -> list[list[int]]:
        return generate(peft_model, prompts, adapter_names=[name or "__base__" for name in names])

    def pooled() -> list[list[int]]:
        with pool.batch(names):
            return generate(model, prompts)

    ways = {"PEFT, each alone": each_alone, "PEFT, adapter_names": adapter_names, "AdapterPool": pooled}
    tokens, seconds = {}, {way: [] for way in ways}
    for way, run in [*ways.items()] * arguments.repeats:  # interleaved
        start, tokens[way] = time.perf_counter(), run()
        seconds[way].append(time.perf_counter() - start)
    texts = [tokenizer.decode(row).strip() for row in tokens["AdapterPool"]]
    for prompt, name, text in sorted(zip(prompts, map(str, names), texts, strict=True))[: 2 * len(RANKS) + 2]:
        print(f"{name:>8}: {prompt} {text!r}")
    for skill in RANKS:
        right = [text == answer(*request) for text, request in zip(texts, requests, strict=True) if request[0] == skill]
        print(f"accuracy after the training {sum(right) / len(right):.2f} ({skill}, {len(right)} new sentences)")
    for way, taken in seconds.items():
        print(f"{way}: {statistics.median(taken):.2f} s for {sum(map(len, tokens[way]))} tokens")
    same = [row == other for row, other in zip(tokens["AdapterPool"], tokens["PEFT, each alone"], strict=True)]
    print(f"{sum(same)} of {len(same)} rows of the mixed batch are PEFT's for that request alone, token for token")
    assert all(same)


if __name__ == "__main__":
    main()
