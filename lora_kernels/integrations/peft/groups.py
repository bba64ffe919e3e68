"""LoRA layers that read one input (q, k, v; gate, up), run as one: found by structure, learned by the input's identity.

    first sibling called:  Y_1, Y_2, ... = lora_linear_stacked(X, ...); Y_1 is returned, the others are set aside
    the others:            asked for the same X in the same state, each hands out its Y_p

The model's source stays as it is: attention still calls its q, k and v one by one. Candidates are fused layers of one
parent with equal in_features; who really reads one tensor is learned in the first forward, see reads.py.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.autograd.lora_linear_stacked import Projection, lora_linear_stacked
from lora_kernels.integrations.peft import why_not as conditions
from lora_kernels.integrations.peft.linear import FusedLinear, projection_of
from lora_kernels.integrations.peft.reads import Partners, Reads, in_backward

SEAT = "_lora_group"  # in a layer's __dict__: its Seat
Mode = tuple[bool, torch.dtype | None]
State = tuple[Any, ...]


class _Made(NamedTuple):
    """Outputs that nobody has asked for yet, by seat, each with the state of its layer; and what they were made of."""

    group: Group
    partners: Partners
    x: Tensor
    version: int
    mode: Mode
    recomputed: bool
    outputs: dict[int, tuple[Tensor, State]]

    def holds_for(self, group: Group, x: Tensor, mode: Mode) -> bool:
        return self.group is group and self.x is x and self.version == x._version and self.mode == mode


class _Aside(threading.local):
    """What one thread has set aside. One for all groups: siblings are called one after the other, so that whatever is
    left of a sibling that is not called goes when the next group begins."""

    made: _Made | None = None


_aside = _Aside()


def _leave() -> None:
    """Let go of what nobody asked for."""
    made, _aside.made = _aside.made, None
    if made is not None and not made.recomputed:  # which may stop as soon as it has what it needs
        made.group.reads.miss(made.partners)


def _mode(x: Tensor) -> Mode:
    """What an output depends on beside its operands: gradients or none, autocast."""
    kind = x.device.type
    return torch.is_grad_enabled(), torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _state(layer: FusedLinear) -> State:
    """What makes an output of the layer another one when it changes: the adapters and every weight they have."""
    modules: Any = layer._modules
    active = layer._active_adapter
    names = (active,) if isinstance(active, str) else tuple(active)
    weights = [modules["base_layer"]._parameters.get("weight")]
    for part in ("lora_A", "lora_B"):
        held = modules[part]._modules
        weights += [held[name]._parameters.get("weight") for name in names if name in held]
    versions = tuple((id(w), 0 if w.is_inference() else w._version) for w in weights if w is not None)
    scaling = tuple(layer.scaling.get(name) for name in names)
    return layer._disable_adapters, len(layer.merged_adapters), layer.training, names, scaling, versions


class Group:
    """Siblings under one parent. ``names`` are the children's, in seats' order; the layers are held weakly."""

    def __init__(self, path: str, names: tuple[str, ...], partners: Partners | None = None) -> None:
        self.path, self.names = path, names
        self.reads = Reads(len(names), partners)
        self.layers: list[weakref.ref[FusedLinear] | None] = [None] * len(names)
        self.traced: tuple[Tensor, Mode, dict[int, Tensor]] | None = None  # what _Aside is, in a graph being traced

    def __reduce__(self) -> tuple[Any, ...]:
        return Group, (self.path, self.names, self.reads.partners)

    def together(self) -> tuple[tuple[str, ...], ...]:
        """Names of the layers that run together, run by run."""
        runs = dict.fromkeys(seats for seats in self.reads.partners or () if seats)
        return tuple(tuple(self.names[seat] for seat in seats) for seats in runs)

    def describe(self) -> str:
        """One line for people."""
        if self.reads.partners is None:
            return f"{self.path}: {', '.join(self.names)} one by one until a forward has shown which read one input"
        runs = "; ".join(" + ".join(run) for run in self.together())
        return f"{self.path}: {runs} in one call" if runs else f"{self.path}: {', '.join(self.names)} read inputs apart"

    def start(self, seat: int, seats: tuple[int, ...], x: Tensor) -> tuple[dict[int, Tensor], float] | None:
        """The outputs of all layers that can run with the one in ``seat`` now, and dropout's p; None: it runs alone."""
        found: dict[int, tuple[Projection, float]] = {}
        for i in seats:
            ref = self.layers[i]
            layer = None if ref is None else ref()
            if layer is None or conditions.module_reason(layer, "it") is not None:
                continue  # a hook may have work to do before the layer may run
            one = projection_of(layer, x)
            if one is not None:
                found[i] = one
        if seat not in found:
            return None
        first, p = found[seat]
        dtype, device = first.A.dtype, first.W.device
        found = {
            i: (q, dropout)
            for i, (q, dropout) in found.items()
            if dropout == p and q.A.dtype is q.B.dtype is dtype and q.W.dtype is first.W.dtype and q.W.device == device
        }
        if seat not in found or len(found) < 2:
            return None
        made = lora_linear_stacked(x, [q for q, _ in found.values()], dropout_p=p)
        return dict(zip(found, made, strict=True)), p


class Seat:
    """A layer's place in its group: what FusedLinear.forward asks first. Copied and pickled with the layer; copies of
    siblings that were copied together meet in one new group, which knows what the old one knew."""

    def __init__(self, group: Group, index: int, layer: FusedLinear) -> None:
        self.group, self.index = group, index
        self.layer = group.layers[index] = weakref.ref(layer)

    def __getstate__(self) -> dict[str, Any]:
        return {"group": self.group, "index": self.index, "layer": self.layer()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def take(self, layer: FusedLinear, x: Tensor) -> Tensor | None:
        """The layer's output for x (..., K) out of a call for the whole group; None: the layer has to run alone."""
        if torch.compiler.is_compiling():
            return self._traced(x)
        if x.is_inference() or self.layer() is not layer:  # no version to see changes by; a replica
            return None
        group, mode = self.group, _mode(x)
        partners, made = group.reads.partners, _aside.made
        if partners is not None:
            if not partners[self.index]:
                return None
            if made is not None and made.holds_for(group, x, mode):
                y, state = made.outputs.pop(self.index, (None, None))
                if not made.outputs:
                    _aside.made = None
                    group.reads.complete()
                return y if state == _state(layer) else None  # a layer that was left out, or has changed, runs alone
            _leave()
            partners = group.reads.partners  # which a miss may have shown to be wrong
        if partners is None:
            partners = group.reads.observe(self.index, x, _drops(layer))
            if partners is None or not partners[self.index]:
                return None
            _leave()
        started = group.start(self.index, partners[self.index], x)
        if started is None:
            return None
        ys, p = started
        group.reads.ran(p > 0.0)
        y = ys.pop(self.index)
        outputs = {i: (other, _state(group.layers[i]())) for i, other in ys.items()}  # type: ignore[misc]
        _aside.made = _Made(group, partners, x, x._version, mode, in_backward(), outputs)
        return y

    def _traced(self, x: Tensor) -> Tensor | None:
        """take, in a graph: what was learned before it is traced, nothing is noted, and a graph has no versions."""
        group, mode = self.group, _mode(x)
        partners = group.reads.partners
        if partners is None or not partners[self.index]:
            return None
        ready = group.traced
        if ready is not None and ready[0] is x and ready[1] == mode and self.index in ready[2]:
            left = dict(ready[2])
        else:
            started = group.start(self.index, partners[self.index], x)
            if started is None:
                return None
            left = started[0]
        y = left.pop(self.index)
        group.traced = (x, mode, left) if left else None
        return y


def _drops(layer: FusedLinear) -> bool:
    """Whether a dropout of the layer is at work."""
    return any(isinstance(dropout, nn.Dropout) and dropout.training for dropout in layer.lora_dropout.values())


def form_groups(model: nn.Module) -> list[Group]:
    """Seat the fused layers of every parent that has several of equal in_features; gives all groups of the model.

    Siblings that have a group keep it, and what it has learned; where layers came or went, a new group is formed.
    """
    groups: list[Group] = []
    seated = set[FusedLinear]()  # a layer that hangs under two parents runs with the siblings of the first
    for path, parent in model.named_modules():
        alike = defaultdict[int, dict[str, FusedLinear]](dict)
        for name, child in parent.named_children():
            if isinstance(child, FusedLinear) and child not in seated:
                alike[child.in_features][name] = child
        for layers in alike.values():
            if len(layers) > 1:
                groups.append(_group(path, layers))
                seated.update(layers.values())
    for module in model.modules():
        if module not in seated:
            module.__dict__.pop(SEAT, None)
    return groups


def _group(path: str, layers: dict[str, FusedLinear]) -> Group:
    """The group that these layers, and no others, are in already, or a new one."""
    seats: list[Seat | None] = [layer.__dict__.get(SEAT) for layer in layers.values()]
    group = None if seats[0] is None else seats[0].group
    if group is not None and group.names == tuple(layers) and all(s is not None and s.group is group for s in seats):
        return group
    group = Group(path, tuple(layers))
    for i, layer in enumerate(layers.values()):
        layer.__dict__[SEAT] = Seat(group, i, layer)
    return group


def groups_of(model: nn.Module) -> list[Group]:
    """The groups that the model's layers are in."""
    seats = (module.__dict__.get(SEAT) for module in model.modules())
    return list({id(seat.group): seat.group for seat in seats if seat is not None}.values())


def dissolve(model: nn.Module) -> None:
    """Let every layer of the model run alone again."""
    for module in model.modules():
        module.__dict__.pop(SEAT, None)
