"""Helpers of the differentiable functions: how an autograd.Function is called, and when a composition replaces kernels.

Kernels compute values, and PyTorch cannot differentiate them. In four cases an operator is evaluated by its composition
of PyTorch's own operations instead (reference/composition.py): a gradient is differentiated again (create_graph=True),
a gradient is mapped over (is_grads_batched, jacobian(vectorize=True)), a transform of torch.func is active, or
forward-mode differentiation is active. ``transformed`` tests this for the forward, ``again`` for a backward, whose
composition ``vjp`` evaluates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from lora_kernels.errors import ConfigError, FrozenWeightError, ShapeError
from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.reference.transforms import batched, derived, no_autocast

__all__ = [
    "again",
    "batched",
    "bias_of",
    "check_dense",
    "check_frozen",
    "composed",
    "derived",
    "direct_apply",
    "fold_scaling",
    "in_shape",
    "is_compiling",
    "keep_inputs",
    "kept_inputs",
    "kind_of",
    "number_scaling",
    "transformed",
    "vjp",
]

_transforms_active = torch._C._are_functorch_transforms_active
_has_storage = torch._C._has_storage


def transformed() -> bool:
    """Whether torch.compile traces, a transform of torch.func is active, or a level of forward-mode differentiation.

    If ``derived``, the caller runs the composition; while torch.compile traces, it runs function.apply.
    """
    return is_compiling() or _transforms_active() or forward_ad._current_level >= 0


def again(*dY: Tensor) -> bool:
    """Whether a backward's gradients are themselves differentiated or mapped over; then ``vjp`` computes them.

    A dY that is mapped over (a batch of gradients in one tensor) has no storage of its own.
    """
    if is_compiling():
        return False
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or not all(map(_has_storage, dY))


def composed(function: Callable[..., Any], X: Tensor, *args: Any) -> Any:
    """function(X, *args) with autocast off, for a composition whose operands are already in autocast's dtype."""
    with no_autocast(X.device.type):
        return function(X, *args)


def vjp(
    function: Callable[..., Any],
    operands: Sequence[Tensor | None],
    needs: Sequence[bool],
    dY: Tensor | Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients of function(*operands), a composition, with output gradient dY; for operands that ``needs`` marks.

    The operands are saved inputs of the forward. With gradients enabled the results can be differentiated with respect
    to all operands and dY, to any order. Each operand is replaced by a view, so that no gradient flows from one operand
    to another from which it was computed.
    """
    graph, given = torch.is_grad_enabled(), [dY] if isinstance(dY, Tensor) else dY
    with torch.enable_grad(), no_autocast(given[0].device.type):
        own = [
            None if T is None else T.view_as(T) if graph else T.detach().requires_grad_(need)
            for T, need in zip(operands, needs, strict=True)
        ]
        Y = function(*own)
    wanted = [T for T, need in zip(own, needs, strict=True) if need and T is not None]
    pairs = [(y, dy) for y, dy in zip([Y] if isinstance(Y, Tensor) else Y, given, strict=True) if y.requires_grad]
    grads: Iterator[Tensor] = iter(())
    if wanted:
        made, of = zip(*pairs, strict=True)
        grads = iter(torch.autograd.grad(made, wanted, of, create_graph=graph, materialize_grads=True))
    return [next(grads) if need else None for need in needs]


def keep_inputs(ctx: Any, *inputs: Tensor | None) -> None:
    """Keep parameters that only ``vjp`` reads. They are not saved tensors, since saved-tensor hooks would copy them."""
    if not is_compiling():
        ctx.inputs = inputs, [T._version for T in inputs if T is not None and not T.is_inference()]


def kept_inputs(ctx: Any) -> tuple[Any, ...]:
    """The inputs of ``keep_inputs``. Raises RuntimeError, as for saved tensors, if one was changed in place since."""
    inputs, versions = ctx.inputs
    if versions != [T._version for T in inputs if T is not None and not T.is_inference()]:
        raise RuntimeError(
            "a parameter was changed in place after the forward, and the second derivative needs its old value; run "
            "the forward again after the change, or make the change out of place"
        )
    return inputs


def bias_of(need: bool, X: Tensor, N: int, dtype: torch.dtype | None = None) -> Tensor | None:
    """A zero bias (N,) as operand of ``vjp``: no gradient depends on the values of the bias. None if not ``need``."""
    return torch.zeros(N, dtype=dtype or X.dtype, device=X.device, requires_grad=True) if need else None


def check_frozen(W: Tensor) -> None:
    """Raise FrozenWeightError if W requires a gradient and no transform of torch.func is active."""
    if W.requires_grad and not _transforms_active():
        raise FrozenWeightError(
            "W requires a gradient; this layer trains A and B over a frozen base. Call W.requires_grad_(False), or "
            "pass W.detach()"
        )


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply without the 2 us of Python that it spends on functorch's wrappers even if there are none.

    For use where ``transformed()`` is False.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def fold_scaling(A: Tensor, scaling: float) -> tuple[Tensor, float]:
    """(scaling * A, 1.0), for use while torch.compile traces.

    An autograd.Function and an operator take a float as a constant of the graph and are compiled again for each value;
    a product with a tensor is compiled a second time for the second value, and never again. A float16 A becomes
    float32, since the product may leave float16's range.
    """
    return A.to(low_rank_dtype(A.dtype)) * scaling, 1.0


def number_scaling(A: Tensor, scaling: Any) -> tuple[Tensor, float]:
    """(A, scaling) with a scaling that is a number. If scaling is a tensor of one element, (scaling * A, 1.0): its
    gradient flows through the product, and the host does not wait for a GPU.

    Raises ShapeError for any other tensor, ConfigError for anything else that is not a real number.
    """
    if isinstance(scaling, Tensor):
        if scaling.numel() != 1 or scaling.is_complex():
            raise ShapeError(
                f"scaling is a tensor {tuple(scaling.shape)} of {scaling.dtype}; accepted are a number and a real "
                "tensor of one element"
            )
        return A.to(low_rank_dtype(A.dtype)) * scaling.reshape(()), 1.0
    if type(scaling) is not int and not isinstance(scaling, Real):
        raise ConfigError(f"scaling = {scaling!r}; accepted are a real number and a tensor of one element")
    return A, float(scaling)


def check_dense(X: Tensor) -> None:
    """Raise ShapeError for a nested or sparse input, or one of another layout than torch.strided."""
    if X.is_nested or X.layout is not torch.strided:
        given = "a nested tensor" if X.is_nested else f"of layout {X.layout}"
        remedy = "to_padded_tensor, or call the layer on the values" if X.is_nested else "to_dense"
        raise ShapeError(f"X is {given}; expected a dense tensor (torch.strided). Convert it ({remedy})")


def kind_of(X: Tensor) -> str:
    """The device type for autocast and the choice of the backend: "cpu" for a tensor on the meta device."""
    return "cpu" if X.is_meta else X.device.type


def in_shape(Y: Tensor, *shape: int) -> Tensor:
    """Y in another shape, for the last line of an autograd.Function's forward.

    Autograd forbids in-place changes of a view that a forward returns (``y = layer(x); y += x``); this is not a view.
    """
    return torch.ops.aten._unsafe_view.default(Y, shape)
