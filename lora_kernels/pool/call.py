"""One call of a pool's model: its inputs by name, and the dimensions that can count the requests."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

# Names of inputs that are not text. If the model's main input is text, the items of these inputs are not requests.
MEDIA = re.compile(r"(^|[._])(pixel|image|video|input_features|audio)", re.IGNORECASE)
Dims = tuple[int, ...]  # (0,) or (1,): the dimension of the requests; (0, 1): a request is a token


def tensors_of(args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for each tensor, also in lists, tuples and dicts. ``names``: of the positional arguments."""
    given = [(names[i] if i < len(names) else f"args.{i}", value) for i, value in enumerate(args)]
    for name, value in (*given, *kwargs.items()):
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, list | tuple):
            yield from tensors_of((), {f"{name}.{i}": item for i, item in enumerate(value)}, ())
        elif isinstance(value, dict):
            yield from tensors_of((), {f"{name}.{key}": item for key, item in value.items()}, ())


class Call:
    """args, kwargs: arguments of the model. media: its image, audio and video inputs, if it reads text. main: the other
    tensors. numbers: arguments that are lists of numbers, such as lengths, and may decide where rows are; with
    ``single`` also single numbers."""

    def __init__(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        names: Sequence[str],
        reads_media: bool,
        single: bool = False,
    ) -> None:
        self.args, self.kwargs, self.names = args, kwargs, names
        self.main, self.media = dict[str, Tensor](), dict[str, Tensor]()
        for name, tensor in tensors_of(args, kwargs, names):
            (self.main if reads_media or not _is_media(name) else self.media)[name] = tensor
        others = [value for value in (*args, *kwargs.values()) if not (value is None or isinstance(value, Tensor))]
        self.numbers = tuple(repr(value) for value in others if _are_numbers(value) or (single and _is_number(value)))
        self._views: dict[Dims, tuple[dict[str, int], object]] = {}
        self.probed = False

    def fits(self, dims: Dims, count: int) -> bool:
        """Whether one of the main inputs has ``count`` requests on these dimensions."""
        return any(len_of(tensor, dims) == count for tensor in self.main.values())

    def dims(self, count: int, batch_dim: int | None) -> list[Dims]:
        """The dimensions that can count ``count`` requests; [] if there are none. Inputs (1, n, ...) and (n,) have n
        tokens."""
        options: list[Dims] = [(0,), (1,)] if batch_dim is None else [(batch_dim,)]
        options = [dims for dims in options if self.fits(dims, count)]
        if (0,) not in options and batch_dim != 1 and self.fits((0, 1), count):
            return [(0, 1)]
        return options or [(0, 1)] * self.fits((0, 1), count)

    def view(self, dims: Dims) -> tuple[dict[str, int], object]:
        """(sizes, key) for a RowLayout, from the shapes of the inputs without the dimensions of the requests."""
        made = self._views.get(dims)
        if made is None:
            rest = {
                name: tuple(size for dim, size in enumerate(tensor.shape) if dim not in dims)
                for name, tensor in (*self.main.items(), *self.media.items())
            }
            sizes = {name: left[0] for name, left in rest.items() if left}
            made = self._views[dims] = sizes, (*rest.items(), self.numbers)
        return made

    def shapes(self) -> str:
        """The main inputs' shapes, for a message."""
        return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.main.items()) or "no tensor"


@functools.cache
def _is_media(name: str) -> bool:
    return bool(MEDIA.search(name))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_numbers(value: Any) -> bool:
    """Whether this is a list of numbers, or of such lists."""
    return isinstance(value, list | tuple) and any(_is_number(item) or _are_numbers(item) for item in value)


def len_of(tensor: Tensor, dims: Dims) -> int:
    """The number of requests that a tensor has on these dimensions; 0 if it does not have these dimensions."""
    if tensor.dim() <= dims[-1]:
        return 0
    return tensor.shape[0] * tensor.shape[1] if len(dims) == 2 else tensor.shape[dims[0]]
