"""LoRA layers that read one input (q, k, v; gate, up), run as one: found by structure, learned by the input's identity.

    first sibling called:  Y_1, Y_2, ... = lora_linear_stacked(X, ...); Y_1 is returned, the others are cached
    the others:            asked for the same X in the same state, each hands out its Y_p

The model's source stays as it is: attention still calls its q, k and v one by one. Candidates are fused layers of one
parent with equal in_features; who really reads one tensor is learned in the first forward, see reads.py.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.autograd.lora_linear_stacked import Projection, lora_linear_stacked_unchecked
from lora_kernels.integrations.peft import why_not as conditions
from lora_kernels.integrations.peft.linear import FusedLinear, drops, projection_of
from lora_kernels.integrations.peft.reads import Partners, Reads
from lora_kernels.integrations.peft.unclaimed import Made, Mode, State, discard_unclaimed
from lora_kernels.integrations.peft.unclaimed import unclaimed as _aside
from lora_kernels.reference.transforms import derived

SEAT = "_lora_group"  # in a layer's __dict__: its Seat


def _mode(x: Tensor) -> Mode:
    """What else an output depends on: gradients or none, autocast."""
    kind = "cpu" if x.is_cpu else x.device.type
    autocast = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None
    return torch.is_grad_enabled(), x.requires_grad, autocast


def _state(layer: FusedLinear) -> State:
    """What makes an output of the layer another one when it changes: the adapters and every weight they have."""
    modules: Any = layer._modules
    active = layer._active_adapter
    weights = [modules["base_layer"]._parameters.get("weight")]
    state: State = [layer._disable_adapters, len(layer.merged_adapters), layer.training]
    lora_A, lora_B = modules["lora_A"]._modules, modules["lora_B"]._modules
    for name in (active,) if isinstance(active, str) else active:
        if name in lora_A:
            state += name, conditions.scaling_of(layer, name)  # a tensor may change in place
            weights += lora_A[name]._parameters.get("weight"), lora_B[name]._parameters.get("weight")
    for weight in filter(torch.is_tensor, weights):
        state += id(weight), 0 if weight.is_inference() else weight._version
    return state


class Group:
    """Siblings under one parent. ``names`` are the children's, in seats' order; the layers are held weakly."""

    def __init__(self, path: str, names: tuple[str, ...], partners: Partners | None = None) -> None:
        self.path, self.names = path, names
        self.reads = Reads(len(names), partners)
        self.layers: list[weakref.ref[FusedLinear] | None] = [None] * len(names)
        self.traced: tuple[Tensor, Mode, dict[int, Tensor]] | None = None  # in a traced graph, for Unclaimed

    def __reduce__(self) -> tuple[Any, ...]:
        return Group, (self.path, self.names, self.reads.partners)

    def together(self) -> tuple[tuple[str, ...], ...]:
        """Names of the layers that run together, run by run."""
        runs = dict.fromkeys(seats for seats in self.reads.partners or () if seats)
        return tuple(tuple(self.names[seat] for seat in seats) for seats in runs)

    def describe(self) -> str:
        """One line for people."""
        names = ", ".join(self.names)
        if self.reads.partners is None:
            return f"{self.path}: {names} one by one until a forward has shown which read one input"
        runs = "; ".join(" + ".join(run) for run in self.together())
        return f"{self.path}: {runs} in one call" if runs else f"{self.path}: {names} read inputs apart"

    def start(self, seat: int, partners: Partners, x: Tensor) -> dict[int, tuple[Tensor, FusedLinear]] | None:
        """The outputs of all layers that can run with the one in ``seat`` now; None: it runs alone."""
        compiling = torch.compiler.is_compiling()
        found: dict[int, tuple[FusedLinear, Projection, float]] = {}
        for i in partners[seat] if compiling else self.reads.pending(seat, partners[seat], x):
            ref = self.layers[i]
            layer = None if ref is None else ref()
            if layer is None or conditions.module_reason(layer, "it") is not None:
                continue  # a hook may have work to do before the layer may run
            one = projection_of(layer, x)
            if one is not None:
                found[i] = layer, *one
        if seat not in found:
            return None
        _, first, p = found[seat]
        dtypes = first.W.dtype, first.A.dtype, first.A.dtype, first.W.device
        found = {
            i: (layer, q, dropout)
            for i, (layer, q, dropout) in found.items()
            if dropout == p and (q.W.dtype, q.A.dtype, q.B.dtype, q.W.device) == dtypes
        }
        if seat not in found or len(found) < 2:
            return None
        if not compiling and not self.reads.begin(partners, p > 0.0):
            return None
        made = lora_linear_stacked_unchecked(x, [q for _, q, _ in found.values()], p)
        return {i: (y, layer) for (i, (layer, _, _)), y in zip(found.items(), made, strict=True)}


class Seat:
    """A layer's place in its group: what FusedLinear.forward asks first. Copied and pickled with the layer; copies of
    siblings that were copied together meet in one new group, which knows what the old one knew."""

    def __init__(self, group: Group, index: int, layer: FusedLinear) -> None:
        self.group, self.index = group, index
        self.layer = group.layers[index] = weakref.ref(layer)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.group, self.index, self.layer()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def take(self, layer: FusedLinear, x: Tensor) -> Tensor | None:
        """The layer's output for x (..., K) out of a call for the whole group; None: the layer has to run alone."""
        if torch.compiler.is_compiling():
            return self._traced(x)
        made = _aside.made
        if x.is_inference():  # it has no version that would show changes
            if made is not None:
                discard_unclaimed()
            return None
        if self.layer() is not layer:  # a replica
            return None
        if derived():  # x and its version do not show tangents and transforms
            return None
        group, mode = self.group, _mode(x)
        partners = group.reads.partners
        if made is not None and made.group is group:  # also if another thread has learned or deleted partners since
            if made.holds_for(x, mode):
                y, state = made.outputs.pop(self.index, (None, None))
                if not made.outputs:
                    _aside.made = made.x = None
                    group.reads.complete()
                return y if state == _state(layer) else None  # a layer that was left out, or has changed, runs alone
            if partners is None:
                discard_unclaimed()
        if partners is not None:
            if not partners[self.index]:
                return None
            discard_unclaimed()
            partners = group.reads.partners  # which a miss may have shown to be wrong
        if partners is None:
            partners = group.reads.observe(self.index, x, drops(layer))
            if partners is None or not partners[self.index]:
                return None
            discard_unclaimed()
        pays = mode[0] or not x.is_cpu or drops(layer)  # otherwise a group costs more host work than it saves
        started = group.start(self.index, partners, x) if pays else None
        if started is None:
            return None
        y, _ = started.pop(self.index)
        outputs = {i: (other, _state(sibling)) for i, (other, sibling) in started.items()}
        _aside.made = Made(group, partners, x, mode, outputs)
        return y

    def _traced(self, x: Tensor) -> Tensor | None:
        """take, in a graph: what was learned before it is traced, nothing is noted, and a graph has no versions."""
        group, mode, partners = self.group, _mode(x), self.group.reads.partners
        if partners is None or not partners[self.index]:
            return None
        ready = group.traced
        if ready is not None and ready[0] is x and ready[1] == mode and self.index in ready[2]:
            left = dict(ready[2])
        else:
            started = group.start(self.index, partners, x)
            if started is None:
                return None
            left = {i: made for i, (made, _) in started.items()}
        y = left.pop(self.index)
        group.traced = (x, mode, left) if left else None
        return y


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
                alike[int(child.in_features)][name] = child  # type: ignore[arg-type]
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
