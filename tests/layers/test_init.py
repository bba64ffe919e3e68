"""lora_kernels.layers.init against what peft.LoraConfig(init_lora_weights=...) makes of the same linear layer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from lora_kernels.errors import ConfigError
from lora_kernels.layers.init import init_lora_weights


def tensors(N: int, K: int, r: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, Tensor, Tensor]:
    weight = nn.Parameter(torch.randn(N, K).to(dtype), requires_grad=False)
    return weight, torch.full((r, K), math.nan), torch.full((N, r), math.nan)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K", "r", "alpha"), [(24, 16, 4, 8), (16, 24, 7, 3), (8, 8, 8, 16)])
def test_decompositions_are_pefts_bit_for_bit(
    init: str, dtype: torch.dtype, N: int, K: int, r: int, alpha: int
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(K, N, dtype=dtype))
    weight, A, B = nn.Parameter(base[0].weight.detach().clone()), torch.empty(r, K), torch.empty(N, r)
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"], init_lora_weights=init)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).base_model.model[0]
    init_lora_weights(init, weight, A, B, alpha / r, r)
    # PEFT rounds a 16-bit layer's adapter once to 16 bit before it goes on in float32; this package does not.
    assert torch.equal(A.to(dtype).float(), theirs.lora_A["default"].weight)
    assert torch.equal(B.to(dtype).float(), theirs.lora_B["default"].weight)
    assert torch.equal(weight, theirs.base_layer.weight)
    assert not torch.equal(weight, base[0].weight)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decompositions_leave_the_function_as_it_was(init: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, A, B = tensors(12, 20, 5, dtype)
    A, B, before = A.to(dtype), B.to(dtype), weight.detach().clone()
    init_lora_weights(init, weight, A, B, 0.4, 5)
    torch.testing.assert_close(weight + 0.4 * B @ A, before, rtol=0, atol=20 * torch.finfo(dtype).eps)
    assert (weight - before).abs().max() > 0.1


def test_pissa_takes_the_largest_part() -> None:
    weight, A, B = tensors(12, 20, 5)
    singular = torch.linalg.svdvals(weight)
    init_lora_weights("pissa", weight, A, B, 2.0, 5)
    torch.testing.assert_close(torch.linalg.svdvals(2.0 * B @ A)[:5], singular[:5])
    torch.testing.assert_close(torch.linalg.svdvals(weight)[:7], singular[5:])


def test_the_old_weight_is_exchanged_not_written_into() -> None:
    weight, A, B = tensors(12, 20, 5)
    kept, before = weight.data, weight.detach().clone()
    init_lora_weights("olora", weight, A, B, 2.0, 5)
    assert torch.equal(kept, before)
    assert not torch.equal(weight, before)


def test_true_starts_as_the_base_and_spreads_as_nn_linear() -> None:
    torch.manual_seed(0)
    weight, A, B = tensors(64, 400, 64)
    init_lora_weights(True, weight, A, B, 1.0, 64)
    assert not B.any()
    bound = 1 / math.sqrt(400)
    assert A.abs().max() <= bound
    assert abs(A.std().item() / (bound / math.sqrt(3)) - 1) < 0.02


def test_false_starts_away_from_the_base() -> None:
    weight, A, B = tensors(300, 40, 16)
    init_lora_weights(False, weight, A, B, 1.0, 16)
    assert A.std() > 0.05
    assert abs(B.std().item() / (1 / math.sqrt(3 * 16)) - 1) < 0.05


def test_gaussian_has_deviation_one_over_r() -> None:
    torch.manual_seed(0)
    weight, A, B = tensors(8, 2000, 16)
    init_lora_weights("gaussian", weight, A, B, 1.0, 16)
    assert not B.any()
    assert abs(A.std().item() * 16 - 1) < 0.02


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_other_inits_leave_the_weight_alone(init: bool | str) -> None:
    weight, A, B = tensors(8, 6, 3)
    kept = weight.data_ptr(), weight.detach().clone()
    init_lora_weights(init, weight, A, B, 1.0, 3)
    assert (weight.data_ptr(), True) == (kept[0], torch.equal(weight, kept[1]))
    assert torch.isfinite(A).all()
    assert torch.isfinite(B).all()


@pytest.mark.parametrize(
    ("init", "scaling", "r", "spoil"),
    [("pissa", 1.0, 7, False), ("olora", 1.0, 7, False), ("pissa", 0.0, 3, False), ("pissa", -1.0, 3, False),
     ("pissa", 1.0, 3, True), ("olora", 1.0, 3, True), ("eva", 1.0, 3, False), (None, 1.0, 3, False)],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_anything_changes(init, scaling, r, spoil) -> None:  # type: ignore[no-untyped-def]
    weight, A, B = tensors(8, 6, r)
    if spoil:
        weight[2, 3] = math.nan
    before = weight.detach().clone()
    with pytest.raises(ConfigError, match="init_lora_weights"):
        init_lora_weights(init, weight, A, B, scaling, r)
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=0, equal_nan=True)
    assert A.isnan().all()
    assert B.isnan().all()
