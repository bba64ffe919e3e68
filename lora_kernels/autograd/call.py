"""What the differentiable functions share: how an autograd.Function is called, and what runs where kernels cannot.

Kernels compute values. Where a gradient is to be differentiated again (create_graph=True), where it is mapped over
(is_grads_batched, jacobian(vectorize=True)), under the transforms of torch.func and under forward-mode
differentiation, an operator is evaluated by its composition of PyTorch's own operations instead
(reference/composition.py): the forward by ``transformed``, a backward by ``again`` and ``vjp``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from lora_kernels.dtypes import low_rank_dtype
from lora_kernels.errors import ConfigError, FrozenWeightError, ShapeError
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

    The composition is right where ``derived``, and function.apply while torch.compile traces.
    """
    return is_compiling() or _transforms_active() or forward_ad._current_level >= 0


def again(*dY: Tensor) -> bool:
    """Whether a backward's gradients are differentiated themselves, or mapped over: then ``vjp`` makes them.

    A gradient that is mapped over (a batch of them in one tensor) has no storage of its own.
    """
    if is_compiling():
        return False
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or not all(map(_has_storage, dY))


def composed(function: Callable[..., Any], X: Tensor, *args: Any) -> Any:
    """function(X, *args), a composition; its operands are in autocast's dtype already."""
    with no_autocast(X.device.type):
        return function(X, *args)


def vjp(
    function: Callable[..., Any],
    operands: Sequence[Tensor | None],
    needs: Sequence[bool],
    dY: Tensor | Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients for dY of function(*operands), a composition, for the operands that ``needs`` marks.

    Operands are saved inputs of the forward; with gradients enabled the results can be differentiated by all of them
    and by dY, to any order. Each operand is a view of its own, so that no gradient passes from one to another that was
    computed from it.
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
    """Keep parameters that only ``vjp`` reads, not as saved tensors: saved-tensor hooks would copy them each time."""
    if not is_compiling():
        ctx.inputs = inputs, [T._version for T in inputs if T is not None and not T.is_inference()]


def kept_inputs(ctx: Any) -> tuple[Any, ...]:
    """What ``keep_inputs`` kept; raises RuntimeError, as a saved tensor would, where one was changed in place since."""
    inputs, versions = ctx.inputs
    if versions != [T._version for T in inputs if T is not None and not T.is_inference()]:
        raise RuntimeError(
            "a parameter that this gradient's own gradient depends on was changed in place after the forward; run the "
            "forward again after the change, or make the change out of place"
        )
    return inputs


def bias_of(need: bool, X: Tensor, N: int, dtype: torch.dtype | None = None) -> Tensor | None:
    """An operand of ``vjp`` for a bias (N,) that is not saved: no gradient depends on its values. None without need."""
    return torch.zeros(N, dtype=dtype or X.dtype, device=X.device, requires_grad=True) if need else None


def check_frozen(W: Tensor) -> None:
    """Raise FrozenWeightError where W requires a gradient and no transform of torch.func differentiates by it."""
    if W.requires_grad and not _transforms_active():
        raise FrozenWeightError(
            "W requires a gradient; this layer trains A and B over a frozen base. Call W.requires_grad_(False), or "
            "pass W.detach()"
        )


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply past the 2 us of Python that it spends on functorch's wrappers, whether there are any or not.

    For use where ``transformed()`` is False.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def fold_scaling(A: Tensor, scaling: float) -> tuple[Tensor, float]:
    """(scaling * A, 1.0), for use while torch.compile traces.

    An autograd.Function and an operator take a float as a constant of the graph and are compiled again for each value;
    a product with a tensor is compiled a second time for the second value, and never again. A float16 A becomes
    float32, whose range the product needs.
    """
    return A.to(low_rank_dtype(A.dtype)) * scaling, 1.0


def number_scaling(A: Tensor, scaling: Any) -> tuple[Tensor, float]:
    """A and a scaling that is a number. A tensor of one element goes into A: its gradient flows through the product,
    and no GPU is waited for.

    Raises ShapeError for any other tensor, ConfigError for what is no real number.
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
    """Raise ShapeError for an input that is not one block of memory which strides describe."""
    if X.is_nested or X.layout is not torch.strided:
        given = "a nested tensor" if X.is_nested else f"of layout {X.layout}"
        remedy = "to_padded_tensor, or call the layer on the values" if X.is_nested else "to_dense"
        raise ShapeError(f"X is {given}; expected a dense tensor (torch.strided). Convert it ({remedy})")


def kind_of(X: Tensor) -> str:
    """The device type by which autocast and the backend are chosen: the CPU's for a tensor on the meta device."""
    return "cpu" if X.is_meta else X.device.type


def in_shape(Y: Tensor, *shape: int) -> Tensor:
    """Y in another shape, for the last line of an autograd.Function's forward.

    What it returns as a view may not be changed in place by whoever called it (``y = layer(x); y += x``); this is none.
    """
    return torch.ops.aten._unsafe_view.default(Y, shape)
