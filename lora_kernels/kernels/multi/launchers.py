"""Launch sequences and tiles of the plans of a linear layer with mixed batches. Imports Triton.

    XA[m]  = s_l X[m] A_l^T       Y[m]  = X[m] W^T + bias + XA[m, :r_l] B_l^T        l = ids[m]
    dYB[m] = s_l dY[m] B_l        dX[m] = dY[m] W + dYB[m] A_l        dA_l, dB_l: sums over the rows of l

eager   the vendor's library for the base, a pass over the rows with adapters for XA, another for Y += XA B_l^T
extend  that first pass, then one GEMM whose accumulator starts with XA B_l^T: two launches forward
decode  the whole forward in one launch that reads W once, up to 64 rows; returns no XA, so it has no backward
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.kernels.chip import Chip
from lora_kernels.kernels.multi.decode import multi_decode
from lora_kernels.kernels.multi.extend import multi_expand_add_, multi_extend
from lora_kernels.kernels.multi.grads import multi_grads
from lora_kernels.kernels.multi.shrink import multi_shrink
from lora_kernels.kernels.multi.tiles import (
    multi_decode_config,
    multi_expand_config,
    multi_extend_config,
    multi_grads_config,
    multi_shrink_config,
    multi_spans,
)
from lora_kernels.kernels.tiles import wide_loads
from lora_kernels.operands.slots import Slots

PLANS = ("eager", "extend", "decode")


def multi_lora_linear_fwd(
    X: Tensor,
    W: Tensor,
    slots: Slots,
    ids: Tensor,
    bias: Tensor | None,
    plan: str,
    chip: Chip,
    tiles: Any = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Y (M, N), in ``out`` if given, and XA (M, max_rank) by ``plan``; X (M, K), ids int32 (M,), M > 0.

    decode accepts up to 64 rows and returns no XA. ``tiles``: the configuration of the plan's main product; None
    uses the default of tiles.py.
    """
    assert plan in PLANS, f"no plan {plan!r}"
    M, N, dtype, ids = X.shape[0], W.shape[0], X.dtype, ids.contiguous()
    if plan == "decode":
        tiles = tiles or multi_decode_config(M, N, X.shape[1], dtype, chip, wide_loads(X, W, slots.A))
        return multi_decode(X, W, slots, ids, bias, tiles, chip.units, out), None
    XA = _shrink(X, slots.A, slots, ids, chip)
    wide = wide_loads(X, W, slots.B)
    if plan == "extend":
        tiles = tiles or multi_extend_config(M, N, dtype, chip, slots.max_rank, wide)
        return multi_extend(X, W, XA, slots.B, slots, ids, bias, tiles, out), XA
    if out is None:
        out = torch.nn.functional.linear(X, W, bias)
    elif bias is None:
        torch.mm(X, W.t(), out=out)
    else:
        torch.addmm(bias, X, W.t(), out=out)
    tiles = tiles or multi_expand_config(M, N, dtype, chip, slots.max_rank, wide_loads(out, slots.B))
    return multi_expand_add_(out, XA, slots.B, slots, ids, tiles), XA


def multi_lora_linear_bwd(
    dY: Tensor,
    X: Tensor,
    W: Tensor,
    slots: Slots,
    ids: Tensor,
    XA: Tensor | None,
    needs: Sequence[bool],
    plan: str,
    chip: Chip,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dX (M, K), dA (R, K), dB (N, R), dbias (N,) by ``plan``; None for each that ``needs`` (X, A, B, bias) excludes.

    XA (M, max_rank) is the forward's; only dB uses it. M > 0.
    """
    assert plan in ("eager", "extend"), f"no backward by plan {plan!r}"
    need_x, need_a, need_b, need_bias = needs
    (M, K), dtype, ids = X.shape, X.dtype, ids.contiguous()
    dX = dA = dB = dYB = None
    if need_x or need_a:
        dYB = _shrink(dY, slots.B.t(), slots, ids, chip)
    if need_x and dYB is not None:
        wide = wide_loads(dY, W, slots.A)
        if plan == "extend":
            tiles = multi_extend_config(M, K, dtype, chip, slots.max_rank, wide)
            dX = multi_extend(dY, W.t(), dYB, slots.A.t(), slots, ids, None, tiles)
        else:
            dX = dY @ W
            tiles = multi_expand_config(M, K, dtype, chip, slots.max_rank, wide_loads(dX, slots.A))
            multi_expand_add_(dX, dYB, slots.A.t(), slots, ids, tiles)
    if need_a or need_b:
        spans = multi_spans(M, W.shape[0], K, slots.A.shape[0], chip)
        config = multi_grads_config(M, dtype, chip, slots.max_rank)
        dA, dB = multi_grads(dY, X, XA if need_b else None, dYB if need_a else None, slots, ids, config, spans)
    return dX, dA, dB, dY.sum(0) if need_bias else None


def _shrink(P: Tensor, Q: Tensor, slots: Slots, ids: Tensor, chip: Chip) -> Tensor:
    """s_l P[m] Q_l^T (M, max_rank)."""
    config = multi_shrink_config(P.shape[0], P.dtype, chip, slots.max_rank, wide_loads(P, Q))
    return multi_shrink(P, Q, slots, ids, config)
