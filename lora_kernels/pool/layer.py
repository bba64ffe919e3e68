"""Frozen linear layers that serve many adapters: each row of the input uses one adapter or none."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from lora_kernels.autograd.multi_lora_linear import multi_lora_linear, multi_lora_linear_unchecked
from lora_kernels.errors import AdapterPoolError
from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.operands.slots import Slots
from lora_kernels.pool.active import ActiveBatch
from lora_kernels.pool.batch import OpenBatch
from lora_kernels.pool.ids import with_factors
from lora_kernels.pool.rows import RowLayout

BUFFERS = ("pool_A", "pool_Bt", "pool_starts", "pool_ranks", "pool_scalings", "pool_bias")
HOST = ("pool_slots", "pool_active", "pool_backend", "pool_path", "pool_rows")


class PoolSettings(NamedTuple):
    """The settings of a pool that all its layers share; see AdapterPool for their meaning."""

    capacity: int
    max_rank_total: int
    max_rank: int
    backend: str = "auto"
    lora_bias: bool = False


class _Pooled(nn.Module):
    """The part of a pooled layer that all kinds share; the second base class is the class of the frozen layer."""

    weight: Tensor
    bias: Tensor | None
    pool_A: Tensor
    pool_Bt: Tensor
    pool_starts: Tensor
    pool_ranks: Tensor
    pool_scalings: Tensor
    pool_bias: Tensor | None
    pool_slots: Slots
    pool_active: ActiveBatch
    pool_backend: str
    pool_path: str
    pool_rows: dict[tuple[bool, int], RowLayout]  # key: (an id belongs to a token, x.dim())

    def base_weight(self) -> Tensor:
        """W (N, K)."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Compute y (..., N) for x (..., K). Returns the base layer's output if no batch is open in this context, or
        if no adapter of the batch has weights in this layer."""
        if is_compiling():
            return self._traced(x)
        active = self.pool_active
        batch = active.get()
        if active.generators:
            active.check_generator(batch)
        if batch is None or (self.pool_path not in batch.touched and not _captured(batch, x)):
            return super().forward(x)  # type: ignore[misc]
        ids = batch.of(x, self)
        if ids is None:
            return super().forward(x)  # type: ignore[misc]
        W, bias, slots = self.base_weight(), self.bias, batch.slots(self)
        fits = x.dtype == W.dtype and x.device == W.device and x.shape[-1] == slots.A.shape[1]
        if fits and not W.requires_grad and not torch.is_autocast_enabled(x.device.type):
            y = multi_lora_linear_unchecked(x, W, slots, ids, bias, self.pool_backend)
        else:
            y = multi_lora_linear(x, W, slots, ids.view(x.shape[:-1]), bias, backend=self.pool_backend)
        biases = self._buffers["pool_bias"]
        return y if biases is None else _with_bias(y, biases, ids, slots, batch.virtual)

    def _traced(self, x: Tensor) -> Tensor:
        batch: OpenBatch | None = self.pool_active.thread.batch
        ids = None if batch is None else batch.traced(x, self)
        if batch is None or ids is None:
            return super().forward(x)  # type: ignore[misc]
        slots = self._slots_now() if batch.virtual is None else with_factors(self._slots_now(), *batch.virtual)
        W, shape = self.base_weight(), x.shape[:-1]
        y = multi_lora_linear(x, W, slots, ids.view(shape), self.bias, backend=self.pool_backend)
        biases = self._buffers["pool_bias"]
        return y if biases is None else _with_bias(y, biases, ids, slots, batch.virtual)

    def _slots_now(self) -> Slots:
        """Return the slots from the buffers. A traced graph treats the shape of a buffer as static."""
        A, Bt, starts, ranks, scalings = (self._buffers[name] for name in BUFFERS[:5])
        return Slots(A, Bt.t(), starts, ranks, scalings, self.pool_slots.max_rank)  # type: ignore[arg-type,union-attr]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Pooled:
        A, Bt, scalings, biases = self.pool_A, self.pool_Bt, self.pool_scalings, self.pool_bias
        super()._apply(fn, recurse)
        device = self.pool_A.device
        if self.pool_A.dtype == torch.float16:
            self.pool_A, self.pool_Bt = (T.to(device, low_rank_dtype(torch.float16)) for T in (A, Bt))
        self.pool_scalings = scalings.to(device)  # always float32: lora_alpha may be 1e6
        self.pool_bias = None if biases is None else biases.to(device)
        self.pool_slots = self._slots_now()
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle the frozen layer without the pool."""
        state = {name: value for name, value in vars(self).items() if name not in HOST}
        state["_buffers"] = {name: value for name, value in self._buffers.items() if name not in BUFFERS}
        state["_non_persistent_buffers_set"] = self._non_persistent_buffers_set - set(BUFFERS)
        return _blank, (base_class(self),), state

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise AdapterPoolError(
            "nn.DataParallel runs copies of the model in threads of its own, where no batch is open; use one process a "
            "GPU, each with its own pool"
        )


def _with_bias(y: Tensor, biases: Tensor, ids: Tensor, slots: Slots, virtual: tuple[Tensor, Tensor] | None) -> Tensor:
    """Add s_l b_l to each row of y (..., N) whose id in ``ids`` (M,) is a slot l with an adapter."""
    own = ids.clamp(0, slots.ranks.shape[0] - 1)
    wanted = (ids == own) & (slots.ranks[own] > 0)
    scalings = slots.scalings[own]
    if virtual is not None:  # ids of virtual slots come after the pool's; they use the biases of the original slots
        own = torch.cat([torch.arange(biases.shape[0], device=own.device), virtual[0].to(own.device)])[own]
    update = (biases.index_select(0, own) * scalings[:, None]).masked_fill(~wanted[:, None], 0.0)
    return (y + update.view(y.shape)).to(y.dtype)


def _captured(batch: OpenBatch, x: Tensor) -> bool:
    """Return whether a CUDA graph is captured: it may be replayed after adapters of this layer are loaded."""
    return x.is_cuda and batch.mixed and torch.cuda.is_current_stream_capturing()


class PooledLinear(_Pooled, nn.Linear):  # type: ignore[misc]  # mypy: a bias that may be None here and there
    """y[m] = x[m] W^T + bias + s_l (x[m] A_l^T B_l^T + b_l), l the slot of row m in the open batch.

    ``into_pooled`` changes the class of an nn.Linear to this one; the object, its weight, bias, hooks and state_dict
    stay. The adapters are stored in buffers that are not in state_dict and that are changed in place:
    ``pool_A`` (max_rank_total, K), ``pool_Bt`` (max_rank_total, N): low_rank_dtype of the weight's dtype, which is
        float32 for float16, whose range is too small for a small B or a large A.
    ``pool_starts``, ``pool_ranks`` int32 (capacity,), ``pool_scalings`` float32 (capacity,).
    ``pool_bias`` float32 (capacity, N): b, PEFT's lora_bias; None in a pool without lora_bias.
    ``to`` and ``half`` move and convert them.
    """


def into_pooled(linear: nn.Module, settings: PoolSettings, active: ActiveBatch, path: str) -> _Pooled:
    """Change ``linear`` (an nn.Linear or transformers' Conv1D) into a pooled layer with empty slots; returns it."""
    capacity = settings.capacity
    weight = linear.weight
    assert isinstance(weight, Tensor)
    kind = _pooled_class(type(linear))  # type: ignore[arg-type]  # mypy: a class of modules is not hashable
    N, K = weight.shape if kind is PooledLinear else (weight.shape[1], weight.shape[0])
    with torch.inference_mode(False):

        def zeros(*shape: int, dtype: torch.dtype = weight.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=weight.device)

        starts, ranks = zeros(capacity, dtype=torch.int32), zeros(capacity, dtype=torch.int32)
        scalings = zeros(capacity, dtype=torch.float32)
        A, Bt = (zeros(settings.max_rank_total, width, dtype=low_rank_dtype(weight.dtype)) for width in (K, N))
        made = A, Bt, starts, ranks, scalings, zeros(capacity, N, dtype=torch.float32) if settings.lora_bias else None
    for name, buffer in zip(BUFFERS, made, strict=True):
        linear.register_buffer(name, buffer, persistent=False)
    linear.__class__ = kind
    assert isinstance(linear, _Pooled)
    linear.pool_active, linear.pool_backend, linear.pool_path = active, settings.backend, path
    linear.pool_rows = {}
    linear.pool_slots = Slots(A, Bt.t(), starts, ranks, scalings, settings.max_rank)
    return linear


def out_of_pooled(layer: _Pooled) -> None:
    """Restore the class of the frozen layer and remove the buffers."""
    layer.__class__ = base_class(layer)  # type: ignore[assignment]
    for name in BUFFERS:
        del layer._buffers[name]
        layer._non_persistent_buffers_set.discard(name)
    for name in HOST:
        del vars(layer)[name]


def base_class(layer: _Pooled) -> type[nn.Module]:
    """Return the class of the frozen layer."""
    return type(layer).__mro__[type(layer).__mro__.index(_Pooled) + 1]


@cache
def _pooled_class(kind: type[nn.Module]) -> type[_Pooled]:
    if kind is nn.Linear:
        return PooledLinear
    return type(f"Pooled{kind.__name__}", (_Transposed, kind), {"__doc__": PooledLinear.__doc__})


class _Transposed(_Pooled):
    """A pooled layer whose frozen weight is stored as (K, N)."""

    def base_weight(self) -> Tensor:
        """W (N, K)."""
        return self.weight.t()


def _blank(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)
