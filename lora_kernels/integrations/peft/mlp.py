"""Runs gated MLPs of a PEFT model, whose gate, up and down are LoRA layers, as one call in training.

    y = down(silu(gate(x)) * up(x))        one call of lora_mlp, which saves x and the outputs of gate and up

Three separate layers also save silu(gate(x)) and the product, which is about twice as much memory. Blocks are found by
structure. A trial run shows that the block's forward computes this formula, and which of two layers is the gate. The
block keeps its object, its children and its source. Only its class changes, to one that checks at each call whether all
three layers can be fused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.activations import ACT2FN

from lora_kernels.autograd.lora_linear_stacked import Projection
from lora_kernels.autograd.lora_mlp import lora_mlp
from lora_kernels.integrations.peft import why_not as conditions
from lora_kernels.integrations.peft.linear import BLOCK, FusedLinear, drops, projection_of

NAMES = "_lora_mlp"  # in a block's __dict__: its Names
SILU = frozenset((nn.SiLU, type(ACT2FN["silu"])))
SIZES = (1e-2, 1.0, 1.0, 30.0, 1e3, 3e4)  # factors of the trial's rows: large values reveal a clamp


class Names(NamedTuple):
    """Names of a block's children."""

    gate: str
    up: str
    down: str
    act: str

    def describe(self) -> str:
        """Return, for example, "gate_proj + up_proj + down_proj in one call"."""
        return f"{self.gate} + {self.up} + {self.down} in one call"


class GatedMLP(nn.Module):
    """First base class of a fused block's class: it runs lora_mlp in all states in which both compute the same.

    It is never built: form_mlps changes the class of a model's blocks.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return y (..., N) for x (..., K). The block's own forward runs a call for which lora_mlp cannot be used or
        would not save memory."""
        names = self.__dict__.get(NAMES)
        if names is not None and len(args) == 1 and not kwargs:
            y = whole(self, names, args[0])
            if y is not None:
                return y
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the block with its own class; loading derives the fused class from it."""
        reduced: Any = super().__reduce_ex__(protocol)
        build, args, *rest = reduced
        own = own_class(type(self))
        return _rebuild, (own, build, tuple(own if arg is type(self) else arg for arg in args)), *rest


@functools.cache
def block_class(own: type) -> type:
    """Return the fused class of a block of class ``own``, with the same name: sharding policies match class names."""
    held = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (GatedMLP, own), held)


def own_class(kind: type) -> type:
    """Return the class that a block had before; ``kind`` itself if it is not one of ours."""
    return kind.__bases__[1] if kind.__bases__[:1] == (GatedMLP,) else kind


def _rebuild(own: type, build: Any, args: tuple[Any, ...]) -> nn.Module:
    module = build(*args)
    module.__class__ = block_class(own)
    return module


def whole(block: nn.Module, names: Names, x: Tensor) -> Tensor | None:
    """Return the block's output (..., N) by lora_mlp for x (..., K), or None if lora_mlp cannot run it now."""
    modules: dict[str, Any] = block._modules
    gate, up, down, act = map(modules.get, names)
    # Without gradients lora_mlp saves no memory. With dropout it runs even then: checkpointing first runs the forward
    # without gradients, and its recomputation must draw the same masks.
    if not isinstance(gate, FusedLinear) or not (torch.is_grad_enabled() or drops(gate)):
        return None
    if len(modules) != len(names) or type(act) not in SILU or _hooked((gate, up, down, act)):
        return None
    found: list[Projection] = []
    p = 0.0
    layers: tuple[Any, ...] = gate, up, down
    for layer in layers:
        one = projection_of(layer, x)  # for down too: only type and dtype of an input are checked
        if one is None or (found and one[1] != p):
            return None
        found.append(one[0])
        p = one[1]
    W, A = found[0].W, found[0].A
    if any(
        q.W.dtype is not W.dtype or q.W.device != x.device or q.A.dtype is not A.dtype or q.B.dtype is not A.dtype
        for q in found
    ):
        return None
    if found[0].W.shape != found[1].W.shape or x.dim() == 0 or x.shape[-1] != W.shape[1]:
        return None
    rows = (
        x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    )  # a view made in a custom Function cannot be changed in place
    y = lora_mlp(rows, *found, dropout_p=p)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _hooked(modules: Iterable[nn.Module | None]) -> bool:
    """Return whether one of the modules must be called as a module (hooks, a patched forward)."""
    return any(module is not None and conditions.module_reason(module, "it") is not None for module in modules)


def form_mlps(model: nn.Module) -> dict[str, Names]:
    """Make every gated MLP of the model run as one call if it can; return these by path.

    A block that already does is left unchanged; one whose children have changed is tried again.
    """
    formed: dict[str, Names] = {}
    for path, block in list(model.named_modules()):
        names: Names | None = block.__dict__.get(NAMES)
        found = _candidates(block)
        if names is None or names not in found:
            _undo(block)
            names = None if not found or conditions.call_reason() is not None else _tried(block, found)
        if names is None:
            continue
        if NAMES not in block.__dict__:
            kind: Any = type(block)
            block.__class__ = block_class(kind)
        block.__dict__[NAMES] = formed[path] = names
        for name in names[:3]:
            block._modules[name].__dict__[BLOCK] = names.describe()  # type: ignore[union-attr]
    return formed


def mlps_of(model: nn.Module) -> dict[str, Names]:
    """Return the blocks of the model that run as one call, by path."""
    return {path: module.__dict__[NAMES] for path, module in model.named_modules() if NAMES in module.__dict__}


def dissolve_mlps(model: nn.Module) -> None:
    """Restore the own class of every block of the model."""
    for module in model.modules():
        _undo(module)
        module.__dict__.pop(BLOCK, None)


def _undo(block: nn.Module) -> None:
    if block.__dict__.pop(NAMES, None) is not None:
        for child in block.children():
            child.__dict__.pop(BLOCK, None)
    own = own_class(type(block))
    if own is not type(block):
        block.__class__ = own


def _candidates(block: nn.Module) -> tuple[Names, ...]:
    """Return both assignments of the block's children to gate, up and down, or none if it is not a gated MLP."""
    modules: dict[str, Any] = block._modules
    layers = {name: module for name, module in modules.items() if isinstance(module, FusedLinear)}
    acts = [name for name, module in modules.items() if type(module) in SILU]
    if len(modules) != 4 or len(layers) != 3 or len(acts) != 1 or len(set(layers.values())) != 3:
        return ()
    for down, last in layers.items():
        first, second = (name for name in layers if name != down)
        sizes = {(layers[name].in_features, layers[name].out_features) for name in (first, second)}
        if sizes == {(last.out_features, last.in_features)} and last.in_features != last.out_features:
            return Names(first, second, down, acts[0]), Names(second, first, down, acts[0])
    return ()


class _StandIn(nn.Module):
    """Replace a layer by X W^T, W small and random. It has no ``weight``, so a forward that reads one fails."""

    def __init__(self, held: Tensor) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.held)


def _tried(block: nn.Module, ways: tuple[Names, ...]) -> Names | None:
    """Return the one assignment that computes the bits of the block's own forward; None if none or both do.

    The trial runs on a copy of the block, on the CPU, with small layers of random weights.
    """
    if not _can_be_tried(block):
        return None
    one, other, last, act = ways[0]
    W: Any = conditions.weight_of(block._modules[one].base_layer)  # type: ignore[union-attr, arg-type]
    generator = torch.Generator().manual_seed(0)
    K, F = 6, 10
    weights = [torch.randn(*shape, generator=generator, device="cpu") for shape in ((F, K), (F, K), (K, F))]
    rows = torch.randn(1, len(SIZES), K, generator=generator, device="cpu")
    rows *= torch.tensor(SIZES, device="cpu")[:, None]
    agree = [True, True]
    with torch.inference_mode(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        for dtype in {torch.float64, W.dtype} & conditions.FLOATS:
            a, b, c = (_StandIn(weight.to(dtype)) for weight in weights)
            x = rows.to(dtype)
            shadow: Any = nn.Module.__new__(type(block))
            shadow.__dict__.update(block.__dict__)
            shadow.__dict__["_modules"] = {one: a, other: b, last: c, act: block._modules[act]}
            expected = c(silu(a(x)) * b(x)), c(silu(b(x)) * a(x))
            for training in (False, True):
                shadow.training = training
                try:
                    y = type(block).forward(shadow, x.clone())
                except Exception:  # any error of the block's code: not a gated MLP
                    return None
                agree = [held and _equal(y, wanted) for held, wanted in zip(agree, expected, strict=True)]
    return ways[agree.index(True)] if sum(agree) == 1 else None


def _equal(y: Any, expected: Tensor) -> bool:
    """Return whether both are equal in every bit; infinities and NaNs, of large inputs, are equal to themselves."""
    alike = isinstance(y, Tensor) and y.shape == expected.shape and y.dtype is expected.dtype
    return alike and torch.allclose(y, expected, rtol=0.0, atol=0.0, equal_nan=True)


def _can_be_tried(block: nn.Module) -> bool:
    """Return whether the block's class can be subclassed, its forward takes one tensor, and it has no own tensors."""
    kind = type(block)
    if type(kind) is not type or any("__init_subclass__" in vars(base) for base in kind.__mro__[:-1]):
        return False
    takes = list(inspect.signature(kind.forward).parameters.values())[1:]
    if len(takes) != 1 or takes[0].kind not in (takes[0].POSITIONAL_ONLY, takes[0].POSITIONAL_OR_KEYWORD):
        return False
    own = (*block._parameters.values(), *block._buffers.values())
    return "forward" not in block.__dict__ and all(tensor is None for tensor in own)
