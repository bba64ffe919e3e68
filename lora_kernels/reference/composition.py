"""Each operator as a plain differentiable function: ordinary PyTorch operations, none of them in place.

    Y = X W^T + bias + s/(1-p) (D*X) A^T B^T

PyTorch cannot differentiate the kernels and explicit backwards of this package. Second derivatives, forward-mode
derivatives, batched gradients and the transforms of torch.func need operations that PyTorch can differentiate and vmap;
this module has them. The low-rank part is computed in float32 for 16-bit operands, and its sum with the base is rounded
once. D is the 0/1 keep mask of inverted dropout on the adapter's input, or None. It is an argument, so that it can be
the mask of the fused forward.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import embedding, linear, silu

from lora_kernels.operands.slots import Slots
from lora_kernels.reference.dropout import generator_keep_mask, philox_keep_mask
from lora_kernels.reference.lora_conv import Geometry, Mask
from lora_kernels.reference.lora_conv import keep_mask as conv_keep_mask
from lora_kernels.reference.lora_linear import _inv_keep
from lora_kernels.reference.multi_infer import places
from lora_kernels.reference.transforms import bare, batched, in_thread, no_autocast


def keep_mask(X: Tensor, width: int, p: float, seed: Tensor | None, philox: bool) -> Tensor | None:
    """A 0/1 mask (*X.shape[:-1], width); None if seed is None.

    ``philox``: drawn as kernels draw it; otherwise by a generator on the CPU, as in the reference backend. A seed that
    is mapped over (vmap with randomness="different") gives each sample its own Philox mask.
    """
    if seed is None:
        return None
    M = math.prod(X.shape[:-1])
    if philox or X.device.type != "cpu" or is_compiling() or batched(seed):
        keep = philox_keep_mask(seed, p, M, width)
    else:
        keep = in_thread(generator_keep_mask, bare(seed), p, M, width, X.dtype)
    return keep.view(*X.shape[:-1], width)


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype for sums that are rounded once: the widest dtype of the tensors, at least float32."""
    return reduce(torch.promote_types, (T.dtype for T in tensors), torch.float32)


def _update(X: Tensor, A: Tensor, B: Tensor, scaling: float, keep: Tensor | None, p: float) -> Tensor:
    """s/(1-p) (D*X) A^T B^T (..., N) in float32 or wider."""
    dtype = wide(X)
    XD = X.to(dtype) if keep is None else X.to(dtype) * keep.to(dtype)
    return linear(linear(XD, A.to(dtype)) * (scaling * _inv_keep(keep, p)), B.to(dtype))


def lora_linear(
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """Y (..., N) for X (..., K), W (N, K), A (r, K), B (N, r), bias (N,) or None, keep (..., K) or None."""
    return (linear(X, W, bias) + _update(X, A, B, scaling, keep, p)).to(X.dtype)


def lora_linear_stacked(
    X: Tensor,
    W: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    scaling: Sequence[float],
    keep: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, ...]:
    """Y_p (..., N_p) for each projection p of one X, all with the same mask."""
    projections = zip(W, A, B, bias, scaling, strict=True)
    return tuple(lora_linear(X, w, a, b, one, s, keep, p) for w, a, b, one, s in projections)


def lora_mlp(
    X: Tensor,
    W: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    scaling: Sequence[float],
    keep_x: Tensor | None = None,
    keep_h: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """Y (..., N) = down(silu(gate(X)) * up(X)) for the operands of (gate, up, down)."""
    G, U = lora_linear_stacked(X, W[:2], A[:2], B[:2], bias[:2], scaling[:2], keep_x, p)
    return lora_linear(silu(G) * U, W[2], A[2], B[2], bias[2], scaling[2], keep_h, p)


def weight_norm(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The norm of each row of W + s B A, (N,), in float32 or wider; it is detached from autograd."""
    dtype = wide(W, A, B)
    W, A, B = (T.detach().to(dtype) for T in (W, A, B))
    with no_autocast(W.device.type):
        return torch.linalg.vector_norm(W + scaling * (B @ A), dim=1).detach()


def dora_linear(
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    m: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """Y (..., N) = g * (X W^T + s X A^T B^T) + bias with g = m / norm, without dropout.

    With dropout X W^T + bias + (g-1)/(1-p) (D*X) W^T + g s/(1-p) (D*X) A^T B^T.
    """
    dtype = wide(X)
    g, update = (m / norm).to(dtype), _update(X, A, B, scaling, keep, p)
    if keep is None:
        Y = g * (linear(X, W) + update)
        return (Y if bias is None else Y + bias).to(X.dtype)
    rescaled = linear(X * keep.to(X.dtype), W).to(dtype) * _inv_keep(keep, p)
    return (linear(X, W, bias) + (g - 1) * rescaled + g * update).to(X.dtype)


def embedding_update(
    ids: Tensor, A: Tensor, B: Tensor, scaling: float, padding_idx: int | None, dtype: torch.dtype
) -> Tensor:
    """s A[:, ids]^T B^T (*ids.shape, N) in ``dtype``, for A (r, vocab), B (N, r)."""
    return linear(embedding(ids, A.to(dtype).t(), padding_idx), B.to(dtype) * scaling)


def lora_embedding(
    ids: Tensor,
    W: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: Sequence[float],
    base_scale: float | Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """Y (*ids.shape, N) = base_scale * W[ids] + sum over updates of s A[:, ids]^T B^T."""
    Y = embedding(ids, W)
    Y = Y if base_scale is None else Y * base_scale
    for a, b, s in zip(A, B, scaling, strict=True):
        Y = Y + embedding_update(ids, a, b, s, padding_idx, wide(W, a))
    return Y.to(W.dtype)


def lora_conv(
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    scaling: float,
    geometry: Geometry,
    mask: Mask | None = None,
) -> Tensor:
    """Y (M, N, *out) = conv(X, W) + bias + s (conv1x1(conv(D*X, A), B) / (1-p) + lora_bias); B is (N, r/groups)."""
    dtype, (stride, padding, dilation, groups) = wide(X), geometry
    none, ones = [0] * len(stride), [1] * len(stride)
    XD, factor = X.to(dtype), scaling
    if mask is not None:
        if mask.philox or is_compiling() or batched(mask.seed):
            keep = conv_keep_mask(mask._replace(philox=True), X)
        else:
            keep = in_thread(
                conv_keep_mask, mask._replace(seed=bare(mask.seed)), torch.empty(X.shape, dtype=X.dtype, device="meta")
            )
        keep = keep.to(dtype)
        XD, factor = XD * keep, scaling * _inv_keep(keep, mask.p)
    convolution = torch.ops.aten.convolution
    base = convolution(X, W, bias, stride, padding, dilation, False, none, groups)
    XA = convolution(XD, A.to(dtype), None, stride, padding, dilation, False, none, 1)
    point = B.to(dtype).reshape(*B.shape, *ones)
    update = convolution(XA * factor, point, None, ones, none, ones, False, none, groups)
    if lora_bias is not None:
        update = update + (lora_bias.to(dtype) * scaling).reshape(-1, *ones)
    return (base + update).to(X.dtype)


def multi_lora_linear(X: Tensor, W: Tensor, slots: Slots, ids: Tensor, bias: Tensor | None) -> Tensor:
    """Y (M, N) for X (M, K) and ids (M,): each row with its own adapter or none. The ids are read on the host."""
    Y, rows = linear(X, W, bias), [torch.tensor([], dtype=torch.int64, device=X.device)]
    made = [_update(X[:0], slots.A, slots.B, 1.0, None, 0.0)]  # without rows: connects Y to A and B in every case
    for own, first, r, scaling in _owners(slots, ids):
        rows.append(torch.tensor(own, device=X.device))
        A, B = slots.A[first : first + r], slots.B[:, first : first + r]
        made.append(_update(X.index_select(0, rows[-1]), A, B, scaling, None, 0.0))
    return Y.to(made[0].dtype).index_add(0, torch.cat(rows), torch.cat(made)).to(X.dtype)


def _owners(slots: Slots, ids: Tensor) -> list[tuple[list[int], int, int, float]]:
    """(rows, first rank, rank, scaling) for each slot in the ids; not cached."""
    starts, ranks, scalings = map(bare, slots[2:5])
    held = places(Slots(slots.A, slots.B, starts, ranks, scalings, slots.max_rank))
    rows = defaultdict[int, list[int]](list)
    for row, slot in enumerate(bare(ids).tolist()):
        if 0 <= slot < len(held) and held[slot][1]:
            rows[slot].append(row)
    return [(own, *held[slot]) for slot, own in rows.items()]
