"""PEFT models given fused forwards by accelerate, under DDP, FSDP2 and Hugging Face's Accelerator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate as hf
import peft
import tiny
import torch
import torch.distributed as dist
from ddp import shares, waits
from fsdp import by_block
from tiny import CLASSES, alike, base, data, judge, references, sgd, train, trained
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP

import lora_kernels as lk
from lora_kernels.integrations.peft.linear import CALLS
from lora_kernels.testing import assert_close


def build(plain: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*_proj", bias="lora_only", modules_to_save=["head"])
    model = peft.get_peft_model(base(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model.to(dtype) if plain else lk.accelerate(model.to(dtype), strict=True, verbose=False)


_TRUTH: list[dict[str, Tensor]] = []


def check(weights: dict[str, Tensor]) -> None:
    if not _TRUTH:
        for dtype in (torch.float32, torch.float64):
            _TRUTH.append(trained(train(build(plain=True, dtype=dtype), dtype)))
    plain, truth = _TRUTH
    assert weights.keys() == plain.keys()
    for kind in ("lora_A", "lora_B", "bias", "head"):
        vectors = [
            torch.cat([w[name].flatten() for name in sorted(w) if kind in name]) for w in (weights, plain, truth)
        ]
        assert_close(*vectors, what=kind)


def fused(model: nn.Module) -> bool:
    """Whether no call took PEFT's own forward."""
    return not any(layer.__dict__.get(CALLS) for layer in model.modules())


def blocks_of(model: Any) -> Any:
    return model.base_model.model


def under_ddp(folder: Path) -> None:
    model = DDP(build())
    check(trained(train(model, accumulate=2, silent=waits, **shares())))
    assert fused(model)


def shard(model: Any, **settings: Any) -> Any:
    by_block(blocks_of(model), **settings)
    return fully_shard(model, **settings)


def under_fsdp(folder: Path) -> None:
    model = shard(build())
    check(trained(train(model, **shares())))
    assert fused(model)


def adapters_as_units_of_their_own(folder: Path) -> None:
    """As by PEFT's wrap policy: lora_A and lora_B gather themselves when they are called, which PEFT's forward does."""
    model = build()
    for name, module in model.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            fully_shard(module)
    check(trained(train(shard(model), **shares())))
    assert not fused(model)


def mixed_precision(folder: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    got, plain = (trained(train(shard(build(plain=p), mp_policy=policy), **shares())) for p in (False, True))
    truth = trained(train(build(plain=True, dtype=torch.float64), torch.float64))
    for kind in ("lora_A", "lora_B"):
        vectors = [torch.cat([w[n].flatten() for n in sorted(w) if kind in n]) for w in (got, plain, truth)]
        assert_close(*vectors, what=kind, dtype=torch.bfloat16)


def saving(folder: Path) -> None:
    """PEFT's save_pretrained, given the whole state_dict, writes the file that one process writes."""
    model = train(shard(build()), **shares())
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    weights = trained(model)
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "sharded", state_dict=state)
        one = build()
        one.load_state_dict({**one.state_dict(), **weights})
        one.save_pretrained(folder / "one")
        names = [folder / name / "adapter_model.safetensors" for name in ("sharded", "one")]
        assert names[0].read_bytes() == names[1].read_bytes()
        loaded = lk.accelerate(peft.PeftModel.from_pretrained(base(), folder / "sharded"), verbose=False)
        x = data()[0][0]
        assert torch.equal(loaded(x), one.eval()(x))


def by_accelerator(folder: Path) -> None:
    """A loop of the user's with Hugging Face's Accelerator: our own layers and PEFT's."""
    for model, judged in ((build(), check), (tiny.build(), lambda weights: judge(weights, *references()))):
        accelerator = hf.Accelerator(cpu=True, gradient_accumulation_steps=2)
        inputs, targets = (t.flatten(0, 1) for t in data())
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=2)
        optimizer = sgd([p for p in model.parameters() if p.requires_grad])
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for x, y in loader:
            with accelerator.accumulate(model):
                logits = model(x)
                accelerator.backward(cross_entropy(logits.view(-1, CLASSES), y.flatten()))
                optimizer.step()
                optimizer.zero_grad()
        weights = trained(model)
        assert isinstance(model, DDP)
        assert all(alike(tensor) for tensor in weights.values())
        judged(weights)
        assert fused(model)
