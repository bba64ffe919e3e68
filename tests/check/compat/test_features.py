import pytest

from lora_kernels.check.compat.cells import ABSENT, FUSED, PARTLY, PEFT, try_cell
from lora_kernels.check.compat.families import FAMILIES
from lora_kernels.check.compat.features import FEATURES


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_every_family_is_fused(family):
    cell = try_cell(FEATURES["train, float32"], FAMILIES[family])
    assert (cell.status, cell.reasons) == (FUSED, ())


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("feature", "family"),
    [
        ("LoRA on attention only", "T5"), ("autocast to bfloat16", "GPT-2"), ("evaluation, inference_mode", "BERT"),
        ("lora_dropout", "Llama"), ("lora_bias", "Qwen2"), ('bias="lora_only"', "BERT"), ("rsLoRA", "Phi"),
        ("rank_pattern, alpha_pattern", "Gemma 3"), ("PiSSA", "GPT-2"), ("embeddings as targets", "Gemma 2"),
        ("gradient accumulation", "ViT"), ("gradient checkpointing", "Mistral"),
        ("gradient checkpointing, reentrant", "Marian"), ("the whole model in one checkpoint", "Qwen3"),
        ("generate with a cache", "T5"),
    ],
)  # fmt: skip
def test_fused(feature, family):
    cell = try_cell(FEATURES[feature], FAMILIES[family])
    assert (cell.status, cell.reasons) == (FUSED, ())


def test_experts_take_pefts_own_forward():
    cell = try_cell(FEATURES["experts by target_parameters"], FAMILIES["Mixtral"])
    assert cell.status == PEFT
    assert "ParamWrapper" in cell.reasons[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["BERT", "GPT-2", "Llama", "T5", "ViT"])
def test_no_cell_is_wrong(family):
    cells = [try_cell(feature, FAMILIES[family]) for name, feature in FEATURES.items()]
    assert {cell.status for cell in cells} <= {FUSED, PARTLY, PEFT, ABSENT}, [c for c in cells if c.status == "WRONG"]
