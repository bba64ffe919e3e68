"""AdapterPool: many adapters over one frozen model, one of them for each sequence of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapters.keys import KeyMapping
from lora_kernels.errors import AdapterBusyError, AdapterPoolError, ShapeError
from lora_kernels.locks import fork_safe_rlock
from lora_kernels.pool.active import ActiveBatch
from lora_kernels.pool.batch import OpenBatch
from lora_kernels.pool.files import Source, check_ranks, convert_updates, read_updates
from lora_kernels.pool.layer import PoolSettings
from lora_kernels.pool.model import PooledModel, Targets, check_sizes
from lora_kernels.pool.opening import Asked, Opening, Wanted, ids_tensor
from lora_kernels.pool.probe import Probe
from lora_kernels.pool.report import AdapterInfo, table
from lora_kernels.pool.root import Root
from lora_kernels.pool.state import TORN, PoolState


class AdapterPool:
    """Slots for ``capacity`` adapters in every linear layer of ``model``, which is called as before:

        pool = lk.AdapterPool(model, capacity=8, max_rank_total=256)
        pool.load("sql", "adapters/sql")
        with pool.batch(["sql", None, "sql"]):
            model.generate(**three_prompts)

    Args:
        model: of PyTorch or transformers, without adapters. Its weights are frozen until ``close`` restores it.
        capacity: the largest number of adapters that are loaded at the same time.
        max_rank_total: the largest sum of the ranks of all loaded adapters, in each layer.
        max_rank: the largest rank of one adapter; min(64, max_rank_total) if None.
        target_modules: which layers, as in LoRAConfig; all linear layers except the output head if None.
        backend: as in multi_lora_linear.
        batch_dim: the dimension of the model's inputs that counts the sequences, 0 or 1; found by a probe if None.
        lora_bias: also serve adapters with a bias on lora_B (PEFT's lora_bias); one more addition in every layer.

    All buffers, (max_rank_total, K) and (max_rank_total, N) for a layer W (N, K), are allocated by the constructor. A
    captured CUDA graph therefore stays valid when adapters are loaded or evicted. All methods may be called from any
    thread; a batch is open in the thread or asyncio task that opened it.

    Raises:
        ConfigError: sizes out of range, a model that has adapters, a named layer that cannot be pooled.
        BackendUnavailableError: the named backend cannot run on this machine.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        capacity: int,
        max_rank_total: int,
        max_rank: int | None = None,
        target_modules: Targets = None,
        backend: str = "auto",
        batch_dim: int | None = None,
        lora_bias: bool = False,
    ) -> None:
        max_rank = check_sizes(capacity, max_rank_total, max_rank, batch_dim)
        self.capacity, self.max_rank_total, self.max_rank = capacity, max_rank_total, max_rank
        self._active, self._lock, self._closed = ActiveBatch(), fork_safe_rlock(), False
        settings = PoolSettings(capacity, max_rank_total, max_rank, backend, lora_bias)
        self._pooled = PooledModel(model, target_modules, settings, self._active)
        self._state = PoolState(self._pooled)
        self._probe = Probe(self._pooled, self._active, batch_dim)
        self._root = Root(model, self._active)

    def load(
        self,
        name: str,
        adapter: Source,
        config: Any = None,
        *,
        pin: bool = False,
        follow_symlinks: bool = False,
        key_mapping: KeyMapping | None = None,
    ) -> int:
        """Load an adapter into the pool under ``name``; returns its slot. Replaces the adapter of that name, if any.

        adapter: a folder that PEFT or save_adapter wrote, or tensors by PEFT's keys with their ``config`` (a
        LoRAConfig, PEFT's LoraConfig, or a dictionary). pin: also call ``pin``. Others: as in load_adapter.
        The adapter is read, checked and converted first, while batches run. If there is no room, the least recently
        used adapters that are neither pinned nor in use are evicted. A replaced adapter keeps its slot.

        Raises, with the pool unchanged:
            AdapterFormatError: the adapter is malformed, or belongs to another model.
            UnservableAdapterError: it is of another kind, targets modules that are not pooled, or has too large a rank.
            AdapterBusyError: a running batch uses the adapter of this name.
            PoolFullError: there is no room, and no adapter may be evicted.
        """
        if not isinstance(name, str) or not name:
            raise AdapterPoolError(f"an adapter's name is a string of at least one character, not {name!r}")
        with self._opened() as state:
            state.running += 1  # the pool stays open meanwhile
        try:
            layers = self._pooled.layers
            model, left_out = self._pooled.model, self.left_out
            updates = read_updates(model, layers, left_out, adapter, config, follow_symlinks, key_mapping)
            check_ranks(name, updates, self.max_rank)
            with state.converting([update.A for update in updates.values()]):
                updates = convert_updates(updates, layers)
            with self._lock:
                replaced = state.idle(name, "replace it") if name in state.held else None
                return state.put(name, updates, pin or (replaced is not None and replaced.pinned))
        finally:
            with self._lock:
                state.running -= 1

    def evict(self, name: str) -> None:
        """Remove the adapter. Raises UnknownAdapterError; AdapterBusyError if a running batch uses it;
        AdapterPoolError if it is pinned."""
        with self._opened() as state:
            if state.idle(name, "evict it").pinned:
                raise AdapterPoolError(f"{name!r} is pinned; unpin it first")
            state.remove(name)

    def pin(self, name: str) -> None:
        """Never evict the adapter to make room, until ``unpin``; its slot stays. Raises UnknownAdapterError."""
        with self._opened() as state:
            state.held[name] = state.entry(name)._replace(pinned=True)

    def unpin(self, name: str) -> None:
        """Allow evicting the adapter to make room. Raises UnknownAdapterError."""
        with self._opened() as state:
            state.held[name] = state.entry(name)._replace(pinned=False)

    def batch(self, adapters: Asked, *, image_ids: Asked | None = None) -> Opening:
        """Open a block in which calls of the model use ``adapters``, in this thread or asyncio task.

        adapters: a list of names, one for each sequence of the model's inputs, None for no adapter, ("sql", 0.5) for
        half of that adapter's scaling. If generate() repeats a sequence (beams, several answers), each copy gets the
        sequence's adapter. Or an int32 tensor of slots (``ids``), one for each sequence or one for each token, -1 for
        no adapter; its numbers may change while the batch is open. image_ids: the same for the items of image inputs,
        needed if adapters have weights in layers whose input comes from images only. Blocks may be nested; the
        innermost is used.

        The named adapters are not evicted, replaced or moved while the block is open. With a tensor this holds for all
        adapters that are loaded when the block is entered, and for those that are passed to ``ids`` inside it.

        Probes find which row of a layer's input belongs to which sequence. A probe runs the model without adapters on
        altered inputs, once for each kind of call, when a batch first has several adapters.

        Raises UnknownAdapterError, ShapeError, and AdapterPoolError if batches overlap without being nested. The
        model's layers raise UnknownRowsError if no probe has shown which rows belong to which sequence.
        """
        return Opening(self._active, lambda: self._begin(adapters, image_ids), self._end)

    def probe(self, *args: Any, **kwargs: Any) -> None:
        """Find which rows belong to which sequence from a call of the model with these arguments.

        The arguments hold at least two sequences of different content. Call it before torch.compile, before a CUDA
        graph is captured, and for layers that are called outside of the model's forward. Nothing else changes. Raises
        AdapterPoolError if the probe shows nothing.
        """
        with self._opened() as state:
            state.running += 1  # the pool stays open meanwhile
        try:
            self._probe.show(args, kwargs)
        finally:
            with self._lock:
                state.running -= 1

    def ids(self, names: Sequence[str | None], out: Tensor | None = None) -> Tensor:
        """Return the slot of each name, -1 for None: int32 (n,), or ``out`` (m,), m >= n, filled up with -1.

        A slot keeps its adapter until the adapter is evicted. Call this inside of ``pool.batch(tensor)`` to prevent
        that until the end of the batch: ``with pool.batch(static): pool.ids(names, out=static); graph.replay()``.
        Raises UnknownAdapterError, and ShapeError for an ``out`` that is too short or not int32.
        """
        with self._opened() as state:
            if out is not None and (out.dtype != torch.int32 or out.dim() != 1 or len(out) < len(names)):
                raise ShapeError(f"out is {out.dtype} {tuple(out.shape)}; expected torch.int32 (m,), m >= {len(names)}")
            slots = state.slots(names)
            batch = self._active.get()
            if batch is not None and not batch.refusal:
                new = {slot for slot in slots if slot >= 0} - batch.held
                state.users.update(new)
                batch.held |= new
        if out is None:
            return ids_tensor(slots, self._pooled.device())
        with torch.no_grad():
            return out.copy_(torch.tensor(slots + [-1] * (out.numel() - len(slots)), dtype=torch.int32, device="cpu"))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the loaded adapters, the least recently used first."""
        with self._lock:
            return tuple(self._state.held)

    @property
    def left_out(self) -> dict[str, str]:
        """{path: reason} of the linear layers that are not pooled."""
        return dict(self._pooled.left_out)

    def info(self, name: str) -> AdapterInfo:
        """Return the slot and ranks of an adapter, and whether it is pinned or in use. Raises UnknownAdapterError."""
        with self._opened() as state:
            return state.entry(name)

    def close(self) -> None:
        """Restore the model, without adapters; the pool cannot be used afterwards. Raises AdapterBusyError while
        batches or loads run."""
        with self._lock:
            if self._state.running:
                raise AdapterBusyError(
                    f"{self._state.running} batches or loads are running; close the pool once they end"
                )
            if not self._closed:
                self._closed = True
                self._state.held.clear()
                self._pooled.restore()

    def __enter__(self) -> AdapterPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self._state.held

    def __len__(self) -> int:
        return len(self._state.held)

    def __repr__(self) -> str:
        with self._lock:
            return table(self._pooled, self._state.layouts, self._state.entries())

    @contextmanager
    def _opened(self) -> Iterator[PoolState]:
        """Hold the lock while the block runs. Raises AdapterPoolError if the pool is closed."""
        with self._lock:
            if self._closed:
                raise AdapterPoolError("this pool is closed and its model is as it was; make a new AdapterPool")
            if self._state.changing:  # a thread of the parent was writing at the fork
                raise AdapterPoolError(TORN)
            yield self._state

    def _begin(self, adapters: Asked, image_ids: Asked | None) -> OpenBatch:
        with self._opened() as state:
            wanted = Wanted(state, self.capacity, self._pooled.device())
            requests = wanted.ids(adapters)
            batch = wanted.batch(self._active, requests, None if image_ids is None else wanted.ids(image_ids))
            state.begin(batch.held)
            if batch.mixed:
                self._root.attach()
        try:
            if batch.mixed:
                self._probe.make_up()
        except BaseException:
            self._end(batch)
            raise
        return batch

    def _end(self, batch: OpenBatch) -> None:
        with self._lock:
            if batch.mixed:
                self._root.detach()
            self._state.end(batch.held)
