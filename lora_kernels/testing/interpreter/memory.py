"""Memory and order in Triton's interpreter: what a GPU lets pass in silence raises here.

Every address that a kernel loads, stores or updates must be an element of a tensor passed to that launch; for a strided
view the gaps between its rows count as outside. Programs can run in a shuffled order: a result that changes with it is
a race between programs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

Method = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class _Region:
    """The memory that one tensor argument opens to a launch: bytes [start, stop), or a lattice of elements in it.

    lattice holds (stride, size) in elements, largest stride first; None where every element between start and stop
    belongs to the tensor, or where overlapping strides leave no more to say.
    """

    name: str
    start: int
    stop: int
    itemsize: int
    lattice: tuple[tuple[int, int], ...] | None

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> "_Region":
        dims = sorted(
            ((st, n) for n, st in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and st), reverse=True
        )
        reach = 1
        nested = True
        for stride, size in reversed(dims):
            nested = nested and stride >= reach
            reach += stride * (size - 1)
        elements = int(np.prod([size for _, size in dims], dtype=np.int64))
        start, itemsize = tensor.data_ptr(), tensor.element_size()
        return cls(
            name, start, start + reach * itemsize, itemsize, tuple(dims) if nested and elements < reach else None
        )

    def holds(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Whether each access of `size` bytes lies in the region; bool of the addresses' shape."""
        inside = (addresses >= self.start) & (addresses + size <= self.stop)
        if self.lattice is None or size != self.itemsize:
            return inside
        element, misaligned = np.divmod(addresses - self.start, self.itemsize)
        for stride, count in self.lattice:
            index = element // stride
            inside &= index < count
            element = element - index * stride
        return inside & (element == 0) & (misaligned == 0)


@dataclasses.dataclass
class _State:
    installed: bool = False
    bounds: bool = True
    seed: int = 0
    regions: list[_Region] = dataclasses.field(default_factory=list)
    permutation: tuple[Any, np.ndarray] = (None, np.empty(0, dtype=np.int64))


_state = _State()


def order(seed: int) -> None:
    """Sets the order of programs in later launches: 0 for the grid's own, otherwise shuffled by the seed."""
    _state.seed = seed


def check_memory(*, bounds: bool = True) -> None:
    """Patches Triton's interpreter with the checks of this module; `interpreter.install` calls it."""
    _state.bounds = bounds
    if _state.installed:
        return
    _state.installed = True
    wrap_method(InterpreterBuilder, "create_masked_load", _checked("load", pointers_at=0, mask_at=1))
    wrap_method(InterpreterBuilder, "create_masked_store", _checked("store", pointers_at=0, mask_at=2))
    wrap_method(InterpreterBuilder, "create_atomic_rmw", _checked("atomic", pointers_at=1, mask_at=3))
    wrap_method(InterpreterBuilder, "create_atomic_cas", _checked("atomic", pointers_at=0, mask_at=None))
    wrap_method(InterpreterBuilder, "set_grid_idx", _set_grid_idx)
    wrap_method(GridExecutor, "__call__", _launch)


def wrap_method(owner: Any, name: str, wrap: Callable[[Method], Method]) -> None:
    """owner.name becomes wrap(owner.name); AttributeError where Triton has no such method any more."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(wrap(original)))


def _check(pointers: TensorHandle, mask: np.ndarray | None, access: str) -> None:
    if not _state.bounds:
        return
    addresses = pointers.data
    if mask is not None:
        addresses, mask = np.broadcast_arrays(addresses, mask)
        addresses = addresses[mask.astype(bool)]  # `and` of a tensor and a scalar condition leaves integers
    if not addresses.size:
        return
    addresses = addresses.astype(np.int64)
    size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
    lowest, highest = int(addresses.min()), int(addresses.max()) + size
    reachable = [region for region in _state.regions if region.start < highest and lowest < region.stop]
    for region in reachable:
        if region.lattice is None and region.start <= lowest and highest <= region.stop:
            return
    legal = np.zeros(addresses.shape, dtype=bool)
    for region in reachable:
        legal |= region.holds(addresses, size)
    if not legal.all():
        raise IndexError(_complaint(addresses[~legal], addresses.size, access))


def _complaint(illegal: np.ndarray, lanes: int, access: str) -> str:
    first = int(illegal.flat[0])
    message = f"out of bounds {access} in {illegal.size} of {lanes} lanes"
    if not _state.regions:
        return f"{message}: the launch was given no memory"
    near = min(_state.regions, key=lambda region: max(region.start - first, first - region.stop, 0))
    where = f"element {(first - near.start) // near.itemsize} of {near.name}"
    return f"{message}, first at {where}, which spans {(near.stop - near.start) // near.itemsize}"


def _checked(access: str, pointers_at: int, mask_at: int | None) -> Callable[[Method], Method]:
    """Wraps a memory operation of the interpreter, whose pointers and mask are its arguments of these positions."""

    def wrap(original: Method) -> Method:
        def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
            mask = None if mask_at is None else args[mask_at]
            _check(args[pointers_at], mask.data if isinstance(mask, TensorHandle) else mask, access)
            return original(self, *args, **kwargs)

        return checked

    return wrap


def _regions(name: str, value: Any) -> Iterator[_Region]:
    if isinstance(value, torch.Tensor):
        if value.numel():
            yield _Region.of(name, value)
    elif isinstance(value, (TensorWrapper, TensorDescriptor)):
        yield from _regions(name, value.base)
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _regions(f"{name}[{i}]", item)


def _launch(original: Method) -> Method:
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        named = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        _state.regions = [region for name, value in named for region in _regions(name, value)]
        original(self, *args, **kwargs)

    return call


def _set_grid_idx(original: Method) -> Method:
    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        if _state.seed:
            nx, ny, nz = self.grid_dim
            key = (_state.seed, nx, ny, nz)
            if _state.permutation[0] != key:
                _state.permutation = key, np.random.default_rng(_state.seed).permutation(nx * ny * nz)
            program = int(_state.permutation[1][(x * ny + y) * nz + z])
            x, y, z = program // (ny * nz), program // nz % ny, program % nz
        original(self, x, y, z)

    return set_grid_idx
