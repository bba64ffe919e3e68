"""Weights in one buffer: found where they are, moved there without a Parameter changing its identity."""

import torch
from torch import nn

from lora_kernels.formats.side_by_side import as_one, put_side_by_side


def test_weights_side_by_side_are_one_matrix():
    whole = torch.randn(12, 5)
    q, k, v = whole.split([6, 4, 2])
    one = as_one([q, k, v])
    assert torch.equal(one, whole)
    assert one.data_ptr() == whole.data_ptr()
    for parts in ([q, v], [k, q], [q, k.clone(), v], [whole.T[:2], whole.T[2:]], [whole[:, :3], whole[:, :3]]):
        assert as_one(parts) is None
    assert torch.equal(as_one([k, v]), whole[6:])


def test_parameters_are_moved_and_keep_their_identity_and_values():
    W = [nn.Parameter(torch.randn(N, 5), requires_grad=False) for N in (4, 3)]
    values = [w.clone() for w in W]
    put_side_by_side(W)
    assert as_one(W) is not None
    assert all(torch.equal(w, value) for w, value in zip(W, values, strict=True))
    where = W[0].data_ptr()
    put_side_by_side(W)
    assert W[0].data_ptr() == where
    twice = nn.Parameter(torch.randn(4, 5))
    put_side_by_side([twice, twice])
    assert as_one([twice, twice]) is None
