"""LoRA on one convolution in 1, 2 or 3 dimensions, forward and backward.

For X (M, C, *in), W (N, C/groups, *k), A (r, C, *k), B (N, r/groups), with conv(., .) of the base's stride, padding and
dilation, of one group where the filter is A:

    XA  = conv(D*X, A)                                    (M, r, *out)   saved
    Y   = conv(X, W) + bias + s lora_bias + cB XA         (M, N, *out)   cB at every place of out: a 1x1 convolution
    dXA = cB^T dY                                         (M, r, *out)
    dX  = conv'(dY, W) + D * conv'(dXA, A)                (M, C, *in)    conv' the convolution's own transpose
    dA  = conv''(D*X, dXA), the gradient of A's convolution by its filter
    dB  = c sum over samples and places of dY XA^T        (N, r/groups)
    dbias = sum of dY, dlora_bias = s dbias               (N,)

D is the 0/1 keep mask of inverted dropout on the adapter's input, s the scaling, c = s/(1-p). c enters through cB, as
small as the adapter, and into dB. XA, dXA, A and cB are in low_rank_dtype(X.dtype). Group g of B reads the
g-th r/groups channels of XA. Y is allocated once, and so is dX: the update is added to the base's in place.
Source: Hu et al., LoRA, arXiv 2106.09685, equation 3, with the layout of PEFT's convolutions.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.reference.dropout import generator_keep_mask, philox_keep_mask

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Geometry(NamedTuple):
    """Geometry of the base's convolution, one number a dimension; A's is the same with one group."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


class ConvNeeds(NamedTuple):
    """The gradients that a backward call computes."""

    X: bool = True
    A: bool = True
    B: bool = True
    bias: bool = False
    lora_bias: bool = False


class Mask(NamedTuple):
    """How a keep mask is drawn: channels last if X is, and by Philox in a compiled graph."""

    seed: Tensor
    p: float
    channels_last: bool = False
    philox: bool = False


def keep_mask(mask: Mask, X: Tensor) -> Tensor:
    """0 and 1 in X's shape (M, C, *in) and dtype, the same for the same mask and shape."""
    shape = (X.shape[0], *X.shape[2:], X.shape[1]) if mask.channels_last else tuple(X.shape)
    rows, columns = shape[0], math.prod(shape[1:])
    if mask.philox:
        keep = philox_keep_mask(mask.seed, mask.p, rows, columns).to(X.dtype)
    else:
        keep = generator_keep_mask(mask.seed, mask.p, rows, columns, X.dtype)
    keep = keep.view(shape)
    return keep.movedim(-1, 1) if mask.channels_last else keep


def is_channels_last(T: Tensor) -> bool:
    """Whether T's channels are adjacent in memory, and its places are not."""
    layout = CHANNELS_LAST.get(T.dim())
    return layout is not None and not T.is_contiguous() and T.is_contiguous(memory_format=layout)


def _columns(T: Tensor, groups: int, channels_last: bool) -> Tensor:
    """T (M, channels, *out) as matrices (batch, channels/groups, places): M*groups, if channels last groups of them."""
    width = T.shape[1] // groups
    if channels_last:
        rows = T.movedim(1, -1)
        return rows.reshape(math.prod(rows.shape[:-1]), groups, width).permute(1, 2, 0)
    return T.reshape(T.shape[0] * groups, width, math.prod(T.shape[2:]))


def _factor(scaling: float, mask: Mask | None) -> float:
    """c = s/(1-p); 0 if everything is dropped."""
    if mask is None:
        return scaling
    return 0.0 if mask.p >= 1.0 else scaling / (1.0 - mask.p)


def _per_matrix(B: Tensor, factor: float, batch: int, groups: int, dtype: torch.dtype) -> Tensor:
    """factor * B (N, r/groups) for each of the ``batch`` matrices of ``_columns``: (batch, N/groups, r/groups)."""
    scaled = (B.to(torch.promote_types(B.dtype, torch.float32)) * factor).to(dtype)
    by_group = scaled.view(groups, B.shape[0] // groups, B.shape[1])
    samples = batch // groups
    return by_group.expand(samples, *by_group.shape).reshape(batch, *by_group.shape[1:])


def _conv(X: Tensor, W: Tensor, bias: Tensor | None, geometry: Geometry, groups: int) -> Tensor:
    stride, padding, dilation, _ = geometry
    none = [0] * len(stride)
    return torch.ops.aten.convolution(X, W, bias, stride, padding, dilation, False, none, groups)


def lora_conv_fwd(
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    scaling: float,
    geometry: Geometry,
    mask: Mask | None = None,
) -> tuple[Tensor, Tensor]:
    """Y (M, N, *out) in X's dtype and XA (M, r, *out) in low_rank_dtype(X.dtype), to which A and B are rounded."""
    groups, dtype = geometry.groups, low_rank_dtype(X.dtype)
    XD = X if mask is None else X * keep_mask(mask, X)
    with nullcontext() if dtype == X.dtype else torch.autocast(X.device.type, enabled=False):
        XA = _conv(XD.to(dtype), A.to(dtype), None, geometry, 1)
    del XD
    if lora_bias is not None:
        added = lora_bias.to(torch.promote_types(lora_bias.dtype, torch.float32)) * scaling
        bias = (added if bias is None else bias + added).to(X.dtype)
    Y = _conv(X, W, bias, geometry, groups)
    channels_last = is_channels_last(Y)
    if not channels_last:
        Y = Y.contiguous()
    y = _columns(Y, groups, channels_last)
    up, xa = _per_matrix(B, _factor(scaling, mask), y.shape[0], groups, dtype), _columns(XA, groups, channels_last)
    if dtype == X.dtype:
        y.baddbmm_(up, xa)
    else:
        y.add_(_matmul(up, xa))
    return Y, XA


def _matmul(P: Tensor, Q: Tensor) -> Tensor:
    """P Q for each matrix of a batch, by an in-place product: autocast narrows the operands of all other products."""
    return P.new_empty(P.shape[0], P.shape[1], Q.shape[2]).baddbmm_(P, Q, beta=0)


def lora_conv_bwd(
    dY: Tensor,
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    XA: Tensor,
    scaling: float,
    geometry: Geometry,
    mask: Mask | None = None,
    needs: ConvNeeds = ConvNeeds(),  # noqa: B008  (immutable)
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dX (M, C, *in), dA (r, C, *k) in A's dtype, dB (N, r/groups) in B's, dbias in dY's and dlora_bias (N,) in
    float32 or wider; None for each that ``needs`` excludes."""
    dX = dA = dB = dbias = dlora_bias = None
    groups = geometry.groups
    channels_last = is_channels_last(dY)
    if not channels_last:
        dY = dY.contiguous()
    dy = _columns(dY, groups, channels_last)
    factor = _factor(scaling, mask)
    keep = None if mask is None or not (needs.X or needs.A) else keep_mask(mask, X)
    dtype = low_rank_dtype(X.dtype)
    dy = dy.to(dtype)
    if needs.X or needs.A:
        dxa = _matmul(_per_matrix(B, factor, dy.shape[0], groups, dtype).mT, dy)
        if channels_last:
            dXA = dxa.permute(2, 0, 1).reshape(XA.shape[0], *XA.shape[2:], XA.shape[1]).movedim(-1, 1)
        else:
            dXA = dxa.view(XA.shape)
        if needs.A:
            XD = X if keep is None else X * keep
            dA = _conv_backward(dXA, XD.to(dtype), A.to(dtype), geometry, 1, of_filter=True).to(A.dtype)
            del XD
        if needs.X:
            dX = _conv_backward(dY, X, W, geometry, groups, of_filter=False)
            like_x = X if dtype == X.dtype else torch.empty_like(X, dtype=dtype)  # only its shape is used
            update = _conv_backward(dXA, like_x, A.to(dtype), geometry, 1, of_filter=False)
            dX = dX.add_(update) if keep is None else dX.addcmul_(update, keep)
    if needs.B:
        dB = _filter_gradient(dy, _columns(XA, groups, channels_last), groups).mul_(factor)
        dB = dB.reshape(B.shape).to(B.dtype)
    if needs.bias or needs.lora_bias:
        total = dY.sum([d for d in range(dY.dim()) if d != 1], dtype=torch.promote_types(dY.dtype, torch.float32))
        dbias = total.to(dY.dtype) if needs.bias else None
        dlora_bias = total * scaling if needs.lora_bias else None
    return dX, dA, dB, dbias, dlora_bias


def _conv_backward(dY: Tensor, X: Tensor, W: Tensor, geometry: Geometry, groups: int, *, of_filter: bool) -> Tensor:
    """The gradient of conv(X, W) by W, or by X."""
    stride, padding, dilation, _ = geometry
    none = [0] * len(stride)
    masks = [not of_filter, of_filter, False]
    made = torch.ops.aten.convolution_backward(dY, X, W, None, stride, padding, dilation, False, none, groups, masks)
    return made[1] if of_filter else made[0]


def _filter_gradient(dy: Tensor, xa: Tensor, groups: int) -> Tensor:
    """sum over samples of dy xa^T: (groups, N/groups, r/groups), summed in float32 (float64 for float64)."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    return _matmul(dy, xa.mT).view(-1, groups, dy.shape[1], xa.shape[1]).sum(0, dtype=wide)
