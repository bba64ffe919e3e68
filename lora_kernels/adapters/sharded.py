"""Handles models whose tensors are sharded over processes as DTensors (FSDP2, tensor parallelism)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this is a DTensor, without importing torch.distributed.tensor."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Any) -> Tensor:
    """Gather the full tensor on every process; all processes of its mesh must call this together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def placed_like(value: Tensor, like: Any) -> Tensor:
    """Shard ``value``, which is complete on every process, like ``like``; nothing is sent."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor  # half a second, and only here

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def write_once(model: nn.Module, tensors: Iterable[Any], write: Callable[[], None]) -> None:
    """Call ``write`` in one of the processes that hold ``model``.

    Sharded tensors: the first process of their mesh writes; all wait for it, and all raise if it fails.
    A DistributedDataParallel model: the first process of its group writes; no process waits, so the others need not
    call this. Any other model: every process that calls this writes.
    Raises the error of ``write``; if ``write`` failed in another process, OSError.
    """
    meshes = list({id(t.device_mesh): t.device_mesh for t in tensors if is_sharded(t)}.values())
    if not meshes:
        if _rank_in_replicas(model) == 0:
            write()
        return
    failure: BaseException | None = None
    if all(place == 0 for mesh in meshes for place in mesh.get_coordinate()):
        try:
            write()
        except BaseException as error:  # raised below, after the other processes are notified
            failure = error
    failed = False
    for mesh in meshes:
        flag = torch.tensor(int(failure is not None), device=mesh.device_type)
        for group in mesh.get_all_groups():
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group)
        failed = failed or bool(flag)
    if failure is not None:
        raise failure
    if failed:
        raise OSError(
            "the adapter was not written completely: the process that writes it failed; see the error of that process"
        )


def _rank_in_replicas(model: nn.Module) -> int:
    """Rank in the process group of the DistributedDataParallel around the model; 0 without one."""
    while not isinstance(model, nn.parallel.DistributedDataParallel):
        inner = model.module if isinstance(model, nn.DataParallel) else getattr(model, "_orig_mod", None)
        if inner is None:
            return 0
        model = inner
    return torch.distributed.get_rank(model.process_group)
