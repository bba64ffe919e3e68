"""LoRA on one embedding, forward and backward, for ids (M,), W (vocab, N), A (r, vocab), B (N, r).

    XA  = A[:, ids]                          (r, M)     saved
    Y   = W[ids] + XA^T (sB)^T               (M, N)
    dYB = dY (sB)                            (M, r)
    dA[:, v] = sum of dYB over ids == v      (r, vocab) 0 for v = padding_idx
    dB  = s dY^T XA^T                        (N, r)

s is the scaling; it enters through sB, which is as small as the adapter, and into dB. No (vocab, N) update is made, and
Y is allocated once: the base's rows, to which the update is added in place. Products of a float16 adapter are
float32, since sB and dYB leave float16's range.
Source: Hu et al., LoRA, arXiv 2106.09685, equation 3, for an input of one-hot rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.reference.products import CHUNK, wide_mm


def _scaled(B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """scaling * B in ``dtype``, rounded once."""
    return (B.to(torch.promote_types(B.dtype, torch.float32)) * scaling).to(dtype)


def _add_product(Y: Tensor, XA: Tensor, B: Tensor, scaling: float) -> None:
    """Y (M, N) += XA^T (sB)^T for XA (r, M) and B (N, r), rounded to Y's dtype once.

    In place also because autocast leaves in-place operations alone: the update is as exact under it as without.
    """
    wide = low_rank_dtype(torch.promote_types(Y.dtype, XA.dtype))
    XA, sB = XA.to(wide), _scaled(B, scaling, wide)
    if wide == Y.dtype:
        Y.addmm_(XA.t(), sB.t())
        return
    # on a CPU, convert only as much of Y at a time as fits the cache
    whole = Y.device.type != "cpu" or torch.compiler.is_compiling() or Y.numel() == 0
    rows = Y.shape[0] if whole else max(1, CHUNK // Y.shape[1])
    for y, xa in [(Y, XA)] if whole else zip(Y.split(rows), XA.split(rows, 1), strict=True):
        y.copy_(y.to(wide).addmm_(xa.t(), sB.t()))


def lora_embedding_fwd(
    ids: Tensor, W: Tensor, updates: Sequence[tuple[Tensor, Tensor, float]], base_scale: float | Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Y (M, N) in W's dtype and the XA (r, M) of each update (A, B, scaling) in its A's, for ids (M,).

    ``base_scale`` multiplies W[ids] first. Raises IndexError for an id outside the vocabulary.
    """
    Y = torch.nn.functional.embedding(ids, W)
    if base_scale is not None:
        Y.mul_(base_scale)
    gathered = [A.index_select(1, ids) for A, _, _ in updates]
    for (_, B, scaling), XA in zip(updates, gathered, strict=True):
        _add_product(Y, XA, B, scaling)
    return Y, gathered


def lora_embedding_bwd(
    dY: Tensor,
    ids: Tensor,
    B: Tensor,
    XA: Tensor,
    scaling: float,
    vocab: int,
    padding_idx: int | None = None,
    needs: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """dA (r, vocab) and dB (N, r) in the adapter's dtype, XA's, for dY (M, N); None for each that ``needs`` excludes.

    Deterministic: a CPU adds row by row in the order of ids, elsewhere PyTorch's embedding backward sorts them. Rows of
    a 16-bit adapter are added up in float32 (a padding id may come back a thousand times).
    """
    dA = dB = None
    dY = dY.to(low_rank_dtype(XA.dtype))
    if needs[0]:
        dYB = wide_mm(dY, _scaled(B, scaling, dY.dtype))
        wide = torch.promote_types(dY.dtype, torch.float32)
        if dY.device.type == "cpu":
            dA = torch.zeros(XA.shape[0], vocab, dtype=wide, device=dY.device).index_add_(1, ids, dYB.t().to(wide))
            if padding_idx is not None:
                dA[:, padding_idx] = 0
        else:
            skipped = -1 if padding_idx is None else padding_idx
            rows = torch.ops.aten.embedding_dense_backward(dYB.to(wide), ids, vocab, skipped, False)
            dA = rows.t().contiguous()
        dA = dA.to(XA.dtype)
    if needs[1]:
        dB = wide_mm(dY.t(), XA.t()).to(torch.promote_types(B.dtype, torch.float32)).mul_(scaling).to(B.dtype)
    return dA, dB
