"""A frozen linear layer that serves many adapters: every row of its input with its own, or with none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from lora_kernels.autograd.call import batched, derived
from lora_kernels.autograd.multi_lora_linear import multi_lora_linear, run
from lora_kernels.dtypes import low_rank_dtype
from lora_kernels.errors import AdapterPoolError, ShapeError
from lora_kernels.slots import Slots

BUFFERS = ("pool_A", "pool_Bt", "pool_starts", "pool_ranks", "pool_scalings")
HOST = ("pool_slots", "pool_here", "pool_backend", "pool_path")


class Rows:
    """The adapter ids of an open batch, and what they are for the rows that a layer sees.

    ids: int32 (n,), one per sequence or per token, from -1 (no adapter) to capacity - 1. named: the batch made ``ids``
    from names, and frees them at its end. none: no adapter at all, known on the host. uniform: int32 (1,) where all n
    are one adapter.
    """

    def __init__(
        self, ids: Tensor, capacity: int, *, named: bool = False, none: bool = False, uniform: Tensor | None = None
    ) -> None:
        self.ids, self.capacity, self.named, self.none, self.uniform = ids, capacity, named, none, uniform
        self._kept: dict[tuple[int, bool, torch.device], Tensor] = {}
        self._version = 0 if named else -1  # of ids, when they were last looked at

    def of(self, x: Tensor, path: str) -> Tensor:
        """int32 (M,): the slot of each of the M rows of x (..., K), in which sequences follow one another.

        n ids stand for M rows where n = M, and where n divides the rows of a matrix or else the first dimension: each
        id is repeated. A batch of one adapter fits any x.
        Raises ShapeError otherwise, AdapterPoolError where a CUDA graph would keep ids that the batch frees.
        """
        ids, M, device = self.ids, x.shape[:-1].numel(), x.device
        if is_compiling():
            return ids if ids.numel() == M else self._repeated(x, M, path).to(device)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            if self.named:
                raise AdapterPoolError(
                    "a CUDA graph is captured inside a batch of names, whose ids are freed when it ends; keep a tensor "
                    "of your own, fill it by pool.ids(names, out=tensor), and capture inside pool.batch(tensor)"
                )
            return self._repeated(x, M, path).to(device)  # by the graph: a replay finds other ids
        version = -1 if ids.is_inference() else ids._version  # -1: changes cannot be noticed
        if version != self._version or version < 0:
            self._look(version)
        if derived():
            if self.uniform is None and batched(x):
                raise AdapterPoolError(
                    f"{path} is called under torch.func.vmap, which hides a dimension of x; {tuple(x.shape)} does not "
                    f"show which of the batch's {ids.numel()} ids a row has. Open a batch of one adapter, or map over "
                    "lora_kernels.multi_lora_linear with an id for each row"
                )
            return self._repeated(x, M, path).to(device)  # a tensor made under a transform must not outlive it
        key = M, self._fits(x, M), device  # of as many rows x may still be laid out otherwise
        kept = self._kept.get(key)
        if kept is None:
            with torch.inference_mode(False):  # a forward with gradients may be next
                kept = self._kept[key] = self._repeated(x, M, path).to(device)
        return kept

    def _look(self, version: int) -> None:
        """Forget what was made of ids that have changed since; on a CPU, where looking costs little, check them."""
        self._kept.clear()
        self._version = version
        if self.ids.is_cpu and self.ids.numel():
            low, high = (int(end) for end in self.ids.aminmax())
            if low < -1 or high >= self.capacity:
                raise ShapeError(
                    f"adapter ids go from {low} to {high}; accepted are -1 (no adapter) and 0 to {self.capacity - 1}"
                )

    def _fits(self, x: Tensor, M: int) -> bool:
        n = self.ids.numel()
        return n == M or bool(n and M and (M if x.dim() <= 2 else x.shape[0]) % n == 0)

    def _repeated(self, x: Tensor, M: int, path: str) -> Tensor:
        n = self.ids.numel()
        if self._fits(x, M):
            return self.ids if n == M else self.ids.repeat_interleave(M // n)
        if self.uniform is not None:
            return self.uniform.expand(M).contiguous()
        first = M if x.dim() <= 2 else x.shape[0]
        raise ShapeError(
            f"{path} sees x {tuple(x.shape)}, and the batch has {n} adapter ids: {first} rows are no multiple of them. "
            "Give one id per sequence (whose rows follow one another, with their beams) or one per token of every "
            "layer; rows that belong to no sequence can be served for one adapter at a time"
        )


class Here(threading.local):
    """What is open in this thread. A thread starts with nothing open, whatever others do.

    rows: of the innermost open batch. held: the slots that it keeps from being overwritten.
    """

    rows: Rows | None = None
    held: set[int] | None = None


class _Pooled(nn.Module):
    """The pool's side of a layer; the other base class is the frozen layer's own."""

    weight: Tensor
    bias: Tensor | None
    pool_A: Tensor
    pool_Bt: Tensor
    pool_starts: Tensor
    pool_ranks: Tensor
    pool_scalings: Tensor
    pool_slots: Slots
    pool_here: Here
    pool_backend: str
    pool_path: str

    def base_weight(self) -> Tensor:
        """W (N, K)."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """y (..., N) for x (..., K): the base layer's where no batch is open in this thread."""
        rows = self.pool_here.rows
        if rows is None or rows.none:
            return super().forward(x)  # type: ignore[misc]
        W, bias, ids = self.base_weight(), self.bias, rows.of(x, self.pool_path)
        if is_compiling():
            slots = self._slots_now()
        else:
            slots = self.pool_slots
            fits = x.dtype == W.dtype and x.device == W.device and x.shape[-1] == slots.A.shape[1]
            if fits and not W.requires_grad and not torch.is_autocast_enabled(x.device.type):
                return run(x, W, slots, ids, bias, self.pool_backend)
        return multi_lora_linear(x, W, slots, ids.view(x.shape[:-1]), bias, backend=self.pool_backend)

    def _slots_now(self) -> Slots:
        """The buffers; a traced graph reads them so, and not as ``pool_slots``: the shape of a buffer stays."""
        A, Bt, starts, ranks, scalings = (self._buffers[name] for name in BUFFERS)
        return Slots(A, Bt.t(), starts, ranks, scalings, self.pool_slots.max_rank)  # type: ignore[arg-type,union-attr]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Pooled:
        A, Bt, scalings = self.pool_A, self.pool_Bt, self.pool_scalings
        super()._apply(fn, recurse)
        device = self.pool_A.device
        if self.pool_A.dtype == torch.float16:
            self.pool_A, self.pool_Bt = (T.to(device, low_rank_dtype(torch.float16)) for T in (A, Bt))
        self.pool_scalings = scalings.to(device)  # float32 whatever the weight is: an alpha may be 1e6
        self.pool_slots = self._slots_now()
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles are the frozen layer, without the pool."""
        state = {name: value for name, value in vars(self).items() if name not in HOST}
        state["_buffers"] = {name: value for name, value in self._buffers.items() if name not in BUFFERS}
        state["_non_persistent_buffers_set"] = self._non_persistent_buffers_set - set(BUFFERS)
        return _blank, (base_class(self),), state

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise AdapterPoolError(
            "nn.DataParallel runs copies of the model in threads of its own, where no batch is open; use one process a "
            "GPU, each with its own pool"
        )


class PooledLinear(_Pooled, nn.Linear):  # type: ignore[misc]  # mypy: a bias that may be None here and there
    """y[m] = x[m] W^T + bias + s_l x[m] A_l^T B_l^T, l the slot of row m in the batch that is open in this thread.

    An nn.Linear whose class was exchanged by ``into_pooled``: the object, its weight, bias, hooks and state_dict stay.
    The adapters lie in buffers that state_dict leaves out and that are changed in place: ``pool_A`` (max_rank_total, K)
    and ``pool_Bt`` (max_rank_total, N) in low_rank_dtype of the weight's dtype: float32 for float16, which has no place
    for a small B or a large A; ``pool_starts``, ``pool_ranks`` int32 and ``pool_scalings`` float32 (capacity,). ``to``
    and ``half`` move and convert them.
    """


def into_pooled(
    linear: nn.Module, capacity: int, max_rank_total: int, max_rank: int, here: Here, backend: str, path: str
) -> _Pooled:
    """The same object as a pooled layer with empty slots. ``linear``: an nn.Linear, or transformers' Conv1D."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    kind = _pooled_class(type(linear))  # type: ignore[arg-type]  # mypy: a class of modules is not hashable
    N, K = weight.shape if kind is PooledLinear else (weight.shape[1], weight.shape[0])
    with torch.inference_mode(False):

        def zeros(*shape: int, dtype: torch.dtype = weight.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=weight.device)

        starts, ranks = zeros(capacity, dtype=torch.int32), zeros(capacity, dtype=torch.int32)
        scalings = zeros(capacity, dtype=torch.float32)
        adapters = (zeros(max_rank_total, width, dtype=low_rank_dtype(weight.dtype)) for width in (K, N))
        made = *adapters, starts, ranks, scalings
    for name, buffer in zip(BUFFERS, made, strict=True):
        linear.register_buffer(name, buffer, persistent=False)
    linear.__class__ = kind
    assert isinstance(linear, _Pooled)
    linear.pool_here, linear.pool_backend, linear.pool_path = here, backend, path
    linear.pool_slots = Slots(made[0], made[1].t(), starts, ranks, scalings, max_rank)
    return linear


def out_of_pooled(layer: _Pooled) -> None:
    """Turn the layer back into what it was."""
    layer.__class__ = base_class(layer)  # type: ignore[assignment]
    for name in BUFFERS:
        del layer._buffers[name]
        layer._non_persistent_buffers_set.discard(name)
    for name in HOST:
        del vars(layer)[name]


def base_class(layer: _Pooled) -> type[nn.Module]:
    """The frozen layer's own class."""
    return type(layer).__mro__[type(layer).__mro__.index(_Pooled) + 1]


@cache
def _pooled_class(kind: type[nn.Module]) -> type[_Pooled]:
    if kind is nn.Linear:
        return PooledLinear
    return type(f"Pooled{kind.__name__}", (_Transposed, kind), {"__doc__": PooledLinear.__doc__})


class _Transposed(_Pooled):
    """Of a layer that keeps its weight as (K, N)."""

    def base_weight(self) -> Tensor:
        """W (N, K)."""
        return self.weight.t()


def _blank(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)
