"""Data-parallel training by processes that torchrun starts: divide batches, sum values, share results.

With a single process, results are bit-identical to code without this module.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, Sampler

from lora_kernels.errors import ConfigError

Value = TypeVar("Value")
_KEPT = (  # a DataLoader's attributes besides dataset and batches
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator",
    "prefetch_factor", "persistent_workers",
)  # fmt: skip


def count() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0. Process 0 draws the data's order, writes files and prints."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextmanager
def joined(device: str, timeout: float) -> Iterator[None]:
    """Join the process group if torchrun (or accelerate launch) started this process: NCCL on GPUs, gloo elsewhere.

    On GPUs, the process's local rank selects its GPU, so ``device`` has no number; a number raises ConfigError. A
    process waits at most ``timeout`` seconds for another, then fails.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    kind = torch.device(device)
    if kind.index is not None:
        raise ConfigError(f"device is {device!r}: every process uses its own GPU; give {kind.type!r}")
    if kind.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    yield
    dist.destroy_process_group()  # not after an error: the others may be inside a collective


def total(values: Sequence[float], device: torch.device) -> list[float]:
    """Sum each value over the processes. Collective: all processes must call it, and get the same result."""
    if count() == 1:
        return list(values)
    summed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.tolist()


def from_first(make: Callable[[], Value]) -> Value:
    """Call ``make`` in the first process and return its result, or raise its error, in all. Collective."""
    if count() == 1:
        return make()
    outcome: list[Any] = [None, None]  # result, error
    if rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:  # raised below, after the broadcast
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gathered(value: Value) -> list[Value]:
    """Return the values of all processes, in order. Collective."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


class Shares(Sampler[list[int]]):
    """Yields this process's rows of each of ``batches``; with ``whole``, every count()-th batch.

    The first process draws the epoch's order from its own generators, as a single process would, and broadcasts it.
    idle: numbers of this epoch's batches with fewer rows than processes, in which this process has none. For them the
    batch's first row is yielded, with weight 0.
    """

    def __init__(self, batches: Any, whole: bool = False) -> None:
        self.batches, self.whole, self.idle = batches, whole, set[int]()
        self.sampler, self.generator = getattr(batches, "sampler", None), getattr(batches, "generator", None)

    def set_epoch(self, epoch: int) -> None:
        """Call set_epoch of the samplers that have it."""
        for sampler in (self.batches, self.sampler):
            set_epoch = getattr(sampler, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)

    def __len__(self) -> int:
        return len(range(rank(), len(self.batches), count())) if self.whole else len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        self.idle.clear()
        order = from_first(lambda: [list(batch) for batch in self.batches])
        if self.whole:
            yield from order[rank() :: count()]
            return
        for number, batch in enumerate(order):
            mine = batch[rank() :: count()]
            if not mine:
                self.idle.add(number)
            yield mine or batch[:1]


def divided(dataloader: Any) -> Any:
    """Divide every batch of the loader among the processes, row by row. A DistributedSampler already does this.

    Raises ConfigError for anything but a DataLoader over a dataset with indices.
    """
    if count() == 1 or isinstance(getattr(dataloader, "sampler", None), torch.utils.data.DistributedSampler):
        return dataloader
    if not _has_indices(dataloader):
        raise ConfigError(
            f"{count()} processes cannot divide a {type(dataloader).__name__}; give a DataLoader over a dataset with "
            "indices, or one with a DistributedSampler"
        )
    return _with_batches(dataloader, Shares(dataloader.batch_sampler))


def every_other(dataloader: Any) -> Any:
    """Return the batches that this process evaluates. Each batch is evaluated by one process."""
    if count() == 1:
        return dataloader
    if _has_indices(dataloader):
        return _with_batches(dataloader, Shares(dataloader.batch_sampler, whole=True))
    return islice(dataloader, rank(), None, count())


def _has_indices(dataloader: Any) -> bool:
    return (
        isinstance(dataloader, DataLoader)
        and not isinstance(dataloader.dataset, IterableDataset)
        and dataloader.batch_sampler is not None
    )


def _with_batches(loader: DataLoader[Any], batches: Shares) -> DataLoader[Any]:
    return DataLoader(loader.dataset, batch_sampler=batches, **{name: getattr(loader, name) for name in _KEPT})


def replicated(model: nn.Module) -> nn.Module:
    """Wrap the model in DistributedDataParallel if there are several processes and it is not wrapped yet.

    Raises ConfigError for a sharded model: each checkpoint would contain only one shard.
    """
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ConfigError("the Trainer replicates models; train a sharded one (FSDP2) in a loop of your own")
    if count() == 1 or isinstance(model, DistributedDataParallel):
        return model
    return DistributedDataParallel(model)


def averaging(model: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
    """Make a context for backward: average gradients over the processes if ``wanted``, else accumulate locally."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not wanted else nullcontext()
