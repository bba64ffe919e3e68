"""The differentiable SwiGLU block with LoRA. Saved: X, G, U, the low-rank XA and HA, dropout's bits or seeds; not H."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.autograd.call import (
    again,
    bias_of,
    composed,
    derived,
    fold_scaling,
    in_shape,
    keep_inputs,
    kept_inputs,
    kind_of,
    transformed,
    vjp,
)
from lora_kernels.autograd.lora_linear import _rows, dropout_seed
from lora_kernels.autograd.lora_linear_stacked import Projection, check_mask, prepare
from lora_kernels.errors import ShapeError
from lora_kernels.ops import lora_mlp as ops
from lora_kernels.planning.choose import resolve_backend
from lora_kernels.reference import composition
from lora_kernels.reference.lora_mlp import MLPGrads, MLPNeeds


class _LoRAMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        X: Tensor,
        scaling: tuple[float, ...],
        p: float,
        seeds: Tensor | None,
        backend: str,
        keep_bits: bool,
        *flat: Tensor | None,
    ) -> Tensor:
        X2 = _rows(X)
        W, A, B, bias = (flat[i : i + 3] for i in (0, 3, 6, 9))
        Y, kept = _forward(X2, W, A, B, bias, scaling, p, seeds, backend, keep_bits)
        *made, keep_x, keep_h = kept
        bits = (keep_x, keep_h) if keep_bits else (None, None)
        ctx.save_for_backward(X, *made, seeds, *bits, *W, *A, *B)
        keep_inputs(ctx, *bias[:2])  # the derivatives of silu(G) * U depend on them
        ctx.constants = scaling, p, backend
        return Y if X.dim() == 2 else in_shape(Y, *X.shape[:-1], Y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scaling, p, backend = ctx.constants
        X, G, U, XA, HA, seeds, keep_x, keep_h, *frozen = ctx.saved_tensors
        W, A, B = (frozen[i : i + 3] for i in (0, 3, 6))
        need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        needs = MLPNeeds(need_x, need[3:6], need[6:9], need[9:])
        if again(dY):
            bias = *kept_inputs(ctx), bias_of(need[11], X, W[2].shape[0])
            function = _composition(X, W, scaling, p, seeds, backend)
            dX, *rest = vjp(function, (X, *A, *B, *bias), (need_x, *need[3:]), dY)
            return dX, *[None] * 8, *rest
        ranks = [a.shape[0] for a in A[:2]]
        args = G, U, W, A, B, XA.split_with_sizes(ranks, 1), HA, scaling, p, seeds, keep_x, keep_h, needs, backend
        grads = _backward(_rows(dY), _rows(X), *args)
        dA = [None, None] if grads.A is None else grads.A.split_with_sizes(ranks)
        dA = [grad if need else None for grad, need in zip((*dA, grads.A_down), needs.A, strict=True)]
        dX = grads.X if grads.X is None or X.dim() == 2 else grads.X.view(X.shape)
        return dX, None, None, None, None, None, None, None, None, *dA, *grads.B, *grads.bias


def _composition(
    X: Tensor, W: Sequence[Tensor], scaling: Sequence[float], p: float, seeds: Tensor | None, backend: str
) -> Callable[..., Tensor]:
    """The block as a composition: a function of X, the three A, B and biases. The masks are drawn once, here."""
    seed_x, seed_h = (None, None) if seeds is None else seeds.unbind()
    philox = not backend.startswith("reference")
    keep_x = composition.keep_mask(X, X.shape[-1], p, seed_x, philox)
    keep_h = composition.keep_mask(X, W[0].shape[0], p, seed_h, philox)

    def function(X: Tensor, *flat: Any) -> Tensor:
        return composition.lora_mlp(X, W, flat[:3], flat[3:6], flat[6:], scaling, keep_x, keep_h, p)

    return function


def _forward(X: Tensor, *args: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    if not torch.compiler.is_compiling():
        return ops.lora_mlp_fwd(X, *args)
    Y, *kept = torch.ops.lora_kernels.lora_mlp_fwd(X, *map(list, args[:5]), *args[5:])
    return Y, tuple(kept)


def _backward(dY: Tensor, *args: Any) -> MLPGrads:
    if not torch.compiler.is_compiling():
        return ops.lora_mlp_bwd(dY, *args)
    *operands, needs, backend = args
    dX, dA, dA_down, dB, dbias = torch.ops.lora_kernels.lora_mlp_bwd(
        dY, *operands, needs.X, list(needs.A), list(needs.B), list(needs.bias), backend
    )

    def made(grad: Tensor, need: bool) -> Tensor | None:
        return grad if need else None

    return MLPGrads(
        made(dX, needs.X),
        made(dA, any(needs.A[:2])),
        made(dA_down, needs.A[2]),
        [made(grad, need) for grad, need in zip(dB, needs.B, strict=True)],
        [made(grad, need) for grad, need in zip(dbias, needs.bias, strict=True)],
    )


def _two_seeds(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """int64 (2, 2): seed and offset for the mask of X, and another pair for that of H."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (2, 2), dtype=torch.int64, device=device)
    first = dropout_seed(seed, device)
    return torch.stack((first, first + 1))


def lora_mlp(
    X: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    backend: str = "auto",
    dropout_mask: str = "bits",
) -> Tensor:
    """Y = down(silu(gate(X)) * up(X)), each of the three a LoRA linear layer.

    Saved for the backward: X (M, K) and the outputs of gate and up, (M, F) each; their product is computed again.

    Args:
        X: (..., K), as in lora_linear.
        gate, up: W (F, K), A (r, K), B (F, r), bias (F,) or None, each with its own rank and scaling.
        down: W (N, F), A (r, F), B (N, r), bias (N,) or None. W and bias in X's dtype, all A and B in one dtype.
        dropout_p: as in lora_linear; one mask on X for gate and up, another on the input of down.
        seed: fixes both masks; as in lora_linear.
        backend, dropout_mask: as in lora_linear_stacked.

    Returns:
        Y (..., N) in X's dtype. Gradients flow to X, every A, B, and bias that requires one, to any order.

    Raises:
        FrozenWeightError, ShapeError, BackendUnavailableError, ConfigError: as lora_linear.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202; Hu et al., LoRA, arXiv 2106.09685.
    """
    X, (gate, up) = prepare(X, (gate, up), dropout_p)
    if gate.W.shape != up.W.shape:
        raise ShapeError(f"gate's W is {tuple(gate.W.shape)}, up's {tuple(up.W.shape)}; expected the same shape")
    _, (down,) = prepare(X.new_empty(0, gate.W.shape[0]), (down,), dropout_p)
    if down.A.dtype != gate.A.dtype:
        raise ShapeError(f"A and B of down are {down.A.dtype}, of gate {gate.A.dtype}; expected one dtype")
    check_mask(dropout_mask)
    backend = resolve_backend(backend, kind_of(X), X.dtype)
    seeds = _two_seeds(seed, X.device) if training and dropout_p > 0.0 else None
    operands: Any = zip(gate, up, down, strict=True)
    W, A, B, bias, scaling = operands
    if transformed():
        if derived():
            return composed(_composition(X, W, scaling, dropout_p, seeds, backend), X, *A, *B, *bias)
        A, scaling = zip(*(fold_scaling(q.A, q.scaling) for q in (gate, up, down)), strict=True)
    if torch.is_grad_enabled():
        keep_bits = seeds is not None and dropout_mask == "bits" and backend.startswith("triton") and X.numel() > 0
        return _LoRAMLP.apply(X, scaling, dropout_p, seeds, backend, keep_bits, *W, *A, *B, *bias)
    Y, _ = _forward(_rows(X), W, A, B, bias, scaling, dropout_p, seeds, backend, False)
    return Y.view(*X.shape[:-1], Y.shape[-1])
