"""FSDP2 (fully_shard) around this package's own layers."""

from __future__ import annotations

import copy
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ddp import shares
from tiny import Tiny, base, build, config, data, judge, references, train, trained, unsharded
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import lora_kernels as lk
from lora_kernels.testing import assert_close


def by_block(model: Tiny, **settings: Any) -> Tiny:
    for block in model.blocks:
        fully_shard(block, **settings)
    return fully_shard(model, **settings)


def by_layer(model: Tiny, **settings: Any) -> Tiny:
    for layer in list(model.modules()):
        if hasattr(layer, "lora_A"):
            fully_shard(layer, **settings)
    return by_block(model, **settings)


def check(model: nn.Module) -> None:
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    judge(trained(model), *references())


@contextmanager
def waits(model: Any, last: bool) -> Any:
    model.set_requires_gradient_sync(last)
    yield
    model.set_requires_gradient_sync(True)


def units_of_blocks(folder: Path) -> None:
    check(train(by_block(build()), **shares()))


def units_of_layers(folder: Path) -> None:
    check(train(by_layer(build()), **shares()))


def the_root_alone(folder: Path) -> None:
    check(train(fully_shard(build()), **shares()))


def without_resharding_and_with_accumulation(folder: Path) -> None:
    check(train(by_block(build(), reshard_after_forward=False), accumulate=2, silent=waits, **shares()))


def checkpointing(folder: Path) -> None:
    for reentrant in (False, True):
        model = build()
        model.checkpointing = reentrant
        check(train(by_block(model), **shares()))


def moved_after_sharding(folder: Path) -> None:
    model = by_block(build())
    model.to(torch.float64).to(torch.float32)  # LoRAQKV puts weights side by side when it is moved; here it cannot
    check(train(model, **shares()))


def adapters_left_whole(folder: Path) -> None:
    """The frozen weights are sharded; what is trained stays on every process, its gradients averaged by the user."""
    model = build()
    ours = [p for p in model.parameters() if p.requires_grad]
    for part in (*model.blocks, model):
        fully_shard(part, ignored_params=set(ours))

    def average(model: nn.Module) -> None:
        for parameter in ours:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()

    judge(trained(train(model, between=average, **shares())), *references())


def mixed_precision(folder: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for shard in (by_block, by_layer):
        runs = [trained(train(shard(build(plain=p), mp_policy=policy), **shares())) for p in (False, True)]
        judge(*runs, references()[1], dtype=torch.bfloat16)


def saving_gathers(folder: Path) -> None:
    for name, shard in (("blocks", by_block), ("layers", by_layer), ("root", fully_shard)):
        model = train(shard(build()), **shares())
        model(data()[0][0])  # leaves the root's own tensors gathered
        lk.save_adapter(model, folder / name)
        assert (folder / name / "adapter_config.json").exists()  # on every process: none returns before
        one = unsharded(model)
        if dist.get_rank() == 0:
            lk.save_adapter(one, folder / f"{name}_one")
            for file in ("adapter_model.safetensors", "adapter_config.json"):
                assert (folder / name / file).read_bytes() == (folder / f"{name}_one" / file).read_bytes()


def a_failed_save_fails_everywhere(folder: Path) -> None:
    model = by_block(build())
    (folder / "file").write_text("")
    with pytest.raises(OSError, match=r"Not a directory|File exists|was not written"):
        lk.save_adapter(model, folder / "file" / "adapter")


def loading_places_pieces(folder: Path) -> None:
    saved = train(build())
    if dist.get_rank() == 0:
        lk.save_adapter(saved, folder / "adapter")
    dist.barrier()
    x = data()[0][0]
    truth = copy.deepcopy(saved).double()(x.double())
    for shard in (by_block, by_layer, fully_shard):
        model = shard(build())
        model(x)
        lk.load_adapter(model, folder / "adapter")
        for name, value in trained(model).items():
            assert torch.equal(value, saved.get_parameter(name)), name
        assert_close(model(x), saved(x), truth)


def what_cannot_be_sharded_says_so(folder: Path) -> None:
    sharded, bare = by_block(build()), fully_shard(base())
    if dist.get_rank() == 0:
        lk.save_adapter(build(), folder / "adapter")
    dist.barrier()
    for call, error in (
        (partial(lk.merge_lora, sharded), "sharded over processes; save_adapter"),
        (partial(lk.apply_lora, bare, config()), "has no plain floating-point weight (quantised, parametrised or shar"),
        (partial(lk.load_adapter, bare, folder / "adapter"), "call load_adapter or apply_lora before fully_shard"),
    ):
        with pytest.raises(lk.LoRAKernelsError, match=re.escape(error)):
            call()
