"""DistributedDataParallel and ZeroRedundancyOptimizer around this package's own layers."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import alike, build, judge, references, train, trained, unsharded
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP

import lora_kernels as lk


def shares() -> dict[str, int]:
    return {"shards": dist.get_world_size(), "rank": dist.get_rank()}


def check(model: nn.Module, dtype: Any = None) -> None:
    weights = trained(model)
    assert all(alike(tensor) for tensor in weights.values())
    judge(weights, *references(), dtype=dtype)


def waits(model: nn.Module, last: bool) -> Any:
    return nullcontext() if last else model.no_sync()


def one_step_each(folder: Path) -> None:
    check(train(DDP(build()), **shares()))


def accumulation_with_no_sync(folder: Path) -> None:
    check(train(DDP(build(), gradient_as_bucket_view=True), accumulate=2, silent=waits, **shares()))


def checkpointing(folder: Path) -> None:
    for reentrant in (False, True):
        model = build()
        model.checkpointing = reentrant
        check(train(DDP(model, static_graph=reentrant), **shares()))


def a_gradient_that_is_not_averaged_is_seen(folder: Path) -> None:
    for kind in ("lora_A", "lora_B"):
        model = build()
        local = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith(kind)]
        DDP._set_params_and_buffers_to_ignore_for_model(model, local)
        weights = trained(train(DDP(model), **shares()))
        try:
            judge(weights, *references())
        except AssertionError:
            continue
        raise RuntimeError(f"the rule did not see that {kind}'s gradients were left on each process")


def autocast_to_bfloat16(folder: Path) -> None:
    plain = trained(train(build(plain=True), autocast=True))
    weights = trained(train(DDP(build()), autocast=True, **shares()))
    judge(weights, plain, references()[1], dtype=torch.bfloat16)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05, eps=1e-2)


def zero_redundancy_optimizer(folder: Path) -> None:
    def sharded(parameters: Any) -> torch.optim.Optimizer:
        return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=0.05, eps=1e-2)

    weights = trained(train(DDP(build()), optimizer=sharded, **shares()))
    assert all(alike(tensor) for tensor in weights.values())
    judge(weights, *references(adamw))


def the_first_process_saves(folder: Path) -> None:
    model = train(DDP(build()), **shares())
    lk.save_adapter(model, folder / str(dist.get_rank()))
    assert (folder / str(dist.get_rank())).exists() == (dist.get_rank() == 0)
    if dist.get_rank() == 0:  # alone: nothing waits for the others
        lk.save_adapter(model, folder / "alone")
        lk.save_adapter(unsharded(model), folder / "one")
        for name in ("0", "alone"):
            for file in ("adapter_model.safetensors", "adapter_config.json"):
                assert (folder / name / file).read_bytes() == (folder / "one" / file).read_bytes()


def loads_into_a_wrapped_model(folder: Path) -> None:
    saved = train(build())
    if dist.get_rank() == 0:
        lk.save_adapter(saved, folder / "adapter")
    dist.barrier()
    model = DDP(build())
    lk.load_adapter(model, folder / "adapter")
    for name, value in trained(model).items():
        assert torch.equal(value, saved.get_parameter(name))
