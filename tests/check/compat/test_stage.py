import pytest
import torch
import torch.nn.functional as F

from lora_kernels.check.compat.families import FAMILIES
from lora_kernels.check.compat.stage import Stage, one_mask_a_shape
from lora_kernels.integrations.peft.linear import FusedLinear


def test_all_stages_hold_the_same_values():
    family = FAMILIES["ViT"]
    stages = [Stage(family), Stage(family, accelerated=True), Stage(family, exact=True)]
    answers = []
    for stage in stages:
        model, inputs = stage.build()
        answers.append(stage.step(model, inputs))
        assert any(isinstance(m, FusedLinear) for m in model.modules()) == stage.accelerated
        assert {p.dtype for p in model.parameters()} == {torch.float64 if stage.exact else torch.float32}
    for name, exact in answers[2].items():
        assert exact.dtype == torch.float64
        for answer in answers[:2]:
            assert answer[name].dtype == torch.float32
            torch.testing.assert_close(answer[name].double(), exact, rtol=1e-3, atol=1e-4)


def test_another_seed_is_another_model():
    one, other = (Stage(FAMILIES["GPT-2"], seed).build()[0] for seed in (0, 1))
    weights = [dict(m.named_parameters())["base_model.model.transformer.h.0.attn.c_attn.lora_B.default.weight"]
               for m in (one, other)]  # fmt: skip
    assert not torch.equal(*weights)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_masks_of_one_shape_are_one(p):
    X, own = torch.randn(2, 3, 8), F.dropout
    with one_mask_a_shape():
        first, second = F.dropout(X, p), F.dropout(2 * X, p)
        assert torch.equal(2 * first, second)
        assert bool((first == 0).any()) == (p > 0)
        assert torch.equal(F.dropout(X, p, training=False), X)
    assert F.dropout is own
