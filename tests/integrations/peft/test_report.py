"""Tests the report of accelerate and PEFT's rows in explain: every layer, and a reason for each that is not fused."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_kernels as lk
from lora_kernels.integrations.peft.accelerate import FUSED, accelerate
from lora_kernels.integrations.peft.report import Report, report, why_not


def rows(model):
    return {(cells := re.split(r"  +", line))[0]: cells[1:] for line in lk.explain(model).splitlines()}


def test_one_line_where_all_are_fused_and_a_line_for_each_reason():
    assert str(Report({"a": None, "b": None})) == "2 of 2 PEFT LoRA layers fused"
    assert str(Report({})) == "0 of 0 PEFT LoRA layers fused: the model has none"
    many = Report({"a": None, **{f"b{i}": "it is blue" for i in range(5)}, "c": "it is red"})
    assert str(many).splitlines() == [
        "1 of 7 PEFT LoRA layers fused; PEFT's own forward runs the others, because",
        "  5: it is blue (b0, b1, b2 and 2 more)",
        "  1: it is red (c)",
    ]
    assert (many.fused, many.others["c"]) == (("a",), "it is red")


def test_every_layer_of_peft_is_told(adapted):
    model = adapted()
    before = report(model, FUSED)
    assert len(before.others) == 3
    assert set(before.others.values()) == {"lora_kernels.accelerate(model) was not called since PEFT made it"}
    accelerate(model, verbose=False)
    model.base_model.model.second.forward = lambda x: x
    told = report(model, FUSED)
    assert told.others == {"base_model.model.second": "its forward is patched"}
    assert len(told.fused) == 2


def test_layers_of_classes_without_a_fused_path():
    model = get_peft_model(
        nn.Sequential(nn.MultiheadAttention(8, 2)), LoraConfig(target_modules=["0"], init_lora_weights=False)
    )
    reasons = report(accelerate(model, verbose=False), FUSED).others
    over = "over torch.nn.modules.activation.MultiheadAttention has no fused path"
    assert reasons["base_model.model.0"] == f"peft.tuners.lora.layer.MultiheadAttention {over}"


def test_a_class_that_somebody_else_changed_before(adapted):
    layer = adapted().base_model.model.first
    layer.__class__ = type("Sharded", (type(layer),), {"__module__": "elsewhere"})
    assert why_not(layer, FUSED) == "its class was changed to elsewhere.Sharded: call accelerate before that"


def test_explain_tells_pefts_layers_whole(adapted):
    model = adapted(rank_pattern={"second": 2})
    told = rows(model)
    not_yet = "PEFT's own forward: lora_kernels.accelerate(model) was not called since PEFT made it"
    assert told["base_model.model.first"] == ["1", "40x12", "4", "2", not_yet]
    accelerate(model, verbose=False)
    told = rows(model)
    assert told["base_model.model.first"] == ["1", "40x12", "4", "2", "fused"]
    assert told["base_model.model.second"] == ["1", "24x40", "2", "4", "fused"]
    assert told["base_model.model.third"] == ["1", "32x24", "4", "2", "fused"]
    assert told["base_model.model.head"][-1] == "not replaced: PEFT has no adapter for it"
    assert not any("base_layer" in path or "lora_A" in path for path in told)
    assert rows(model.base_model.model.first)["FusedLinear"][-1] == "fused"


@pytest.mark.parametrize("merged", [False, True])
def test_explain_tells_the_present_state(merged, adapted):
    model = accelerate(adapted(), verbose=False)
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=3, target_modules=["first"]))
    model.base_model.set_adapter(["default", "other"])
    if merged:
        model.merge_adapter()
    runs = "PEFT's own forward: its adapters are merged: the base layer alone runs" if merged else "fused"
    assert rows(model)["base_model.model.first"] == ["1", "40x12", "4+3", "2+1", runs]


def test_explain_counts_calls_that_were_not_fused(adapted):
    model = accelerate(adapted(), verbose=False)
    model(torch.ones(2, 12), adapter_names=["__base__", "__base__"])
    runs = "fused; PEFT's own forward took 1 calls (no adapter of the batch is on it)"
    assert rows(model)["base_model.model.first"][-1] == runs
