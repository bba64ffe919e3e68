"""What the differentiable functions share: how an autograd.Function is called, and how a graph gets its scaling."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lora_kernels.errors import ConfigError, ShapeError

_transforms_active = torch._C._are_functorch_transforms_active


def transformed() -> bool:
    """Whether torch.compile traces or a transform of torch.func is active: then only function.apply is right."""
    return is_compiling() or _transforms_active()


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply past the 2 us of Python that it spends on functorch's wrappers, whether there are any or not.

    For use where ``transformed()`` is False.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def fold_scaling(A: Tensor, scaling: float) -> tuple[Tensor, float]:
    """(scaling * A, 1.0), for use while torch.compile traces.

    An autograd.Function and an operator take a float as a constant of the graph and are compiled again for each value;
    a product with a tensor is compiled a second time for the second value, and never again.
    """
    return A * scaling, 1.0


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
        return A * scaling.reshape(()), 1.0
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
