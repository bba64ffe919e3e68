"""The differentiable linear layer with many adapters. Saved for backward: X and XA (M, max_rank)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels import ops
from lora_kernels.autograd.call import (
    again,
    batched,
    bias_of,
    check_frozen,
    composed,
    derived,
    direct_apply,
    in_shape,
    is_compiling,
    transformed,
    vjp,
)
from lora_kernels.errors import ShapeError
from lora_kernels.formats import format_of
from lora_kernels.operands.slots import Slots
from lora_kernels.planning.multi_plan import resolve
from lora_kernels.reference import GradMask, composition
from lora_kernels.reference.multi_infer import rows_of

Packed = tuple[Tensor | Sequence[Tensor], Tensor | Sequence[Tensor], Sequence[int] | None, Sequence[float] | float]


class _MultiLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, X: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, ids: Tensor, slots: Slots, call: str
    ) -> Tensor:
        X2 = X if X.dim() == 2 else X.reshape(ids.shape[0], X.shape[-1])
        slots = slots._replace(A=A, B=B)
        Y, XA = ops.multi_lora_linear_fwd(X2, W, slots, ids, bias, True, call)
        ctx.save_for_backward(X, W, A, B, slots.starts, slots.ranks, slots.scalings, ids, XA)
        ctx.call, ctx.max_rank = call, slots.max_rank
        return Y if X2 is X else in_shape(Y, *X.shape[:-1], Y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        X, W, A, B, starts, ranks, scalings, ids, XA = ctx.saved_tensors
        need_x, _, need_a, need_b, need_bias, *_ = ctx.needs_input_grad
        slots = Slots(A, B, starts, ranks, scalings, ctx.max_rank)
        needs = GradMask(need_x, need_a, need_b, need_bias)
        if again(dY):
            dX, dA, dB, dbias = vjp(
                lambda X, A, B, bias: _composed(X, W, slots._replace(A=A, B=B), ids, bias),
                (X, A, B, bias_of(need_bias, X, W.shape[0])),
                needs,
                dY,
            )
            return dX, None, dA, dB, dbias, None, None, None
        X2, shape = X, None
        if X.dim() != 2:
            X2, shape = X.reshape(ids.shape[0], X.shape[-1]), X.shape
            dY = dY.reshape(ids.shape[0], dY.shape[-1])
        dX, dA, dB, dbias = ops.multi_lora_linear_bwd(dY, X2, W, slots, ids, XA, needs, ctx.call)
        if dX is not None and shape is not None:
            dX = dX.view(shape)
        return dX, None, dA, dB, dbias, None, None, None


_apply = direct_apply(_MultiLoRALinear)


def _composed(X: Tensor, W: Tensor, slots: Slots, ids: Tensor, bias: Tensor | None) -> Tensor:
    """Y (..., N) by the composition, for X (..., K) and ids (M,)."""
    Y = composition.multi_lora_linear(X.reshape(ids.shape[0], X.shape[-1]), W, slots, ids, bias)
    return Y.reshape(*X.shape[:-1], Y.shape[-1])


def check_slots(slots: Slots, N: int, K: int, device: torch.device) -> None:
    """Raise ShapeError if ``slots`` do not fit a layer W (N, K) on ``device``; reads no tensor values."""
    A, B, starts, ranks, scalings, max_rank = slots
    R = A.shape[0] if A.dim() == 2 else -1
    if R < 0 or A.shape[1] != K or B.shape != (N, R):
        raise ShapeError(
            f"A {tuple(A.shape)}, B {tuple(B.shape)} beside W ({N}, {K}) do not fit: expected A (R, {K}) and B ({N}, R)"
        )
    if not (A.dtype.is_floating_point and B.dtype.is_floating_point):
        raise ShapeError(f"A {A.dtype}, B {B.dtype}: expected floating-point tensors")
    L = starts.shape[0] if starts.dim() == 1 else -1
    for name, T, dtype in (
        ("starts", starts, torch.int32),
        ("ranks", ranks, torch.int32),
        ("scalings", scalings, torch.float32),
    ):
        if T.shape != (L,) or T.dtype != dtype:
            raise ShapeError(f"{name} is {T.dtype} {tuple(T.shape)}; expected {dtype} (L,), one of each for every slot")
        if not T.is_contiguous():  # kernels assume stride 1
            raise ShapeError(f"{name} has stride {T.stride(0)}; expected contiguous numbers: pass {name}.contiguous()")
    if not 0 <= max_rank <= R:
        raise ShapeError(f"max_rank={max_rank} with A of {R} rows; expected 0 to {R}")
    for name, T in zip(("A", "B", "starts", "ranks", "scalings"), slots[:5], strict=True):
        if T.device != device:
            raise ShapeError(f"{name} is on {T.device}, X on {device}; expected one device")


def token_ids(ids: Tensor, X: Tensor, L: int) -> Tensor:
    """int32 (M,): the slot of each row of X (..., K) from ids of X's leading shape, or of its first dimension only.

    Raises:
        ShapeError: another shape, dtype or device; on a CPU also an id that is not a slot. On other devices such an id
            is not detected, and its row gets only the base output.
    """
    rows = X.shape[:-1]
    if ids.dtype not in (torch.int32, torch.int64):
        raise ShapeError(f"adapter_ids are {ids.dtype}; expected int32 (or int64): a slot, or -1 for none")
    if not is_compiling() and batched(ids):
        raise ShapeError(
            "torch.func.vmap maps over adapter_ids, but the host reads their values; pass X with all its rows and one "
            "id for each row"
        )
    if ids.device != X.device:
        raise ShapeError(f"adapter_ids are on {ids.device}, X on {X.device}; expected one device")
    if ids.shape != rows:
        if ids.dim() != 1 or not rows or ids.shape[0] != rows[0]:
            raise ShapeError(
                f"adapter_ids have shape {tuple(ids.shape)}, X {tuple(X.shape)}; expected one id a token, "
                f"{tuple(rows)}" + (f", or one a sequence, ({rows[0]},)" if len(rows) > 1 else "")
            )
        ids = ids.view(-1, *(1,) * (len(rows) - 1)).expand(rows)
    if ids.is_cpu and not torch.compiler.is_compiling() and ids.numel():
        low, high = rows_of(ids).bounds
        if low < -1 or high >= L:
            raise ShapeError(f"adapter_ids go from {low} to {high}; accepted are -1 (no adapter) and 0 to {L - 1}")
    ids = ids if ids.dim() == 1 else ids.reshape(-1)  # the same tensor if possible: its values are cached
    return ids if ids.dtype == torch.int32 else ids.to(torch.int32)


def _autocast(X: Tensor, W: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in autocast's dtype, if it is enabled."""
    device_type = "cpu" if X.is_cpu else X.device.type
    if not torch.is_autocast_enabled(device_type) or X.dtype == torch.float64:
        return X, W, bias
    dtype = torch.get_autocast_dtype(device_type)
    return X.to(dtype), W.to(dtype), None if bias is None else bias.to(dtype)


def multi_lora_linear(
    X: Tensor,
    W: Tensor,
    adapters: Slots | Packed,
    adapter_ids: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Y[m] = X[m] W^T + bias + s_l X[m] A_l^T B_l^T with l = adapter_ids[m]: each token uses its own adapter, or none.

    Args:
        X: (..., K), float64 (reference only), float32, float16 or bfloat16; any number of tokens.
        W: (N, K) frozen, in X's dtype.
        adapters: lora_kernels.Slots, or (A, B, ranks, scalings) as Slots.of takes them: packed A (R, K) and B (N, R)
            with the rank of each adapter, or a list of A (r_l, K), a list of B (N, r_l) and None.
        adapter_ids: int32 (int64 is converted), one a token in X's leading shape, or one for each of its first
            dimension; -1 for none. A slot of rank 0 also gives only the base output.
        bias: (N,) in X's dtype, or None.
        backend: "auto", "reference", "triton", "cuda", "cpp", or a plan: "triton:eager", "triton:extend",
            "triton:decode".

    Returns:
        Y (..., N) in X's dtype (under torch.autocast in its dtype). Gradients flow to X, to the adapters, and to bias
        if it requires one, to any order. Those of an adapter depend only on its own tokens.

    Raises:
        FrozenWeightError: W requires a gradient.
        ShapeError: operands that do not fit together; on a CPU also ids that are not slots. On a GPU, where a check
            would synchronize with the device, such an id gives its token only the base output.
        BackendUnavailableError: a backend requested by name that cannot run here.

    Source: Chen et al., Punica, arXiv 2310.18547; Hu et al., LoRA, arXiv 2106.09685.
    """
    slots = adapters if isinstance(adapters, Slots) else Slots.of(*adapters)
    check_frozen(W)
    N, K = format_of(W).shape(W)
    if X.dim() < 1 or X.shape[-1] != K:
        raise ShapeError(f"X {tuple(X.shape)} and W ({N}, {K}) do not fit: expected X (..., {K})")
    X, W, bias = _autocast(X, W, bias)
    if bias is not None and bias.shape != (N,):
        raise ShapeError(f"bias has shape {tuple(bias.shape)}; expected ({N},) or None")
    if not X.dtype.is_floating_point or X.dtype != W.dtype or (bias is not None and bias.dtype != X.dtype):
        given = f"X is {X.dtype}, W {W.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise ShapeError(f"{given}; they must share one floating-point dtype. Cast X, or use torch.autocast")
    if W.device != X.device or (bias is not None and bias.device != X.device):
        raise ShapeError(f"X is on {X.device}, W on {W.device}; expected one device for X, W and bias")
    check_slots(slots, N, K, X.device)
    return multi_lora_linear_unchecked(X, W, slots, token_ids(adapter_ids, X, slots.ranks.shape[0]), bias, backend)


def _wants(T: Tensor | None) -> bool:
    return T is not None and T.requires_grad


def multi_lora_linear_unchecked(
    X: Tensor, W: Tensor, slots: Slots, ids: Tensor, bias: Tensor | None, backend: str = "auto"
) -> Tensor:
    """multi_lora_linear for layers that have validated their operands: ids int32 (M,), one a row of X (..., K)."""
    X, W, bias = _autocast(X, W, bias)
    backend = resolve(backend, X.device.type, X.dtype)
    traced = transformed()
    if traced and derived():
        return composed(_composed, X, W, slots, ids, bias)
    if torch.is_grad_enabled() and (traced or any(map(_wants, (X, slots.A, slots.B, bias)))):
        apply = _MultiLoRALinear.apply if traced else _apply
        return apply(X, W, slots.A, slots.B, bias, ids, slots, backend)
    X2 = X if X.dim() == 2 else X.reshape(ids.shape[0], X.shape[-1])
    Y = ops.multi_lora_linear_fwd(X2, W, slots, ids, bias, False, backend)[0]
    return Y if X2 is X else Y.view(*X.shape[:-1], Y.shape[-1])
