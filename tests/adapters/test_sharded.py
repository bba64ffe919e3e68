"""One process with a mesh of itself; two processes are in tests/integrations/distributed."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lora_kernels.adapters.sharded import is_sharded, placed_like, whole, write_once


@pytest.fixture
def sharded() -> Iterator[torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield distribute_tensor(torch.arange(6.0).view(3, 2), init_device_mesh("cpu", (1,)), [Shard(0)])
    dist.destroy_process_group()


def test_a_sharded_tensor_is_known_gathered_and_placed(sharded):
    assert is_sharded(sharded)
    assert type(whole(sharded)) is torch.Tensor
    assert torch.equal(whole(sharded), torch.arange(6.0).view(3, 2))
    placed = placed_like(torch.ones(3, 2), sharded)
    assert placed.placements == sharded.placements
    assert torch.equal(whole(placed), torch.ones(3, 2))


def test_a_plain_tensor_is_left_alone():
    tensor = torch.ones(2)
    assert not is_sharded(tensor)
    assert whole(tensor) is tensor
    assert placed_like(tensor, torch.zeros(2)) is tensor


def test_the_only_process_writes(sharded):
    written = []
    for model, tensors in ((nn.Linear(1, 1), []), (nn.parallel.DistributedDataParallel(nn.Linear(1, 1)), [sharded])):
        write_once(model, tensors, lambda: written.append(1))
    assert len(written) == 2


@pytest.mark.parametrize("pieces", [False, True])
def test_an_error_of_the_writer_is_raised(sharded, pieces):
    def write() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_once(nn.Linear(1, 1), [sharded] if pieces else [], write)
