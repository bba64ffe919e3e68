"""Checks that explain shows, for each linear layer, whether it is adapted and why not, and what is trained."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from torch import nn

from lora_kernels.adapters import merge_lora
from lora_kernels.config import LoRAConfig
from lora_kernels.errors import ConfigError
from lora_kernels.kernels.tiles import GemmConfig
from lora_kernels.layers import LoRALinear
from lora_kernels.models.explain import Injection, injection_of, unwrap
from lora_kernels.models.inject import apply_lora, explain
from lora_kernels.planning import choose as plan
from lora_kernels.planning.choose import use_backend
from lora_kernels.planning.tuned import Entry, Measured, Table


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


PLANS = ("eager", "shrink_extend", "one_pass", "tma_extend", "one_launch", "gluon_extend", "ptr_one_launch")


def plans_told(text: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """{plan: cells} of the forward and of the backward table; the first cell is ">" where it runs."""
    tables = text.split("forward: ")[1].split("backward: ")
    found = []
    for table in tables:
        lines = [re.split(r"  +", line.replace(">  ", ">").strip()) for line in table.splitlines()[2:] if line.strip()]
        found.append({cells[0].lstrip(">"): ([">"] if cells[0][0] == ">" else [""]) + cells[1:] for cells in lines})
    return found[0], found[1]


def test_a_lone_layer_tells_every_plan() -> None:
    layer = LoRALinear(4096, 4096, r=16, dtype=torch.bfloat16, device="meta")
    fwd, bwd = plans_told(explain(layer, tokens=8192, chip="sm_90"))
    assert set(fwd) == set(bwd) >= set(PLANS)
    assert [name for name, cells in fwd.items() if cells[0] == ">"] == ["eager"]
    assert [name for name, cells in bwd.items() if cells[0] == ">"] == ["eager"]
    assert fwd["eager"][-1] == "runs: model"
    assert fwd["eager"][-2] == "XA + matmul + addmm_"
    assert "only if named: not measured" in fwd["tma_extend"][-1]
    assert bwd["one_pass"][-1] == "refused: it is a forward plan"
    assert float(fwd["eager"][1]) > 100
    other, _ = plans_told(explain(layer, tokens=8192, chip="sm_80"))
    assert "no TMA" in other["tma_extend"][-1]
    assert "merged" in explain_merged(layer)


def explain_merged(layer: LoRALinear) -> str:
    layer._base_weight = layer.weight
    try:
        return explain(layer, chip="sm_90")
    finally:
        layer._base_weight = None


def test_a_named_plan_runs_or_says_why_not() -> None:
    layer = LoRALinear(
        4096, 4096, r=16, lora_dropout=0.1, dtype=torch.bfloat16, device="meta", backend="triton:one_pass"
    )
    fwd, bwd = plans_told(explain(layer, chip="sm_90"))
    assert fwd["one_pass"][0] == ">"
    assert fwd["one_pass"][-1] == "runs: named"
    assert bwd["eager"][0] == ">"
    layer.backend = "triton:one_launch"
    text = explain(layer, chip="sm_90")
    assert "cannot run: plan 'one_launch' cannot run here: dropout's mask" in text
    layer.backend = "reference"
    assert explain(layer, chip="sm_90").endswith("chip='sm_90' tells what a GPU would run")


def test_one_layer_of_a_model_by_its_path() -> None:
    injected = apply_lora(model().bfloat16(), LoRAConfig(target_modules=["q"]))
    text = explain(injected, layer="net.layers.2.q", chip="sm_90")
    assert text.startswith("net.layers.2.q\n")
    assert "N=6 K=8 r=8 bfloat16, bias on sm_90" in text
    assert "triton (" in rows(explain(injected, chip="sm_90"))["net.layers.0-11.q"][4]
    with pytest.raises(ConfigError, match=r"'net.layers.2.k' is no LoRALinear.*net.layers.0.q"):
        explain(injected, layer="net.layers.2.k")
    with pytest.raises(ConfigError, match="'h100' is unknown; known are"):
        explain(injected, chip="h100")


def test_measured_times_and_tiles_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = GemmConfig(128, 128, 64, num_warps=8, num_stages=3)
    measured = (Measured("eager", None, 400.0), Measured("shrink_extend", tiles, 123.4))
    sizes = {"op": "fwd", "dtype": "bfloat16", "M": 2048, "N": 4096, "K": 4096, "r": 16}
    flags = {"dropout": False, "bits": True, "bias": False, "need_dx": True, "measured": measured}
    where = dict.fromkeys(("gpu", "torch", "triton", "driver", "commit", "date"), "")
    monkeypatch.setattr(plan, "table_for", functools.cache(lambda gpu: Table([Entry(**sizes, **flags, **where)])))
    plan.forget()
    layer = LoRALinear(4096, 4096, r=16, dtype=torch.bfloat16, device="meta", bias=False)
    fwd, bwd = plans_told(explain(layer, chip="sm_90"))
    plan.forget()
    assert fwd["shrink_extend"][0] == ">"
    assert fwd["shrink_extend"][2] == "123.4"
    assert fwd["shrink_extend"][-1].startswith("runs: tuned on this GPU at 2048 rows; tiles GemmConfig(BLOCK_M=128")
    assert fwd["eager"][2] == "400.0"
    assert bwd["shrink_extend"][2] == "-"
