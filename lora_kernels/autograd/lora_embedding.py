"""The differentiable LoRA embedding. Saved for backward: ids (M,) and, for each update, B and XA (r, M)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_kernels.autograd.call import (
    again,
    check_dense,
    check_frozen,
    composed,
    derived,
    direct_apply,
    fold_scaling,
    in_shape,
    is_compiling,
    keep_inputs,
    kept_inputs,
    number_scaling,
    vjp,
)
from lora_kernels.errors import ShapeError
from lora_kernels.reference import composition
from lora_kernels.reference.lora_embedding import lora_embedding_bwd, lora_embedding_fwd

Update = tuple[Tensor, Tensor, float | Tensor]
"""A (r, vocab), B (N, r) and scaling: a number, or a tensor of one element."""


class _LoRAEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, W: Tensor, call: tuple[Any, ...], scalings: tuple[float, ...], *adapters: Tensor
    ) -> Tensor:
        base_scale, padding_idx = call
        rows, Bs = ids.reshape(ids.numel()), adapters[1::2]
        updates = list(zip(adapters[::2], Bs, scalings, strict=True))
        Y, gathered = lora_embedding_fwd(rows, W, updates, base_scale)
        ctx.save_for_backward(rows, *Bs, *gathered)
        keep_inputs(ctx, *adapters[::2])
        ctx.call = scalings, W.shape[0], padding_idx
        return in_shape(Y, *ids.shape, Y.shape[1])

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scalings, vocab, padding_idx = ctx.call
        ids, *saved = ctx.saved_tensors
        L, composes = len(scalings), again(dY)
        dY = dY.reshape(ids.numel(), dY.shape[-1])
        grads: list[Tensor | None] = [None] * 4
        for i, scaling in enumerate(scalings):
            B, XA = saved[i::L]
            needs = ctx.needs_input_grad[4 + 2 * i], ctx.needs_input_grad[5 + 2 * i]
            if composes:
                A = kept_inputs(ctx)[i]
                dtype = composition.wide(dY, A)
                update = partial(
                    composition.embedding_update, ids, scaling=scaling, padding_idx=padding_idx, dtype=dtype
                )
                grads += vjp(update, (A, B), needs, dY.to(dtype))
            else:
                grads += lora_embedding_bwd(dY, ids, B, XA, scaling, vocab, padding_idx, needs)
        return tuple(grads)


_apply = direct_apply(_LoRAEmbedding)


def _check(ids: Tensor, W: Tensor, updates: Sequence[Update]) -> None:
    check_frozen(W)
    check_dense(ids)
    if ids.dtype not in (torch.int64, torch.int32):
        raise ShapeError(f"ids are {ids.dtype}; expected int64 or int32")
    if W.dim() != 2 or not W.dtype.is_floating_point:
        raise ShapeError(f"W is {W.dtype} {tuple(W.shape)}; expected a floating-point (vocab, N)")
    vocab, N = W.shape
    for A, B, _ in updates:
        r = A.shape[0] if A.dim() == 2 else 0
        if r < 1 or A.shape[1] != vocab or B.shape != (N, r):
            raise ShapeError(
                f"W {tuple(W.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)} do not fit: expected W (vocab, N), "
                "A (r, vocab), B (N, r) with r >= 1"
            )
        if A.dtype != B.dtype or not A.dtype.is_floating_point:
            raise ShapeError(f"A is {A.dtype}, B {B.dtype}; expected one floating-point dtype")
        if not W.device == A.device == B.device == ids.device:
            raise ShapeError(f"ids are on {ids.device}, W on {W.device}, A on {A.device}, B on {B.device}")


def lora_embedding(
    ids: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    more: Sequence[Update] = (),
    padding_idx: int | None = None,
    base_scale: float | Tensor | None = None,
) -> Tensor:
    """Y = base_scale * W[ids] + scaling * A[:, ids]^T B^T.

    Args:
        ids: int64 or int32 of any shape, including ().
        W: (vocab, N) frozen, float64, float32, float16 or bfloat16.
        A: (r, vocab), any float dtype: the update is computed in the wider of A's and W's and rounded once, together
            with the base, also under torch.autocast.
        B: (N, r) in A's dtype.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r): a number, or a tensor of one element.
        more: further adapters of the same layer, each A, B and scaling.
        padding_idx: an id whose column of A receives no gradient; Y and dB use its row, as in PEFT.
        base_scale: for embeddings that scale their rows (Gemma's); the update is not scaled.

    Returns:
        Y (*ids.shape, N) in W's dtype. Gradients flow to A and B, to any order.

    Raises:
        FrozenWeightError: W requires a gradient.
        ShapeError: operands that do not fit together, ids that are no integers.
        IndexError: an id outside the vocabulary (on a GPU a device-side assertion), as in PyTorch's embedding.
    """
    updates = [(A, B, scaling), *more]
    _check(ids, W, updates)
    if padding_idx is not None:
        vocab = W.shape[0]
        if not -vocab <= padding_idx < vocab:
            raise ShapeError(f"padding_idx={padding_idx} lies outside a vocabulary of {vocab}")
        padding_idx %= vocab
    composes = derived()
    traced = not composes and is_compiling()
    scalings: list[float] = []
    adapters: list[Tensor] = []
    for a, b, s in updates:
        b, scaling = (b, s) if type(s) is float else number_scaling(b, s)
        if traced:  # a number would be a constant of the graph: compiled again for each value
            b, scaling = fold_scaling(b, scaling)
        adapters += [a, b]
        scalings.append(scaling)
    if composes:
        return composed(
            composition.lora_embedding, ids, W, adapters[::2], adapters[1::2], scalings, base_scale, padding_idx
        )
    if torch.is_grad_enabled():
        apply = _LoRAEmbedding.apply if traced else _apply
        return apply(ids, W, (base_scale, padding_idx), tuple(scalings), *adapters)
    rows = ids.reshape(ids.numel())
    Y, _ = lora_embedding_fwd(rows, W, list(zip(adapters[::2], adapters[1::2], scalings, strict=True)), base_scale)
    return Y.view(*ids.shape, Y.shape[1])
