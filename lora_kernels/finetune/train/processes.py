"""The processes of one training run, as torchrun starts them: what each takes, and what all agree on.

With one process everything here does nothing, to the bit.
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
_KEPT = (  # what a DataLoader has besides its dataset and its batches
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator",
    "prefetch_factor", "persistent_workers",
)  # fmt: skip


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0; the first one draws the data's order, writes files and talks."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextmanager
def joined(device: str, timeout: float) -> Iterator[None]:
    """Joins the processes that torchrun (or accelerate launch) started, if it did: NCCL on GPUs, gloo elsewhere.

    On a GPU this process's own becomes the current one, so ``device`` names no number. A process waits ``timeout``
    seconds for another, then fails. ConfigError for a numbered device.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    kind = torch.device(device)
    if kind.index is not None:
        raise ConfigError(f"device is {device!r}: every process takes a GPU of its own; give {kind.type!r}")
    if kind.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    yield
    dist.destroy_process_group()  # not after an error: the others may be in the middle of something


def total(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value summed over the processes, equal on all of them; all must call this."""
    if count() == 1:
        return list(values)
    summed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.tolist()


def from_first(make: Callable[[], Value]) -> Value:
    """What ``make`` returns or raises in the first process, in all of them; all must call this."""
    if count() == 1:
        return make()
    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = make()
        except Exception as error:  # raised below, once the others know
            told[1] = error
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    return told[0]


def gathered(value: Value) -> list[Value]:
    """The value of every process, in order; all must call this."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


class Shares(Sampler[list[int]]):
    """This process's rows of each of ``batches``; or, with ``whole``, every count()-th batch.

    The first process draws the epoch's order, from its own generators as it would alone, and the others get it told.
    idle: numbers of this epoch's batches with fewer rows than processes, where this one has none; it is given the first
    row, which must not count.
    """

    def __init__(self, batches: Any, whole: bool = False) -> None:
        self.batches, self.whole, self.idle = batches, whole, set[int]()
        self.sampler, self.generator = getattr(batches, "sampler", None), getattr(batches, "generator", None)

    def set_epoch(self, epoch: int) -> None:
        """Passed on to the samplers that want to know."""
        for sampler in (self.batches, self.sampler):
            tell = getattr(sampler, "set_epoch", None)
            if tell is not None:
                tell(epoch)

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
    """The loader with every batch divided among the processes, row by row; a DistributedSampler's as it is.

    ConfigError for what cannot be divided: anything but a DataLoader over a dataset with indices.
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
    """The batches this process evaluates: together the processes take each batch once."""
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
    """The model under DistributedDataParallel, where it is not yet and there are several processes.

    ConfigError for a sharded model: its checkpoints would hold pieces.
    """
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ConfigError("the Trainer replicates models; train a sharded one (FSDP2) in a loop of your own")
    if count() == 1 or isinstance(model, DistributedDataParallel):
        return model
    return DistributedDataParallel(model)


def averaging(model: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
    """In it, a backward averages the gradients over the processes if ``wanted``, and adds them up locally if not."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not wanted else nullcontext()
