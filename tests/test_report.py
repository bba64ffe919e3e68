"""explain tells, for each linear layer, what happened and why, and what is trained."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from lora_kernels.adapters import merge_lora
from lora_kernels.config import LoRAConfig
from lora_kernels.inject import apply_lora, explain
from lora_kernels.layers import LoRALinear
from lora_kernels.plan import use_backend
from lora_kernels.report import Injection, injection_of, unwrap


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.up = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 16)


def model() -> nn.Module:
    net = nn.ModuleDict({"layers": nn.ModuleList([Block() for _ in range(12)])})
    return nn.ModuleDict({"net": net, "head": nn.Linear(8, 3)})


def rows(text: str) -> dict[str, list[str]]:
    return {(cells := re.split(r"  +", line))[0]: cells[1:] for line in text.splitlines()}


def test_before_apply_lora() -> None:
    told = rows(explain(model()))
    assert told["net.layers.0-11.q"] == ["12", "6x8", "-", "-", "not replaced: apply_lora was not called"]
    assert f"trainable {12 * (54 + 54 + 144) + 27:,} of 3,051 parameters (100.000 %)" in told


def test_every_reason_rank_and_total() -> None:
    config = LoRAConfig(
        r=4, lora_alpha=8, target_modules=["q", "up"], exclude_modules=r".*\.3\.up", rank_pattern={"0.q": 2},
        modules_to_save=["head"], layers_to_transform=[*range(10)],
    )  # fmt: skip
    told = rows(explain(apply_lora(model(), config)))
    assert told["net.layers.0.q"][:4] == ["1", "6x8", "2", "4"]
    assert told["net.layers.1-9.q"][:4] == ["9", "6x8", "4", "2"]
    assert told["net.layers.0-2,4-9.up"][:4] == ["9", "16x8", "4", "2"]
    assert told["net.layers.3.up"][4] == "not replaced: excluded by exclude_modules"
    assert told["net.layers.10-11.q"][4] == "not replaced: not in layers_to_transform"
    assert told["net.layers.0-11.k"] == ["12", "6x8", "-", "-", "not replaced: not in target_modules"]
    assert told["head"][4] == "not replaced: trained whole by modules_to_save"
    assert "head: trained whole and saved with the adapter" in told
    trained = 2 * (8 + 6) + 9 * 4 * (8 + 6) + 9 * 4 * (8 + 16) + 27
    total = 3051 + trained - 27
    assert f"trainable {trained:,} of {total:,} parameters ({100 * trained / total:.3f} %)" in told


def test_backend_is_the_one_that_would_run() -> None:
    injected = apply_lora(model(), LoRAConfig(target_modules=["q"]))
    with use_backend("reference"):
        assert rows(explain(injected))["net.layers.0-11.q"][4] == "reference"
    injected.get_submodule("net.layers.2.q").backend = "reference"  # type: ignore[assignment]
    if not torch.cuda.is_available():
        double = apply_lora(model().double(), LoRAConfig(target_modules=["q"]))
        with use_backend("triton"):
            assert rows(explain(double))["net.layers.0-11.q"][4].startswith("cannot run: ")
    merge_lora(injected)
    assert rows(explain(injected))["net.layers.0-11.q"][4] == "merged: one GEMM"


def test_paths_with_two_numbers_and_other_models() -> None:
    nested = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4) for _ in range(2)]) for _ in range(3)])
    assert rows(explain(nested))["*.*"][0] == "6"
    assert rows(explain(nn.Linear(3, 2)))["Linear"][:2] == ["1", "2x3"]
    assert rows(explain(LoRALinear(3, 2, r=1)))["LoRALinear"][:3] == ["1", "2x3", "1"]
    assert explain(nn.ReLU()).endswith("trainable 0 of 0 parameters (0.000 %)")


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_models_are_looked_into(wrap: type) -> None:
    inner = apply_lora(model(), LoRAConfig(target_modules=["q"]))
    wrapped = wrap(inner)
    assert unwrap(wrapped) is inner
    assert isinstance(injection_of(wrapped), Injection)
    assert explain(wrapped) == explain(inner)
