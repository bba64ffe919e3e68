"""The differentiable LoRA linear layer. Saved for backward: X and XA (M, r); on Triton also the mask, in bits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lora_kernels import ops
from lora_kernels.autograd.call import (
    again,
    bias_of,
    check_dense,
    check_frozen,
    composed,
    derived,
    direct_apply,
    fold_scaling,
    in_shape,
    kind_of,
    number_scaling,
    transformed,
    vjp,
)
from lora_kernels.errors import ConfigError, ShapeError
from lora_kernels.formats import format_of
from lora_kernels.planning.choose import resolve_backend
from lora_kernels.reference import GradMask, composition

Call = tuple[float, float, str, bool]  # scaling, p, backend, keep_bits: whether the mask's bits stay for the backward


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, X: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, seed: Tensor | None, call: Call
    ) -> Tensor:
        X2 = X if X.dim() == 2 else _rows(X)
        Y, XA, keep = ops.lora_linear_fwd(X2, W, A, B, bias, call[0], call[1], seed, call[2], call[3])
        ctx.save_for_backward(X, W, A, B, XA, seed, keep if call[3] else None)
        ctx.call = call
        return Y if X2 is X else in_shape(Y, *X.shape[:-1], Y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        X, W, A, B, XA, seed, keep = ctx.saved_tensors
        scaling, p, backend, _ = ctx.call
        need_x, _, need_a, need_b, need_bias, *_ = ctx.needs_input_grad
        needs = GradMask(need_x, need_a, need_b, need_bias)
        if again(dY):
            mask = composition.keep_mask(X, X.shape[-1], p, seed, backend != "reference")
            dX, dA, dB, dbias = vjp(
                lambda X, A, B, bias: composition.lora_linear(X, W, A, B, bias, scaling, mask, p),
                (X, A, B, bias_of(need_bias, X, W.shape[0])),
                needs,
                dY,
            )
            return dX, None, dA, dB, dbias, None, None
        X2, shape = X, None
        if X.dim() != 2:
            X2, dY, shape = _rows(X), _rows(dY), X.shape
        dX, dA, dB, dbias = ops.lora_linear_bwd(dY, X2, W, A, B, XA, scaling, p, seed, keep, needs, backend)
        if dX is not None and shape is not None:
            dX = dX.view(shape)
        return dX, None, dA, dB, dbias, None, None


_apply = direct_apply(_LoRALinear)


def _rows(X: Tensor) -> Tensor:
    """X (..., K) as (M, K), without -1, since reshape cannot infer it for an empty batch."""
    return X if X.dim() == 2 else X.reshape(math.prod(X.shape[:-1]), X.shape[-1])


def _check(X: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
    """Raise ShapeError or FrozenWeightError for operands that do not fit together; compares integers only."""
    check_frozen(W)
    check_dense(X)
    N, K = format_of(W).shape(W)
    dtype = X.dtype
    r = A.shape[0] if A.dim() == 2 else 0
    if r < 1 or X.dim() < 1 or X.shape[-1] != K or A.shape[1] != K or B.shape != (N, r):
        raise ShapeError(
            f"X {tuple(X.shape)}, W {tuple(W.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)} do not fit: expected "
            "X (..., K), W (N, K), A (r, K), B (N, r) with r >= 1"
        )
    if bias is not None and bias.shape != (N,):
        raise ShapeError(f"bias has shape {tuple(bias.shape)}; expected ({N},) or None")
    if not (dtype.is_floating_point and A.dtype.is_floating_point and B.dtype.is_floating_point):
        raise ShapeError(f"X {dtype}, A {A.dtype}, B {B.dtype}: expected floating-point tensors")
    if dtype != W.dtype or (bias is not None and bias.dtype != dtype):
        given = f"X is {dtype}, W {W.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise ShapeError(f"{given}; they must share one dtype (only A and B may differ). Cast X, or use torch.autocast")
    device = X.device
    if W.device != device or A.device != device or B.device != device:
        raise ShapeError(f"X is on {device}, W on {W.device}, A on {A.device}, B on {B.device}; expected one device")


def dropout_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """int64 (2,) on ``device``: seed and offset of a keep mask; None draws them from the device's default generator."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.shape != (2,) or seed.dtype != torch.int64 or seed.device != device:
            raise ShapeError(
                f"seed is {seed.dtype} {tuple(seed.shape)} on {seed.device}; expected an int, or int64 (2,) on {device}"
            )
        return seed
    return torch.tensor([seed, 0], dtype=torch.int64, device=device)


def lora_linear(
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    backend: str = "auto",
    dropout_mask: str = "bits",
) -> Tensor:
    """Y = X W^T + bias + scaling * dropout(X) A^T B^T.

    Args:
        X: (..., K), float64 (reference only), float32, float16 or bfloat16; any strides, any number of rows.
        W: (N, K) frozen, in X's dtype.
        A: (r, K), any float dtype, rounded to X's dtype (to float32 if that is float16), as B is; r >= 1.
        B: (N, r), any float dtype.
        bias: (N,) in X's dtype, or None.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r); a run-time value, so no kernel is compiled for it. A
            number, or a tensor of one element, which may be trained.
        dropout_p: probability that an element of the adapter's input is zeroed while ``training``; the rest is scaled
            by 1/(1-p).
        seed: fixes the mask: an int, or an int64 tensor (2,) of seed and offset on X's device. None draws one from
            PyTorch's generator of that device, so torch.manual_seed makes a run repeatable.
        backend: "auto", "reference", "triton" or "triton:PLAN".
        dropout_mask: where the backward of a Triton plan reads the mask: "bits" keeps it at one bit an element (1/16 of
            a 16-bit X), "seed" draws it again and keeps nothing. The reference always draws it again.

    Returns:
        Y (..., N) in X's dtype (under torch.autocast in its dtype). Gradients flow to X, A, B, and to bias if it
        requires one, to any order; see docs/autograd.md.

    Raises:
        FrozenWeightError: W requires a gradient.
        ShapeError: operands that do not fit together.
        BackendUnavailableError: a backend requested by name that cannot run here.
        ConfigError: unknown backend or dropout_mask, dropout_p outside [0, 1], or a scaling that is not a number.

    Source: Hu et al., LoRA, arXiv 2106.09685.
    """
    if not 0.0 <= dropout_p <= 1.0:
        raise ConfigError(f"dropout_p={dropout_p}; accepted is a probability from 0 to 1")
    if dropout_mask not in ("bits", "seed"):
        raise ConfigError(f"dropout_mask={dropout_mask!r}; accepted are 'bits' and 'seed'")
    p = dropout_p if training else 0.0
    return lora_linear_unchecked(X, W, A, B, bias, scaling, p, seed, backend, dropout_mask == "bits", trusted=False)


def lora_linear_unchecked(
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    seed: int | Tensor | None,
    backend: str,
    keep_bits: bool,
    trusted: bool = True,
) -> Tensor:
    """lora_linear for layers: positional arguments, p = 0 without dropout.

    ``trusted``: skip validation (the layer validated its operands when it was built). On the reference backend
    PyTorch's own checks detect later changes, and the validation then explains the error. For kernels, which have no
    checks, it runs at every call.
    """
    if type(scaling) is not float:
        A, scaling = number_scaling(A, scaling)
    device_type = "cpu" if X.is_cpu else kind_of(X)  # X.device.type takes 0.3 us
    if torch.is_autocast_enabled(device_type) and X.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        X, W = X.to(dtype), W.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    backend = resolve_backend(backend, device_type, X.dtype)
    if not trusted or backend != "reference" or W.requires_grad:
        _check(X, W, A, B, bias)
    state = dropout_seed(seed, X.device) if p > 0.0 else None
    apply = _apply
    if transformed():
        if derived():
            keep = composition.keep_mask(X, X.shape[-1], p, state, backend != "reference")
            return composed(composition.lora_linear, X, W, A, B, bias, scaling, keep, p)
        A, scaling = fold_scaling(A, scaling)
        apply = _LoRALinear.apply
    try:
        if torch.is_grad_enabled():
            kept = keep_bits and state is not None and backend != "reference" and X.numel() > 0
            return apply(X, W, A, B, bias, state, (scaling, p, backend, kept))
        X2 = X if X.dim() == 2 else _rows(X)
        Y = ops.lora_linear_fwd(X2, W, A, B, bias, scaling, p, state, backend)[0]
    except (RuntimeError, IndexError):
        _check(X, W, A, B, bias)
        raise
    return Y if X2 is X else Y.view(*X.shape[:-1], Y.shape[-1])
