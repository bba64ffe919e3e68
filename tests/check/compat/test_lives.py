import importlib.util

import pytest

from lora_kernels.check.compat.cells import FUSED, PEFT, WRONG, try_cell
from lora_kernels.check.compat.families import FAMILIES
from lora_kernels.check.compat.features import FEATURES
from lora_kernels.integrations.peft import linear


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("feature", "family"),
    [
        ("save_pretrained, from_pretrained", "RoBERTa"), ("deepcopy, pickle", "Gemma 3"),
        ("transformers' add_adapter", "Llama"), ("torch.compile(fullgraph=True)", "DistilBERT"),
    ],
)  # fmt: skip
def test_fused(feature, family):
    cell = try_cell(FEATURES[feature], FAMILIES[family])
    assert (cell.status, cell.reasons) == (FUSED, ())


@pytest.mark.slow
def test_a_layer_that_cannot_be_traced_is_wrong(monkeypatch):
    right = linear.operands

    def with_a_break(*args):
        print("torch cannot trace this into one graph")
        return right(*args)

    monkeypatch.setattr(linear, "operands", with_a_break)
    assert try_cell(FEATURES["torch.compile(fullgraph=True)"], FAMILIES["DistilBERT"]).status == WRONG


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_quantized_base_takes_pefts_own_forward():
    cell = try_cell(FEATURES["bitsandbytes 4-bit base"], FAMILIES["Llama"])
    assert cell.status == PEFT
    assert "Linear4bit" in cell.reasons[0]
