"""The differentiable LoRA linear layer. Saved for backward: X and XA (M, r); on Triton also the mask, in bits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels import ops
from lora_kernels.errors import ConfigError, FrozenWeightError, ShapeError
from lora_kernels.formats import format_of
from lora_kernels.plan import resolve_backend
from lora_kernels.reference import Needs


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        X: Tensor,
        W: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        scaling: float,
        p: float,
        seed: Tensor | None,
        backend: str,
        keep_bits: bool,
    ) -> Tensor:
        X2 = _rows(X)
        Y, XA, keep = _forward(X2, W, A, B, bias, scaling, p, seed, backend, keep_bits)
        ctx.save_for_backward(X2, W, A, B, XA, seed, keep if keep_bits else None)
        ctx.constants = scaling, p, backend
        ctx.shape = X.shape
        return Y if X.dim() == 2 else Y.view(*X.shape[:-1], Y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        X, W, A, B, XA, seed, keep = ctx.saved_tensors
        scaling, p, backend = ctx.constants
        need_x, _, need_a, need_b, need_bias, *_ = ctx.needs_input_grad
        needs = Needs(need_x, need_a, need_b, need_bias)
        dY = _rows(dY)
        if torch.compiler.is_compiling():
            made = torch.ops.lora_kernels.lora_linear_bwd(
                dY, X, W, A, B, XA, scaling, p, seed, keep, list(needs), backend
            )
            grads = tuple(grad if need else None for grad, need in zip(made, needs, strict=True))
        else:
            grads = ops.lora_linear_bwd(dY, X, W, A, B, XA, scaling, p, seed, keep, needs, backend)
        dX, dA, dB, dbias = grads
        if dX is not None and len(ctx.shape) != 2:
            dX = dX.view(ctx.shape)
        return dX, None, dA, dB, dbias, None, None, None, None, None


def _rows(X: Tensor) -> Tensor:
    """X (..., K) as (M, K); no -1, which an empty batch cannot infer."""
    return X if X.dim() == 2 else X.reshape(math.prod(X.shape[:-1]), X.shape[-1])


def _forward(X: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    if torch.compiler.is_compiling():
        return torch.ops.lora_kernels.lora_linear_fwd(X, *args)
    return ops.lora_linear_fwd(X, *args)


def _check(X: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
    """Raise where the operands do not fit together; costs some comparisons of integers."""
    if W.requires_grad:
        raise FrozenWeightError(
            "W requires a gradient; this layer trains A and B over a frozen base. Call W.requires_grad_(False), or "
            "pass W.detach()"
        )
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
    """int64 (2,) on ``device``: seed and offset of a keep mask; for None drawn from the device's default generator."""
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
        A: (r, K), any float dtype; r from 1 up.
        B: (N, r), any float dtype.
        bias: (N,) in X's dtype, or None.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r); a run-time value, nothing is compiled for it.
        dropout_p: probability that an element of the adapter's input is zeroed while ``training``; the rest is scaled
            by 1/(1-p).
        seed: fixes the mask: an int, or an int64 tensor (2,) of seed and offset on X's device. None draws one from
            PyTorch's generator of that device, so torch.manual_seed makes a run repeatable.
        backend: "auto", "reference", "triton" or "triton:PLAN".
        dropout_mask: how the backward of a Triton plan knows the mask: "bits" keeps it at one bit an element (1/16 of a
            16-bit X), "seed" draws it again and keeps nothing. The reference always draws it again.

    Returns:
        Y (..., N) in X's dtype (under torch.autocast in its dtype). Gradients flow to X, A, B, and to bias where it
        asks for one; they can be taken once, not twice.

    Raises:
        FrozenWeightError: W requires a gradient.
        ShapeError: operands that do not fit together.
        BackendUnavailableError: a backend asked for by name that cannot run here.
        ConfigError: unknown backend or dropout_mask, or dropout_p outside [0, 1].

    Source: Hu et al., LoRA, arXiv 2106.09685.
    """
    device_type = X.device.type
    if torch.is_autocast_enabled(device_type) and X.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        X, W = X.to(dtype), W.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(X, W, A, B, bias)
    if not 0.0 <= dropout_p <= 1.0:
        raise ConfigError(f"dropout_p={dropout_p}; accepted is a probability from 0 to 1")
    if dropout_mask not in ("bits", "seed"):
        raise ConfigError(f"dropout_mask={dropout_mask!r}; accepted are 'bits' and 'seed'")
    backend = resolve_backend(backend, device_type, X.dtype)
    state = dropout_seed(seed, X.device) if training and dropout_p > 0.0 else None
    if torch.is_grad_enabled():
        keep_bits = state is not None and dropout_mask == "bits" and backend.startswith("triton") and X.numel() > 0
        return _LoRALinear.apply(X, W, A, B, bias, scaling, dropout_p, state, backend, keep_bits)
    Y, _, _ = _forward(_rows(X), W, A, B, bias, scaling, dropout_p, state, backend, False)
    return Y if X.dim() == 2 else Y.view(*X.shape[:-1], Y.shape[-1])
