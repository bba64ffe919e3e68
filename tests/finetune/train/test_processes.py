"""One process, and the shares of several; tests/integrations/distributed runs several processes."""

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler, TensorDataset

from lora_kernels.errors import ConfigError
from lora_kernels.finetune.train import processes


def one_of(monkeypatch, rank, count):
    monkeypatch.setattr(processes, "rank", lambda: rank)
    monkeypatch.setattr(processes, "count", lambda: count)
    monkeypatch.setattr(processes, "from_first", lambda make: make())


def test_alone_nothing_happens(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    loader, model = DataLoader(TensorDataset(torch.arange(4)), 2), nn.Linear(1, 1)
    with processes.joined("cpu", 1.0):
        assert (processes.rank(), processes.count()) == (0, 1)
        assert processes.total([1, 2.5], torch.device("cpu")) == [1, 2.5]
        assert processes.from_first(lambda: 3) == 3
        assert processes.gathered(4) == [4]
        assert processes.divided(loader) is loader
        assert processes.every_other(loader) is loader
        assert processes.replicated(model) is model
        with processes.averaging(model, False):
            pass


def test_every_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="'cuda:1': every process uses its own GPU; give 'cuda'"):
        processes.joined("cuda:1", 1.0).__enter__()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("rows", [8, 9, 13])
def test_the_shares_make_up_the_batches(monkeypatch, rows, count):
    whole = [list(range(i, min(i + 4, rows))) for i in range(0, rows, 4)]
    parts = []
    for rank in range(count):
        one_of(monkeypatch, rank, count)
        shares = processes.Shares(BatchSampler(SequentialSampler(range(rows)), 4, drop_last=False))
        assert len(shares) == len(whole)
        mine = list(shares)
        assert all(mine)
        parts.append([[] if i in shares.idle else batch for i, batch in enumerate(mine)])
        assert list(shares) == mine
    assert [sorted(row for part in batches for row in part) for batches in zip(*parts, strict=True)] == whole


def test_whole_batches_take_turns(monkeypatch):
    loader = DataLoader(TensorDataset(torch.arange(10)), 2)
    seen = []
    for rank in range(3):
        one_of(monkeypatch, rank, 3)
        mine = processes.every_other(loader)
        batches = [batch[0].tolist() for batch in mine]
        assert len(mine) == len(batches)
        assert [batch[0].tolist() for batch in processes.every_other(list(loader))] == batches
        seen += batches
    assert sorted(seen) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_a_divided_loader_keeps_its_settings_and_its_generators(monkeypatch):
    one_of(monkeypatch, 0, 2)
    generator, data = torch.Generator(), TensorDataset(torch.arange(10))
    loader = DataLoader(data, 4, shuffle=True, generator=generator, collate_fn=list, timeout=0)
    mine = processes.divided(loader)
    assert (mine.dataset, mine.collate_fn, mine.generator) == (data, list, generator)
    assert mine.batch_sampler.sampler is loader.sampler
    distributed = DataLoader(data, 4, sampler=DistributedSampler(data, 2, 0))
    assert processes.divided(distributed) is distributed
    epochs = []
    loader.sampler.set_epoch = epochs.append
    mine.batch_sampler.set_epoch(3)
    assert epochs == [3]


def test_what_cannot_be_divided_says_so(monkeypatch):
    one_of(monkeypatch, 0, 2)
    with pytest.raises(ConfigError, match="2 processes cannot divide a list; give a DataLoader"):
        processes.divided([1, 2])
