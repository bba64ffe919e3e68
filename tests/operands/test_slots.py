"""How adapters are laid side by side, and what is refused."""

import pytest
import torch

from lora_kernels import ConfigError, ShapeError, Slots


def lists(ranks=(2, 3), K=5, N=4):
    return [torch.randn(r, K) for r in ranks], [torch.randn(N, r) for r in ranks]


def test_lists_and_packed_tensors_give_the_same_slots():
    A, B = lists()
    one, other = Slots.of(A, B, None, [0.5, 2.0]), Slots.of(torch.cat(A), torch.cat(B, 1), [2, 3], [0.5, 2.0])
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert one.starts.tolist() == [0, 2]
    assert one.ranks.tolist() == [2, 3]
    assert one.max_rank == 3
    assert one.starts.dtype == one.ranks.dtype == torch.int32
    assert one.scalings.dtype == torch.float32


def test_one_scaling_serves_all_and_ranks_may_be_a_tensor():
    A, B = lists()
    slots = Slots.of(torch.cat(A), torch.cat(B, 1), torch.tensor([2, 3]), 1.5)
    assert slots.scalings.tolist() == [1.5, 1.5]


def test_gradients_flow_to_every_tensor_that_was_given():
    A, B = lists()
    for T in (*A, *B):
        T.requires_grad_()
    slots = Slots.of(A, B, None, 1.0)
    (slots.A.sum() + slots.B.sum()).backward()
    assert all(torch.equal(T.grad, torch.ones_like(T)) for T in (*A, *B))


@pytest.mark.parametrize(
    ("error", "said", "change"),
    [
        (ShapeError, "pass ranks=None", lambda A, B: (A, B, [2, 2], 1.0)),
        (ShapeError, "ranks is None", lambda A, B: (torch.cat(A), torch.cat(B, 1), None, 1.0)),
        (ConfigError, "0 \\(an empty slot\\)", lambda A, B: (torch.cat(A), torch.cat(B, 1), [6, -1], 1.0)),
        (ShapeError, "expected A \\(4, K\\)", lambda A, B: (torch.cat(A), torch.cat(B, 1), [2, 2], 1.0)),
        (ShapeError, "expected A \\(5, K\\)", lambda A, B: (torch.cat(A), torch.cat(B, 1).t(), [2, 3], 1.0)),
        (ShapeError, "3 scalings for 2 adapters", lambda A, B: (A, B, None, [1.0, 1.0, 1.0])),
        (ConfigError, "finite", lambda A, B: (A, B, None, [1.0, float("nan")])),
        (ShapeError, "both packed", lambda A, B: (A, torch.cat(B, 1), None, 1.0)),
        (ShapeError, "both packed", lambda A, B: (A, B[:1], None, 1.0)),
        (ShapeError, "both packed", lambda A, B: ([], [], None, 1.0)),
        (ShapeError, "adapter 1", lambda A, B: (A, [B[0], B[1][:, :2]], None, 1.0)),
        (ShapeError, "adapter 1", lambda A, B: ([A[0], A[1].double()], B, None, 1.0)),
        (ShapeError, "adapter 1", lambda A, B: ([A[0], A[1][:, :4]], B, None, 1.0)),
    ],
)
def test_what_does_not_fit_is_refused(error, said, change):
    with pytest.raises(error, match=said):
        Slots.of(*change(*lists()))
