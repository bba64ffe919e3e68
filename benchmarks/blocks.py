"""Several LoRA linears as one operator: projections of one X (q,k,v; gate,up) and the gated MLP, ours and others'.

Every rival of a single layer is a rival here, one layer after another: ``separately``. What one operator for all of
them can win is X read once for every XA, one sum for dX, and launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lora_kernels
from benchmarks.cases import Case
from benchmarks.rivals import ADDMM_CHAIN, FROZEN, PEFT, PEFT_FP32, Implementation, Layer, contenders, ours
from lora_kernels.planning.choose import split_name
from lora_kernels.planning.stacked_cost import PLANS
from lora_kernels.testing import Problem, make_problem

Answers = dict[str, Tensor]


@dataclass(frozen=True)
class Block:
    """The tensors of a Case of several linears: ``parts`` in order (q, k, v; gate, up, down), the first one's X."""

    op: str
    parts: tuple[Problem, ...]
    p: float

    @property
    def X(self) -> Tensor:
        return self.parts[0].X

    @property
    def seed(self) -> Tensor:
        return self.parts[0].seed

    @property
    def scaling(self) -> float:
        return self.parts[0].scaling

    @property
    def dY(self) -> Tensor | tuple[Tensor, ...]:
        return self.parts[-1].dY if self.op == "lora_mlp" else tuple(part.dY for part in self.parts)


def block_of(case: Case, device: torch.device, bias: bool = False) -> Block:
    """The case's tensors; every LoRA term as large as its base term."""
    made = [
        make_problem(case.M, N, K, case.r, case.dtype, device, bias=bias, dropout_p=case.p, seed=number)
        for number, (N, K) in enumerate(case.linears)
    ]
    parts = [replace(part, X=made[0].X, seed=made[0].seed) if part.shape[2] == case.K else part for part in made]
    return Block(case.op, tuple(parts), case.p)


def compose(op: str, layers: Sequence[Callable[[Tensor], Any]], X: Tensor) -> Tensor | tuple[Tensor, ...]:
    """(Y_0, Y_1, ...) of X, or down(silu(gate(X)) * up(X)), by plain PyTorch around the layers."""
    if op == "lora_mlp":
        gate, up, down = layers
        return down(F.silu(gate(X)) * up(X))
    return tuple(layer(X) for layer in layers)


def gradient_names(parts: int) -> tuple[str, ...]:
    """What a block's parameters are called in checks: A and B of one part after another."""
    return tuple(f"d{name}{part}" for part in range(parts) for name in "AB")


def answers(block: Block, keeps: Sequence[Tensor | None], dtype: torch.dtype) -> Answers:
    """Outputs and gradients by autograd in ``dtype``; keeps[i] (M, K_i) is the mask on the input of part i."""
    adapters_in = torch.float64 if dtype == torch.float64 else None
    X = block.X.detach().to(dtype, copy=True).requires_grad_()
    layers: list[Callable[[Tensor], Tensor]] = []
    params: list[Tensor] = []
    for part, keep in zip(block.parts, keeps, strict=True):
        A, B = (t.detach().to(adapters_in or t.dtype, copy=True).requires_grad_() for t in (part.A, part.B))
        params += [A, B]
        layers.append(partial(_plain_linear, part=part, keep=keep, A=A, B=B, dtype=dtype))
    made = compose(block.op, layers, X)
    outputs, upstream = _tuple(made), [dY.to(dtype) for dY in _tuple(block.dY)]
    gradients = torch.autograd.grad(outputs, [X, *params], upstream)
    names = [*output_names(len(outputs)), "dX", *gradient_names(len(block.parts))]
    return dict(zip(names, [*(Y.detach() for Y in outputs), *gradients], strict=True))


def _plain_linear(X: Tensor, part: Problem, keep: Tensor | None, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    bias = None if part.bias is None else part.bias.to(dtype)
    dropped = X if keep is None else torch.where(keep, X * (1 / (1 - part.p)), 0)
    return F.linear(X, part.W.to(dtype), bias) + part.scaling * F.linear(F.linear(dropped, A.to(dtype)), B.to(dtype))


def part_seeds(block: Block, seed: Tensor) -> list[Tensor]:
    """The seed of each part's mask: one mask on X for all that read it, another draw for an MLP's inner product."""
    inner = seed + 1
    return [inner if block.op == "lora_mlp" and number == 2 else seed for number in range(len(block.parts))]


def block_masks(block: Block, mask: Callable[[Tensor, float, int, int], Tensor]) -> list[Tensor]:
    """The keep mask (M, K_i) on the input of each part, drawn by ``mask``."""
    rows = block.X.shape[0]
    seeds = part_seeds(block, block.seed)
    return [mask(seed, block.p, rows, part.W.shape[1]) for seed, part in zip(seeds, block.parts, strict=True)]


def output_names(count: int) -> tuple[str, ...]:
    """ "Y", or "Y0", "Y1", ... of several."""
    return ("Y",) if count == 1 else tuple(f"Y{number}" for number in range(count))


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def separately(single: Implementation, name: str | None = None) -> Implementation:
    """The block out of single layers, PyTorch's own operators between them."""

    def build(block: Any, seed: Tensor | None) -> Layer:
        seeds = [None] * len(block.parts) if seed is None else part_seeds(block, seed)
        layers = [single.build(part, own) for part, own in zip(block.parts, seeds, strict=True)]
        params = tuple(param for layer in layers for param in layer.params[:2])
        forwards = [layer.forward for layer in layers]
        return Layer(partial(compose, block.op, forwards), params, gradient_names(len(layers) if params else 0))

    return replace(single, name=name or single.name, build=build)


def _stacked_frozen(block: Any, seed: Tensor | None) -> Layer:
    sizes = [part.W.shape[0] for part in block.parts]
    W = torch.cat([part.W for part in block.parts])
    bias = None if block.parts[0].bias is None else torch.cat([part.bias for part in block.parts])
    return Layer(lambda X: F.linear(X, W, bias).split(sizes, dim=1))


def _ours(block: Any, seed: Tensor | None, backend: str) -> Layer:
    leaves = [(part.A.detach().requires_grad_(), part.B.detach().requires_grad_()) for part in block.parts]
    projections = [
        lora_kernels.Projection(part.W, A, B, part.bias, part.scaling)
        for part, (A, B) in zip(block.parts, leaves, strict=True)
    ]
    how = {"dropout_p": block.p, "seed": seed, "backend": backend}
    params = tuple(leaf for pair in leaves for leaf in pair)
    names = gradient_names(len(leaves))
    if block.op == "lora_mlp":
        return Layer(lambda X: lora_kernels.lora_mlp(X, *projections, **how), params, names)
    return Layer(lambda X: lora_kernels.lora_linear_stacked(X, projections, **how), params, names)


FROZEN_BLOCK = separately(FROZEN)
FROZEN_STACKED = Implementation("frozen stacked linear", _stacked_frozen, lora=False)
SEPARATE = "lora_kernels separate layers"


def our_block(backend: str) -> Implementation:
    """lora_linear_stacked or lora_mlp by ``backend``."""
    return Implementation("lora_kernels", partial(_ours, backend=backend), backend=backend)


def rivals_of(case: Case, backends: Sequence[str]) -> list[Implementation]:
    """The contenders of a case: the frozen layers, ours by ``backends``, and the rivals that are quick to build.

    Of a block ours runs as one operator and layer by layer, a rival layer by layer.
    """
    if case.op == "lora_linear":
        return contenders(case.dtype, backends)
    frozen = [FROZEN_BLOCK, FROZEN_STACKED] if case.op == "lora_linear_stacked" else [FROZEN_BLOCK]
    whole = [backend for backend in backends if (split_name(backend)[1] or PLANS[0]) in PLANS]
    mine = [*(our_block(backend) for backend in whole), separately(ours(backends[0]), SEPARATE)]
    rivals = [PEFT, *([PEFT_FP32] if case.dtype.itemsize == 2 else []), ADDMM_CHAIN]
    return [*frozen, *mine, *(separately(rival) for rival in rivals)]
