"""Many adapters over one frozen model, and for each sequence of a batch the one it asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapters.keys import KeyMapping
from lora_kernels.errors import AdapterBusyError, AdapterPoolError, ShapeError
from lora_kernels.locks import fork_safe_rlock
from lora_kernels.pool.batch import OpenBatch
from lora_kernels.pool.files import Source, check_ranks, convert_updates, read_updates
from lora_kernels.pool.layer import Here
from lora_kernels.pool.model import PooledModel, Targets, check_sizes
from lora_kernels.pool.opening import Asked, Opening, Wanted, ids_tensor
from lora_kernels.pool.probe import Probe
from lora_kernels.pool.report import AdapterInfo, table
from lora_kernels.pool.root import Root
from lora_kernels.pool.state import TORN, PoolState


class AdapterPool:
    """Slots for ``capacity`` adapters in every linear layer of ``model``, which stays the caller's to call:

        pool = lk.AdapterPool(model, capacity=8, max_rank_total=256)
        pool.load("sql", "adapters/sql")
        with pool.batch(["sql", None, "sql"]):
            model.generate(**three_prompts)

    Args:
        model: of PyTorch or transformers, without adapters. Its weights are frozen; ``close`` gives it back.
        capacity: adapters at a time.
        max_rank_total: ranks of all adapters of a layer at a time.
        max_rank: the largest rank of one adapter; min(64, max_rank_total) if None.
        target_modules: which layers, as in LoRAConfig; all linear ones but the output head if None.
        backend: as multi_lora_linear takes it.
        batch_dim: the dimension of the model's inputs that counts the sequences, 0 or 1; found by a probe if None.
        lora_bias: also serve adapters with a bias on lora_B (PEFT's lora_bias); one more addition in every layer.

    Buffers are allocated here, (max_rank_total, K) and (max_rank_total, N) for a layer W (N, K), and never again: a
    captured CUDA graph stays valid whatever is loaded or evicted. All methods may be called from any thread; a batch
    is open in the thread or asyncio task that opened it.

    Raises:
        ConfigError: sizes that make no sense, a model that has adapters, a named layer that cannot be pooled.
        BackendUnavailableError: a backend asked for by name that cannot run here.
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
        self._here, self._lock, self._closed = Here(), fork_safe_rlock(), False
        sizes = capacity, max_rank_total, max_rank
        self._pooled = PooledModel(model, target_modules, *sizes, self._here, backend, lora_bias)
        self._state = PoolState(self._pooled, capacity, max_rank_total)
        self._probe = Probe(self._pooled, self._here, batch_dim)
        self._root = Root(model, self._here)

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
        """Put an adapter into the pool under ``name``, in place of one that has the name; returns its slot.

        adapter: a folder as PEFT or save_adapter write it, or its tensors by PEFT's keys with their ``config`` (a
        LoRAConfig, PEFT's LoraConfig, or a dictionary). pin: as ``pin`` does. The others: as in load_adapter.
        It is read, checked and converted first, while batches run. Where there is no room for it, those adapters go
        that were used least recently and that are neither pinned nor in use. A replaced one keeps its slot.

        Raises, with the pool as it was:
            AdapterFormatError: malformed, or of another model.
            UnservableAdapterError: of another kind, for modules that are not pooled, of too large a rank.
            AdapterBusyError: a running batch uses the adapter of this name.
            PoolFullError: no room, and nobody may go.
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
        """Take the adapter out. Raises UnknownAdapterError; AdapterBusyError if a running batch uses it;
        AdapterPoolError if it is pinned."""
        with self._opened() as state:
            if state.idle(name, "evict it").pinned:
                raise AdapterPoolError(f"{name!r} is pinned; unpin it first")
            state.remove(name)

    def pin(self, name: str) -> None:
        """Keep the adapter until ``unpin``: it gives way to no other, and its slot stays. UnknownAdapterError."""
        with self._opened() as state:
            state.held[name] = state.entry(name)._replace(pinned=True)

    def unpin(self, name: str) -> None:
        """Let the adapter go when room is wanted. Raises UnknownAdapterError."""
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

        The adapters that are named are neither evicted nor replaced nor moved meanwhile; with a tensor, all that the
        pool holds when the block is entered, and those that ``ids`` is asked for inside.

        Probes find which row of a layer's input belongs to which sequence. A probe runs the model without adapters on
        altered inputs, once for each kind of call, when a batch first has several adapters.

        Raises UnknownAdapterError, ShapeError, and AdapterPoolError if batches overlap without being nested. The
        model's layers raise UnknownRowsError if the pool does not know which rows belong to which sequence.
        """
        return Opening(self._here, lambda: self._begin(adapters, image_ids), self._end)

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
        """int32 (n,): the slot of each name, -1 for None; into ``out`` (m,), m >= n, whose rest gets -1.

        A slot is its adapter's until that is evicted. Ask inside of ``pool.batch(tensor)`` to keep it until the end of
        the batch: ``with pool.batch(static): pool.ids(names, out=static); graph.replay()``.
        Raises UnknownAdapterError, and ShapeError for an ``out`` that is too short or not int32.
        """
        with self._opened() as state:
            if out is not None and (out.dtype != torch.int32 or out.dim() != 1 or len(out) < len(names)):
                raise ShapeError(f"out is {out.dtype} {tuple(out.shape)}; expected torch.int32 (m,), m >= {len(names)}")
            slots = state.slots(names)
            batch = self._here.get()
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
        """The adapters that are loaded, the least recently used first."""
        with self._lock:
            return tuple(self._state.held)

    @property
    def left_out(self) -> dict[str, str]:
        """{path: reason} of the linear layers that are not pooled."""
        return dict(self._pooled.left_out)

    def info(self, name: str) -> AdapterInfo:
        """Slot, ranks, and whether it is pinned or in use. Raises UnknownAdapterError."""
        with self._opened() as state:
            return state.entry(name)

    def close(self) -> None:
        """Give the model back as it was, without adapters; the pool is then of no more use. AdapterBusyError while
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
            return table(self._pooled, self.capacity, self.max_rank, self._state.layouts, self._state.entries())

    @contextmanager
    def _opened(self) -> Iterator[PoolState]:
        """The lock, if the pool is not closed."""
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
            batch = wanted.batch(self._here, requests, None if image_ids is None else wanted.ids(image_ids))
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
