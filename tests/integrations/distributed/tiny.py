"""A small model with every kind of layer, its plain twin, and one training run of it under any wrapper.

Run by worker.py, in processes of their own.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, silu
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.testing import assert_close

WIDTH, HEADS, HIDDEN, CLASSES = 32, 2, 48, 6
STEPS, BATCH, LENGTH = 3, 8, 5


class QKV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.o_proj, self.mlp = nn.LayerNorm(WIDTH), QKV(), nn.Linear(WIDTH, WIDTH), MLP()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + self.o_proj((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        self.checkpointing: bool | None = None  # None: none; otherwise use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing:  # the reentrant kind gives no gradients if no input requires one
            x = x.detach().requires_grad_()
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing)
        return self.head(self.norm(x))


class PlainLoRA(nn.Module):
    """A LoRALinear in plain PyTorch, under the same names."""

    def __init__(self, layer: lk.LoRALinear) -> None:
        super().__init__()
        self.weight, self.bias, self.scaling = layer.weight, layer.bias, layer.scaling
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias) + self.scaling * linear(linear(x, self.lora_A), self.lora_B)


def config(**changes: Any) -> lk.LoRAConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": r".*_proj", "bias": "lora_only", "modules_to_save": ["head"]}
    return lk.LoRAConfig(**(settings | changes))


def base() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def build(plain: bool = False, dtype: torch.dtype = torch.float32) -> Tiny:
    """The model with adapters as large as their bases: fused q, k, v and MLPs, or plain PyTorch throughout."""
    model = base()
    lk.apply_lora(model, config())
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, lk.LoRALinear):
                layer.lora_A.normal_(std=layer.in_features**-0.5)
                layer.lora_B.normal_(std=0.5 * layer.r**-0.5)
    if plain:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, lk.LoRALinear):
                model.set_submodule(name, PlainLoRA(layer))
    else:
        for block in model.blocks:
            block.qkv = lk.LoRAQKV.from_linears(block.qkv.q_proj, block.qkv.k_proj, block.qkv.v_proj)
            block.mlp = lk.LoRAMLP.from_linears(block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj)
    return model.to(dtype)


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs (steps, batch, length, width) and classes (steps, batch, length)."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(STEPS, BATCH, LENGTH, WIDTH, generator=generator)
    return x.to(dtype), torch.randint(0, CLASSES, (STEPS, BATCH, LENGTH), generator=generator)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def train(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    *,
    shards: int = 1,
    rank: int = 0,
    accumulate: int = 1,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = sgd,
    silent: Callable[[nn.Module, bool], Any] | None = None,
    autocast: bool = False,
    between: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Three steps on this process's share of each batch, in ``accumulate`` parts; returns the model.

    silent: given the model and whether the part is a step's last, a context in which gradients wait to be averaged.
    """
    inputs, targets = data(dtype)
    steps = optimizer([p for p in model.parameters() if p.requires_grad])
    for x, y in zip(inputs, targets, strict=True):
        mine_x, mine_y = x.chunk(shards)[rank], y.chunk(shards)[rank]
        parts = list(zip(mine_x.chunk(accumulate), mine_y.chunk(accumulate), strict=True))
        for i, (part_x, part_y) in enumerate(parts):
            with silent(model, i == accumulate - 1) if silent else nullcontext():
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    logits = model(part_x)
                    loss = cross_entropy(logits.flatten(0, 1).to(dtype), part_y.flatten()) / accumulate
                loss.backward()
        if between:
            between(model)
        steps.step()
        steps.zero_grad()
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What was trained by its name in the bare model, whole; every process of a sharded model must call this."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            found[name.removeprefix("module.")] = whole.detach().clone()
    return found


def pooled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """One vector of all lora_A, one of all lora_B, and so on: long enough for the rule's root mean square."""
    parts = defaultdict(list)
    for name in sorted(weights):
        parts[name.rpartition(".")[2]].append(weights[name].flatten())
    return {kind: torch.cat(tensors) for kind, tensors in parts.items()}


def judge(got: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor], dtype: Any = None) -> None:
    """The error rule over everything trained, with the truth from one process in fp64."""
    assert got.keys() == plain.keys() == truth.keys()
    start = pooled(trained(build()))
    pools = [pooled(weights) for weights in (got, plain, truth)]
    for kind in pools[0]:
        assert_close(*(pool[kind] for pool in pools), what=kind, dtype=dtype)
        moved = (pools[2][kind] - start[kind]).abs().max()
        assert moved > 0.01, f"{kind} moved by {moved:.3f}: too little to show a wrong gradient"


_REFERENCES: dict[tuple[Any, ...], dict[str, Tensor]] = {}


def references(optimizer: Any = sgd) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What one process makes of the whole batches in plain PyTorch: in fp32, and the truth in fp64."""
    for dtype in (torch.float32, torch.float64):
        if (optimizer, dtype) not in _REFERENCES:
            model = train(build(plain=True, dtype=dtype), dtype, optimizer=optimizer)
            _REFERENCES[optimizer, dtype] = trained(model)
    return _REFERENCES[optimizer, torch.float32], _REFERENCES[optimizer, torch.float64]


def alike(tensor: Tensor) -> bool:
    """Whether every process holds the same values."""
    others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(others, tensor.contiguous())
    return all(torch.equal(other, tensor) for other in others)


def unsharded(model: nn.Module) -> Tiny:
    """The same weights in a model of one process; every process must call this."""
    whole = build()
    state = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}
    whole.load_state_dict({name.removeprefix("module."): copy.deepcopy(t) for name, t in state.items()})
    return whole
