import pytest

from lora_kernels.check.compat.cells import FUSED, PARTLY, try_cell
from lora_kernels.check.compat.families import FAMILIES
from lora_kernels.check.compat.features import FEATURES


@pytest.mark.parametrize(
    ("feature", "family"),
    [
        ("several active adapters", "BERT"), ("set_adapter, delete_adapter", "Phi-3"),
        ("add_adapter on other targets later", "OPT"), ("add_weighted_adapter", "Llama"), ("merge_and_unload", "GPT-2"),
        ("hotswap", "DistilBERT"),
    ],
)  # fmt: skip
def test_fused(feature, family):
    cell = try_cell(FEATURES[feature], FAMILIES[family])
    assert (cell.status, cell.reasons) == (FUSED, ())


@pytest.mark.parametrize(
    ("feature", "family", "reason"),
    [
        ("disable_adapter", "Llama", "its adapters are disabled"),
        ("merge_adapter, unmerge_adapter", "GPT-2", "its adapters are merged"),
        ("hooks on base_layer, lora_A, lora_B", "Llama", "lora_A has forward hooks"),
    ],
)
def test_partly(feature, family, reason):
    cell = try_cell(FEATURES[feature], FAMILIES[family])
    assert cell.status == PARTLY
    assert any(reason in each for each in cell.reasons)
    assert 0 < cell.fused < cell.calls
