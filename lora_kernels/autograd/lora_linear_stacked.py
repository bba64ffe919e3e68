"""The differentiable LoRA linear layers of one input. Saved for backward: X once, XA (M, R), dropout's bits or seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.autograd.call import (
    again,
    bias_of,
    composed,
    derived,
    direct_apply,
    fold_scaling,
    kind_of,
    number_scaling,
    transformed,
    vjp,
)
from lora_kernels.autograd.lora_linear import _check, _rows, dropout_seed
from lora_kernels.errors import ConfigError, ShapeError
from lora_kernels.ops import lora_linear_stacked as ops
from lora_kernels.planning.choose import resolve_backend
from lora_kernels.reference import composition
from lora_kernels.reference.lora_linear_stacked import StackedNeeds


class Projection(NamedTuple):
    """One projection of a shared input: W (N, K) frozen, A (r, K), B (N, r), bias (N,) or None, and its scaling."""

    W: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor | None = None
    scaling: float = 1.0


class _LoRALinearStacked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        X: Tensor,
        scaling: tuple[float, ...],
        p: float,
        seed: Tensor | None,
        backend: str,
        keep_bits: bool,
        *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:
        X2, P = _rows(X), len(scaling)
        W, A, B, bias = (flat[i * P : (i + 1) * P] for i in range(4))
        Y, XA, keep = _forward(X2, W, A, B, bias, scaling, p, seed, backend, keep_bits)
        ctx.save_for_backward(X, XA, seed, keep if keep_bits else None, *W, *A, *B)
        ctx.constants = scaling, p, backend
        if not torch.compiler.is_compiling():  # an output that nobody uses has no gradient, not zeros
            ctx.set_materialize_grads(False)
        return tuple(Y)  # (M, N_p): were they views, autograd would not let them be changed in place

    @staticmethod
    def backward(ctx: Any, *dY: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scaling, p, backend = ctx.constants
        X, XA, seed, keep, *frozen = ctx.saved_tensors
        P = len(scaling)
        W, A, B = (frozen[i * P : (i + 1) * P] for i in range(3))
        need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        need_a, need_b, need_bias = need[P : 2 * P], need[2 * P : 3 * P], need[3 * P :]
        live = [i for i in range(P) if dY[i] is not None]
        dX: Tensor | None = None
        grads: list[list[Tensor | None]] = [[None] * P for _ in range(3)]  # of the A, B and bias
        if live:
            blocks = XA.split_with_sizes([a.shape[0] for a in A], 1)

            def of(values: Sequence[Any]) -> list[Any]:
                return [values[i] for i in live]

            wanted = of(need_a), of(need_b), of(need_bias)
            if again(*of(dY)):
                operands = X, of(W), of(A), of(B), of(scaling), p, seed, backend
                dX, *made = _composed_backward(of(dY), *operands, need_x, wanted)
            else:
                needs = StackedNeeds(need_x, any(wanted[0]), *wanted[1:])
                args = of(W), of(A), of(B), of(blocks), of(scaling), p, seed, keep, needs, backend
                dX, dA, *rest = _backward(of(dY), _rows(X), *args)
                dX = dX if dX is None or X.dim() == 2 else dX.view(X.shape)
                ranks = [A[i].shape[0] for i in live]
                made = [[None] * len(live) if dA is None else dA.split_with_sizes(ranks), *map(list, rest)]
            for place, found, need in zip(grads, made, wanted, strict=True):
                for i, grad, wants in zip(live, found, need, strict=True):
                    place[i] = grad if wants else None
        return dX, None, None, None, None, None, *[None] * P, *grads[0], *grads[1], *grads[2]


_apply = direct_apply(_LoRALinearStacked)


def _forward(X: Tensor, *args: Any) -> tuple[Sequence[Tensor], Tensor, Tensor | None]:
    if torch.compiler.is_compiling():
        W, A, B, bias, scaling, *rest = args
        return torch.ops.lora_kernels.lora_linear_stacked_fwd(
            X, list(W), list(A), list(B), list(bias), list(scaling), *rest
        )
    return ops.lora_linear_stacked_fwd(X, *args)


def _backward(dY: list[Tensor], *args: Any) -> tuple[Any, Any, Sequence[Any], Sequence[Any]]:
    if not torch.compiler.is_compiling():
        return ops.lora_linear_stacked_bwd(dY, *args)
    *operands, needs, backend = args
    dX, dA, dB, dbias = torch.ops.lora_kernels.lora_linear_stacked_bwd(
        dY, *operands, needs.X, needs.A, list(needs.B), list(needs.bias), backend
    )

    def made(grads: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
        return [grad if want else None for grad, want in zip(grads, wanted, strict=True)]

    return dX if needs.X else None, dA if needs.A else None, made(dB, needs.B), made(dbias, needs.bias)


def _composed_backward(
    dY: list[Tensor],
    X: Tensor,
    W: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    scaling: list[float],
    p: float,
    seed: Tensor | None,
    backend: str,
    need_x: bool,
    needs: tuple[list[bool], list[bool], list[bool]],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """dX, the dA_p, dB_p and dbias_p of the projections that have a gradient; all can be differentiated again."""
    P, keep = len(W), composition.keep_mask(X, X.shape[-1], p, seed, backend != "reference")
    bias = [bias_of(need, X, w.shape[0]) for w, need in zip(W, needs[2], strict=True)]

    def function(X: Tensor, *flat: Any) -> tuple[Tensor, ...]:
        Y = composition.lora_linear_stacked(X, W, flat[:P], flat[P : 2 * P], flat[2 * P :], scaling, keep, p)
        return tuple(map(_rows, Y))

    dX, *made = vjp(function, (X, *A, *B, *bias), (need_x, *needs[0], *needs[1], *needs[2]), dY)
    return dX, made[:P], made[P : 2 * P], made[2 * P :]


def prepare(X: Tensor, projections: Sequence[Projection], dropout_p: float) -> tuple[Tensor, Sequence[Projection]]:
    """Cast X and the projections to autocast's dtype if it is enabled, and check that they fit together.

    Raises: FrozenWeightError, ShapeError, ConfigError, as lora_linear_stacked.
    """
    if not projections:
        raise ShapeError("projections is empty; expected one Projection or more")
    device_type = kind_of(X)
    if torch.is_autocast_enabled(device_type) and X.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        X = X.to(dtype)
        projections = [
            q._replace(W=q.W.to(dtype), bias=None if q.bias is None else q.bias.to(dtype)) for q in projections
        ]
    if any(type(q.scaling) is not float for q in projections):
        numbers = [number_scaling(q.A, q.scaling) for q in projections]
        projections = [q._replace(A=A, scaling=s) for q, (A, s) in zip(projections, numbers, strict=True)]
    first = projections[0]
    for W, A, B, bias, _ in projections:
        _check(X, W, A, B, bias)
        if A.dtype != first.A.dtype or B.dtype != first.A.dtype:
            raise ShapeError(
                f"A and B are {A.dtype} and {B.dtype} in one projection, {first.A.dtype} in another; all A and B of "
                "one call must share a dtype"
            )
    if not 0.0 <= dropout_p <= 1.0:
        raise ConfigError(f"dropout_p={dropout_p}; accepted is a probability from 0 to 1")
    return X, projections


def check_mask(dropout_mask: str) -> None:
    """Raise ConfigError unless ``dropout_mask`` is "bits" or "seed"."""
    if dropout_mask not in ("bits", "seed"):
        raise ConfigError(f"dropout_mask={dropout_mask!r}; accepted are 'bits' and 'seed'")


def lora_linear_stacked(
    X: Tensor,
    projections: Sequence[Projection],
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    backend: str = "auto",
    dropout_mask: str = "bits",
) -> tuple[Tensor, ...]:
    """Y_p = X W_p^T + bias_p + scaling_p * dropout(X) A_p^T B_p^T for every projection p of one X.

    One pass over X computes all low-rank activations, and one sum computes dX.

    Args:
        X: (..., K), as in lora_linear.
        projections: one or more, each with its own N, r, scaling, and bias or none; W and bias in X's dtype, all A and
            B in one dtype.
        dropout_p: as in lora_linear, with ONE mask on X for all projections. PEFT draws one for each projection; the
            distribution for each single projection is the same.
        seed, backend, dropout_mask: as in lora_linear. Plans are "triton:eager" and "triton:shrink_extend"; for
            any other plan of lora_linear the planner chooses.

    Returns:
        The Y_p (..., N_p) in X's dtype, in order. With the eager plan and weights that are adjacent in memory, they
        share one buffer (row stride: the sum of the N_p). Gradients flow to X, every A, B, and bias that requires one,
        to any order; an output without a gradient adds no work to the backward.

    Raises:
        FrozenWeightError, ShapeError, BackendUnavailableError, ConfigError: as lora_linear.

    Source: Hu et al., LoRA, arXiv 2106.09685.
    """
    check_mask(dropout_mask)
    if not 0.0 <= dropout_p <= 1.0:
        raise ConfigError(f"dropout_p={dropout_p}; accepted is a probability from 0 to 1")
    p = dropout_p if training else 0.0
    return lora_linear_stacked_unchecked(X, projections, p, seed, backend, dropout_mask == "bits", trusted=False)


def lora_linear_stacked_unchecked(
    X: Tensor,
    projections: Sequence[Projection],
    p: float,
    seed: int | Tensor | None = None,
    backend: str = "auto",
    keep_bits: bool = True,
    trusted: bool = True,
) -> tuple[Tensor, ...]:
    """lora_linear_stacked for layers, p = 0 without dropout; ``trusted`` as in lora_linear_unchecked."""
    device_type = "cpu" if X.is_cpu else kind_of(X)
    checked = not trusted or torch.is_autocast_enabled(device_type)
    if checked:
        X, projections = prepare(X, projections, p)
    backend = resolve_backend(backend, device_type, X.dtype)
    if not checked and backend != "reference":  # kernels do not check their operands
        prepare(X, projections, p)
    state = dropout_seed(seed, X.device) if p > 0.0 else None
    W, A, B, bias, scaling = zip(*projections, strict=True)
    apply = _apply
    if transformed():
        if derived():
            keep = composition.keep_mask(X, X.shape[-1], p, state, backend != "reference")
            return composed(composition.lora_linear_stacked, X, W, A, B, bias, scaling, keep, p)
        A, scaling = zip(*(fold_scaling(q.A, q.scaling) for q in projections), strict=True)
        apply = _LoRALinearStacked.apply
    if torch.is_grad_enabled():
        kept = keep_bits and state is not None and backend != "reference" and X.numel() > 0
        Y = apply(X, scaling, p, state, backend, kept, *W, *A, *B, *bias)
    else:
        Y, _, _ = _forward(X if X.dim() == 2 else _rows(X), W, A, B, bias, scaling, p, state, backend, False)
    return tuple(Y) if X.dim() == 2 else tuple(y.view(*X.shape[:-1], y.shape[-1]) for y in Y)
