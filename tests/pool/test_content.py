"""Other content for inputs: all of it other, and valid."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.pool.content import is_content, kept_values, other_content


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_floats_of_the_same_spread(dtype: torch.dtype) -> None:
    x = (torch.randn(40, 50, dtype=torch.float64) * 0.25 + 7).to(dtype)
    y = other_content(())(x, torch.Generator().manual_seed(0))
    assert (y.dtype, y.shape) == (dtype, x.shape)
    assert abs(y.double().mean() - 7) < 0.1
    assert abs(y.double().std() - x.double().std()) < 0.02
    constant = other_content(())(torch.ones(40), torch.Generator())
    assert (constant != 1).all()
    assert other_content(())(torch.full((3,), torch.nan), torch.Generator()).isfinite().all()


def test_tokens_between_the_smallest_and_the_largest() -> None:
    x = torch.randint(5, 90, (30, 40))
    x[:, 3], x[:, 4], x[0, 5] = -100, 96, 96
    y = other_content([96])(x, torch.Generator().manual_seed(0))
    free = (x != 96) & (x != -100)
    assert (y[free] != x[free]).all()
    assert torch.equal(y[~free], x[~free])
    assert (int(y[free].min()), int(y[free].max())) == (5, 89)
    for value, wanted in ((0, 1), (7, 6)):
        assert other_content(())(torch.full((2, 2), value), torch.Generator()).eq(wanted).all()
    assert other_content([7])(torch.full((2, 1), 7), torch.Generator()).eq(6).all()  # there is no other
    mask = torch.ones(3, dtype=torch.bool)
    assert other_content(())(mask, torch.Generator()).all()
    assert other_content(())(torch.full((3,), -1), torch.Generator()).eq(-1).all()


def test_what_may_have_to_stay() -> None:
    tokens = {"ids": torch.tensor([[1, 9, 3, 3]]), "x": torch.ones(2)}
    assert list(kept_values(tokens, True)) == [(), (9,), (1,), (3,)]
    assert list(kept_values(tokens, False)) == [()]
    assert [name for name in ("x", "attention_mask", "position_ids", "input_ids") if is_content(name)] == [
        "x", "input_ids",
    ]  # fmt: skip
