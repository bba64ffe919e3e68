"""``torchrun --nproc-per-node 2 -m lora_kernels.cli train``: the command in two processes against one."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import run as torch_run

from lora_kernels.cli import main
from lora_kernels.finetune.advise import recipe
from lora_kernels.testing import assert_close

pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "GLOO_SOCKET_IFNAME": "lo"}
TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 -m -- lora_kernels.cli".split()


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """The command's options but for the batch and the folder; BERT without dropout, so that both draw the same."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "fine", "lovely", "dull", "awful", "film", "plot", "the", "a", "was"]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]").save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes, **still)).save_pretrained(
        tmp_path / "model"
    )
    draw = torch.Generator().manual_seed(0)
    rows = []
    for i in range(96):
        rest = [
            words[8 + int(n)] for n in torch.randint(5, (int(torch.randint(4, (), generator=draw)),), generator=draw)
        ]
        rows.append(f"{' '.join([words[4 + i % 4], *rest])},{'down' if i % 4 > 1 else 'up'}\n")
    (tmp_path / "data.csv").write_text("text,label\n" + "".join(rows))
    text = f"train --model {tmp_path}/model --data {tmp_path}/data.csv --quiet --r 4 --warmup 0 --lr 0.003"
    return shlex.split(f"{text} --epochs 2 --threads 1 --device cpu")


@contextmanager
def torchrun(options: list[str], log: Path) -> Iterator[Any]:
    """The command under torchrun, ended with all it started."""
    command = [*TORCHRUN, *options]
    with log.open("w") as file:
        process = psutil.Popen(command, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        for each in [*process.children(recursive=True), process] if process.is_running() else []:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


def workers(process: Any, count: int = 2) -> list[Any]:
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        found = [child for child in process.children(recursive=True) if "train" in child.cmdline()]
        if len(found) == count:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{len(found)} workers")


def ran(options: list[str], log: Path) -> str:
    with torchrun(options, log) as process:
        code = process.wait(200)
    assert code == 0, log.read_text()
    return log.read_text()


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def figures(out: Path) -> Any:
    return json.loads((out / "metrics.json").read_text())


def test_two_processes_train_as_one_on_the_doubled_batch(options, tmp_path, monkeypatch):
    options += ["--accumulate", "2"]
    shown = ran([*options, "--batch-size", "5", "--out", str(tmp_path / "two")], tmp_path / "log")
    assert shown.count("trained 8 steps") == shown.count("results: ") == 1  # the first process talks alone
    assert main([*options, "--batch-size", "10", "--out", str(tmp_path / "one")]) == 0
    wrapped = recipe.LoRA
    monkeypatch.setattr(recipe, "LoRA", lambda *args: wrapped(*args).double())
    assert main([*options, "--batch-size", "10", "--out", str(tmp_path / "truth"), "--no-checkpoints"]) == 0
    got, plain, truth = (adapter(tmp_path / name) for name in ("two", "one", "truth"))
    assert got.keys() == plain.keys()
    for kind in ("lora_A", "lora_B", "classifier"):
        vectors = [torch.cat([w[n].flatten() for n in sorted(w) if kind in n]) for w in (got, plain, truth)]
        assert_close(*vectors, what=kind)
    two, one = (figures(tmp_path / name) for name in ("two", "one"))
    assert two["environment"]["processes"] == 2
    assert two["test"]["confusion_matrix"] == one["test"]["confusion_matrix"]
    assert two["training"]["tokens"] == one["training"]["tokens"]
    for mine, whole in zip(two["training"]["epochs"], one["training"]["epochs"], strict=True):
        assert mine == pytest.approx(whole, rel=1e-4)
    command = (tmp_path / "two" / "reproduce.sh").read_text()
    assert command.startswith("torchrun --nproc-per-node 2 -m -- lora_kernels.cli train ")
    parsed = torch_run.parse_args(shlex.split(command)[1:])  # which gives up at an option it takes for its own
    assert (parsed.nproc_per_node, parsed.training_script) == ("2", "lora_kernels.cli")


def test_one_process_killed_ends_the_run_and_it_resumes(options, tmp_path):
    options += ["--batch-size", "2", "--epochs", "12", "--dropout", "0.1", "--checkpoint-every", "2"]
    parts = [*options, "--out", str(tmp_path / "parts")]
    with torchrun(parts, tmp_path / "log") as process:
        victim = workers(process)[1]
        deadline = time.monotonic() + 900
        while not list(tmp_path.glob("parts/checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        victim.kill()
        assert process.wait(900) != 0
    assert "Signal 9" in (tmp_path / "log").read_text()
    assert not (tmp_path / "parts" / "adapter").exists()
    shown = ran([*parts, "--resume"], tmp_path / "log")
    assert shown.count("resuming from ") == 1
    assert len(figures(tmp_path / "parts")["training"]["epochs"]) == 12


def test_a_process_that_hangs_ends_the_run(options, tmp_path):
    options += ["--batch-size", "2", "--epochs", "400", "--timeout", "4", "--checkpoint-every", "2"]
    with torchrun([*options, "--out", str(tmp_path / "out")], tmp_path / "log") as process:
        victim = workers(process)[1]
        deadline = time.monotonic() + 900
        while not list(tmp_path.glob("out/checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        victim.send_signal(signal.SIGSTOP)
        assert process.wait(90) != 0
    shown = (tmp_path / "log").read_text()
    assert "Timed out waiting 4000ms" in shown
