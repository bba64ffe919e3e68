"""Many adapters over one frozen model, and for each sequence of a batch the one it asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapters.pool_files import Source, check_ranks, convert_updates, read_updates
from lora_kernels.adapters.pool_model import PooledModel, Targets
from lora_kernels.adapters.pool_report import AdapterInfo, table
from lora_kernels.adapters.pool_state import TORN, PoolState
from lora_kernels.errors import AdapterBusyError, AdapterPoolError, ConfigError, ShapeError
from lora_kernels.fork import fork_safe_rlock
from lora_kernels.layers.pooled import Here, Rows

Asked = Sequence[str | None] | Tensor
MAX_RANK = 64  # where the caller names none: what kernels reserve for a row grows with it


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

    Buffers are allocated here, (max_rank_total, K) and (max_rank_total, N) for a layer W (N, K), and never again: a
    captured CUDA graph stays valid whatever is loaded or evicted. All methods may be called from any thread; a batch
    is open in the thread that opened it.

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
    ) -> None:
        sizes = {
            "capacity": capacity,
            "max_rank_total": max_rank_total,
            "max_rank": 1 if max_rank is None else max_rank,
        }
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ConfigError(f"{name} = {size!r}: accepted is an integer of at least 1")
        max_rank = min(MAX_RANK, max_rank_total) if max_rank is None else max_rank
        if max_rank > max_rank_total:
            raise ConfigError(f"max_rank = {max_rank}: no more than max_rank_total = {max_rank_total} can be held")
        self.capacity, self.max_rank_total, self.max_rank = capacity, max_rank_total, max_rank
        self._here, self._lock, self._closed = Here(), fork_safe_rlock(), False
        self._pooled = PooledModel(model, target_modules, capacity, max_rank_total, max_rank, self._here, backend)
        self._state = PoolState(self._pooled, capacity, max_rank_total)

    def load(
        self, name: str, adapter: Source, config: Any = None, *, pin: bool = False, follow_symlinks: bool = False
    ) -> int:
        """Put an adapter into the pool under ``name``, in place of one that has the name; returns its slot.

        adapter: a folder as PEFT or save_adapter write it, or its tensors by PEFT's keys with their ``config`` (a
        LoRAConfig, PEFT's LoraConfig, or a dictionary). pin: as ``pin`` does. follow_symlinks: as in load_adapter.

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
            updates = read_updates(self._pooled.model, layers, self.left_out, adapter, config, follow_symlinks)
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

    @contextmanager
    def batch(self, adapters: Asked) -> Iterator[None]:
        """What this thread runs through the model inside the block is served with ``adapters``.

        A list of names, one a sequence, None for no adapter; rows that generate() makes of a sequence (beams, several
        answers) get its adapter. Or an int32 tensor of slots (``ids``), one a sequence or one a token, -1 for none,
        whose numbers may change while the batch is open. Blocks may be nested; the innermost counts.

        The adapters that are named are neither evicted nor replaced nor moved meanwhile; with a tensor, all that the
        pool holds when the block is entered, and those that ``ids`` is asked for inside.

        Raises UnknownAdapterError, ShapeError; from the model's layers ShapeError where rows do not fit.
        """
        here = self._here
        outer = here.rows, here.held
        rows, held = self._open(adapters)
        try:
            here.rows, here.held = rows, held
            yield
        finally:
            here.rows, here.held = outer
            with self._lock:
                self._state.end(held)

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
            held = self._here.held
            if held is not None:
                new = {slot for slot in slots if slot >= 0} - held
                state.users.update(new)
                held |= new
        if out is None:
            return self._ids_tensor(slots)
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
            if self._state.changing:  # by a thread that a fork left behind
                raise AdapterPoolError(TORN)
            yield self._state

    def _ids_tensor(self, slots: list[int]) -> Tensor:
        device = next(iter(self._pooled.layers.values())).pool_slots.A.device
        with torch.inference_mode(False):  # a tensor that counts its changes is looked at once
            return torch.tensor(slots, dtype=torch.int32, device="cpu").to(device)

    def _open(self, adapters: Asked) -> tuple[Rows, set[int]]:
        with self._opened() as state:
            if isinstance(adapters, Tensor):
                if adapters.dtype != torch.int32 or not adapters.is_contiguous():
                    raise ShapeError(
                        f"ids are {adapters.dtype}{'' if adapters.is_contiguous() else ' with gaps'}; expected a "
                        "contiguous torch.int32 tensor, as it is read at every layer and a converted copy would not be"
                    )
                rows = Rows(adapters.view(-1), self.capacity)
                held = {entry.slot for entry in state.entries()}
            else:
                slots = state.slots(adapters)
                ids, held = self._ids_tensor(slots), set(slots) - {-1}
                uniform = ids[:1] if len(held) == 1 and -1 not in slots else None
                rows = Rows(ids, self.capacity, named=True, none=not held, uniform=uniform)
            state.begin(held)
            return rows, held
