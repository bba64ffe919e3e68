"""Runs LoRA layers that read one input (q, k, v; gate, up) in one call; the identity of x shows which.

    first sibling called:  Y_1, Y_2, ... = lora_linear_stacked(X, ...); Y_1 is returned, the others are cached
    the others:            each returns its cached Y_p if it is called with the same X in the same state

The model's source stays unchanged: attention calls its q, k and v one by one. Candidates are fused layers of one parent
with equal in_features. The first forward shows which of them read one tensor; see sharing.py.
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
from lora_kernels.integrations.peft.sharing import Partners, SharingDetector
from lora_kernels.integrations.peft.unclaimed import GroupOutputs, Mode, State, discard_unclaimed, unclaimed
from lora_kernels.reference.transforms import derived

MEMBER = "_lora_group"  # in a layer's __dict__: its GroupMember


def _mode(x: Tensor) -> Mode:
    """Return what an output depends on besides x and the layer: gradient mode, x.requires_grad, autocast dtype."""
    kind = "cpu" if x.is_cpu else x.device.type
    autocast = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None
    return torch.is_grad_enabled(), x.requires_grad, autocast


def _state(layer: FusedLinear) -> State:
    """Return what the layer's output depends on: its adapters, and identity and version of each weight."""
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
    """Hold siblings under one parent, by weak references. ``names``: those of the children, in order of their index."""

    def __init__(self, path: str, names: tuple[str, ...], partners: Partners | None = None) -> None:
        self.path, self.names = path, names
        self.sharing = SharingDetector(len(names), partners)
        self.layers: list[weakref.ref[FusedLinear] | None] = [None] * len(names)
        self.traced: tuple[Tensor, Mode, dict[int, Tensor]] | None = None  # cached outputs while a graph is traced

    def __reduce__(self) -> tuple[Any, ...]:
        return Group, (self.path, self.names, self.sharing.partners)

    def together(self) -> tuple[tuple[str, ...], ...]:
        """Return the names of the layers that run together, one tuple per call."""
        runs = dict.fromkeys(indices for indices in self.sharing.partners or () if indices)
        return tuple(tuple(self.names[index] for index in indices) for indices in runs)

    def describe(self) -> str:
        """Return one line of text: which layers run in one call."""
        names = ", ".join(self.names)
        if self.sharing.partners is None:
            return f"{self.path}: {names} one by one until a forward has shown which read one input"
        runs = "; ".join(" + ".join(run) for run in self.together())
        return f"{self.path}: {runs} in one call" if runs else f"{self.path}: {names} read inputs apart"

    def start(self, index: int, partners: Partners, x: Tensor) -> dict[int, tuple[Tensor, FusedLinear]] | None:
        """Run layer ``index`` and its partners in one call: {index: (output, layer)}; None if it must run alone."""
        compiling = torch.compiler.is_compiling()
        found: dict[int, tuple[FusedLinear, Projection, float]] = {}
        for i in partners[index] if compiling else self.sharing.pending(index, partners[index], x):
            ref = self.layers[i]
            layer = None if ref is None else ref()
            if layer is None or conditions.module_reason(layer, "it") is not None:
                continue  # a hook may have to run before the layer does
            one = projection_of(layer, x)
            if one is not None:
                found[i] = layer, *one
        if index not in found:
            return None
        _, first, p = found[index]
        dtypes = first.W.dtype, first.A.dtype, first.A.dtype, first.W.device
        found = {
            i: (layer, q, dropout)
            for i, (layer, q, dropout) in found.items()
            if dropout == p and (q.W.dtype, q.A.dtype, q.B.dtype, q.W.device) == dtypes
        }
        if index not in found or len(found) < 2:
            return None
        if not compiling and not self.sharing.begin(partners, p > 0.0):
            return None
        made = lora_linear_stacked_unchecked(x, [q for _, q, _ in found.values()], p)
        return {i: (y, layer) for (i, (layer, _, _)), y in zip(found.items(), made, strict=True)}


class GroupMember:
    """Link a layer to its group; FusedLinear.forward calls ``take`` first.

    It is copied and pickled with the layer. Siblings copied together form one new group with the same partners.
    """

    def __init__(self, group: Group, index: int, layer: FusedLinear) -> None:
        self.group, self.index = group, index
        self.layer = group.layers[index] = weakref.ref(layer)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.group, self.index, self.layer()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def take(self, layer: FusedLinear, x: Tensor) -> Tensor | None:
        """Return the layer's output for x (..., K) from a call for the whole group; None if it must run alone."""
        if torch.compiler.is_compiling():
            return self._traced(x)
        made = unclaimed.made
        if x.is_inference():  # without a version counter, so changes cannot be detected
            if made is not None:
                discard_unclaimed()
            return None
        if self.layer() is not layer:  # a replica of the layer
            return None
        if derived():  # x._version does not count changes by tangents and transforms
            return None
        group, mode = self.group, _mode(x)
        partners = group.sharing.partners
        if made is not None and made.group is group:  # also if another thread has set or reset partners since
            if made.holds_for(x, mode):
                y, state = made.outputs.pop(self.index, (None, None))
                if not made.outputs:
                    unclaimed.made = made.x = None
                    group.sharing.complete()
                return y if state == _state(layer) else None  # None: not in the call, or changed since
            if partners is None:
                discard_unclaimed()
        if partners is not None:
            if not partners[self.index]:
                return None
            discard_unclaimed()
            partners = group.sharing.partners  # discarding may have reset them
        if partners is None:
            partners = group.sharing.observe(self.index, x, drops(layer))
            if partners is None or not partners[self.index]:
                return None
            discard_unclaimed()
        pays = mode[0] or not x.is_cpu or drops(layer)  # else a group costs more host time than it saves
        started = group.start(self.index, partners, x) if pays else None
        if started is None:
            return None
        y, _ = started.pop(self.index)
        outputs = {i: (other, _state(sibling)) for i, (other, sibling) in started.items()}
        unclaimed.made = GroupOutputs(group, partners, x, mode, outputs)
        return y

    def _traced(self, x: Tensor) -> Tensor | None:
        """Return what ``take`` returns, while a graph is traced: with known partners, without records and versions."""
        group, mode, partners = self.group, _mode(x), self.group.sharing.partners
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
    """Group the fused layers of equal in_features under each parent; return all groups of the model.

    Siblings keep an existing group and its partners. Where layers were added or removed, a new group is formed.
    """
    groups: list[Group] = []
    grouped = set[FusedLinear]()  # a layer with two parents runs with the siblings of the first
    for path, parent in model.named_modules():
        alike = defaultdict[int, dict[str, FusedLinear]](dict)
        for name, child in parent.named_children():
            if isinstance(child, FusedLinear) and child not in grouped:
                alike[int(child.in_features)][name] = child  # type: ignore[arg-type]
        for layers in alike.values():
            if len(layers) > 1:
                groups.append(_group(path, layers))
                grouped.update(layers.values())
    for module in model.modules():
        if module not in grouped:
            module.__dict__.pop(MEMBER, None)
    return groups


def _group(path: str, layers: dict[str, FusedLinear]) -> Group:
    """Return the group that already holds exactly these layers, or a new one."""
    members: list[GroupMember | None] = [layer.__dict__.get(MEMBER) for layer in layers.values()]
    group = None if members[0] is None else members[0].group
    if group is not None and group.names == tuple(layers) and all(m is not None and m.group is group for m in members):
        return group
    group = Group(path, tuple(layers))
    for i, layer in enumerate(layers.values()):
        layer.__dict__[MEMBER] = GroupMember(group, i, layer)
    return group


def groups_of(model: nn.Module) -> list[Group]:
    """Return the groups of the model's layers."""
    members = (module.__dict__.get(MEMBER) for module in model.modules())
    return list({id(member.group): member.group for member in members if member is not None}.values())


def dissolve(model: nn.Module) -> None:
    """Remove all groups: every layer of the model runs alone again."""
    for module in model.modules():
        module.__dict__.pop(MEMBER, None)
