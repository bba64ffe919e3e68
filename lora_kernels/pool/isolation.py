"""The isolation probe: which rows of every pooled layer change when some requests are altered and others are not.

    run 0        the inputs as they are
    run j        other content for the requests of subset j; each request is in half of the subsets, no two
                 requests are in the same ones
    code[row]    bit j set if the row's bits in run j differ from those in run 0

A row that belongs to request i alone changes only in runs in which request i is altered. If rows share products whose
shape depends on routing, all rows change a little in the last bits; then only changes larger than STRONG times the norm
of a row are counted. The contents of requests are altered, not swapped: attention treats all positions alike, so after
a swap the axis of the sequence positions would look like the axis of the requests.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lora_kernels.pool.active import ActiveBatch
from lora_kernels.pool.rows import places_of

RUNS = 8  # the minimum; with fewer, rows routed by content can look ordered by chance in all runs
STRONG = 0.01
SEED = 0x10AD_C0DE  # unlikely to be the seed with which the inputs were drawn
Seen = dict[str, list[tuple[tuple[int, ...], Tensor, Tensor]]]  # {path: (leading dims, hashes, sketches) of each call}
Alter = Callable[[Tensor, Tensor, torch.Generator], Tensor | None]  # (an input, which requests, ...): altered or None


class Recording:
    """Takes the place of a batch while a probe runs: records the inputs of the layers, which compute the base alone."""

    mixed, frame = False, None

    def __init__(self, outer: Any) -> None:
        self.touched, self.outer = self, outer
        self.seen: Seen = {}

    def __contains__(self, _: object) -> bool:
        return True

    def of(self, x: Tensor, layer: Any) -> None:
        """Record the input; returns None (no ids), so the layer computes the base alone."""
        self.seen.setdefault(layer.pool_path, []).append((tuple(x.shape[:-1]), *_digest(x.detach())))


At = tuple[str, int]  # path, x.dim()


class Isolation(NamedTuple):
    """The result of a probe.

    places: {(path, x.dim()): places of the requests}; empty if the rows follow no known order; None if the probe had
    one request only. Layers in which no row changes are left out. apart: the (path, x.dim()) in which each row depends
    on one request alone. varies: paths of layers whose number of rows depends on content.
    """

    places: Mapping[At, Mapping[tuple[int, str], frozenset[int]] | None]
    apart: frozenset[At]
    varies: frozenset[str] = frozenset()

    def known(self) -> int:
        """Number of (path, x.dim()) with a known place."""
        return sum(map(bool, self.places.values()))

    def complete(self) -> bool:
        """Whether a place is known for every (path, x.dim()) in which a row changes."""
        return 0 < self.known() == len(self.places)

    def agreeing(self, other: Isolation) -> Isolation:
        """Keep the places that a probe of other inputs confirms, and those of layers that this probe did not run."""
        places = dict(self.places)
        for at, mine in self.places.items():
            theirs = {} if at[0] in other.varies else other.places.get(at)
            if mine is not None and theirs is not None:
                places[at] = {place: repeats for place, repeats in mine.items() if place in theirs}
        return self._replace(places=places)


NOTHING = Isolation({}, frozenset())


def isolate(
    model: nn.Module, active: ActiveBatch, args: Any, kwargs: Any, count: int, alter: Alter, flat: bool = False
) -> Isolation:
    """Run the model on its inputs and on altered ones, and find which rows each of ``count`` requests changes.

    flat: the requests are tokens, and all leading dimensions are counted as one. The inputs, random states and training
    flags stay as they are. Errors of the model are passed on.
    """
    first = _run(model, active, args, kwargs)
    codes = {
        path: [(torch.zeros_like(rows), torch.zeros_like(rows)) for _, rows, _ in calls]
        for path, calls in first.items()
    }
    full, varies = torch.zeros(count, dtype=torch.int64), set[str]()
    for number, subset in enumerate(_subsets(count)):
        generator = torch.Generator().manual_seed(SEED + number)

        def change(leaf: Any, subset: Tensor = subset, generator: torch.Generator = generator) -> Any:
            changed = alter(leaf, subset, generator) if isinstance(leaf, Tensor) else None
            return leaf if changed is None else changed

        seen = _run(model, active, *tree_map(change, (args, kwargs)))
        full |= subset.long() << number
        for path in first.keys() | seen.keys():
            before, after = first.get(path, []), seen.get(path, [])
            if [lead for lead, *_ in before] != [lead for lead, *_ in after]:
                varies.add(path)  # its number of rows depends on content
                continue
            for (code, strong), (_, old, was), (_, new, now) in zip(codes[path], before, after, strict=True):
                changed = old != new
                code |= changed.long() << number
                little = (now - was).norm(dim=1) <= STRONG * was.norm(dim=1)
                strong |= (changed & ~little).long() << number
    places, apart = dict[At, Any](), set[At]()
    for path in first.keys() | varies:
        calls = [(lead, *pair) for (lead, *_), pair in zip(first.get(path, []), codes.get(path, []), strict=True)]
        for dim in {len(lead) + 1 for lead, *_ in calls} or {2, 3}:
            of_dim = [call for call in calls if len(call[0]) + 1 == dim]
            if path in varies:
                places[path, dim] = {}
            elif any(code.any() for _, code, _ in of_dim):
                leads = [(len(code),) if flat else lead for lead, code, _ in of_dim]
                exact, marked = [code for _, code, _ in of_dim], [code for *_, code in of_dim]
                found = places_of(list(zip(leads, exact, strict=True)), full)
                places[path, dim] = found or places_of(list(zip(leads, marked, strict=True)), full)
                if ((torch.cat(exact).unique()[:, None] & ~full) == 0).any(1).all():
                    apart.add((path, dim))
    return Isolation(places, frozenset(apart), frozenset(varies))


def _subsets(count: int) -> Iterator[Tensor]:
    """Yield bool (count,) for each run. Each binary digit of the request numbers (from 1) gives two subsets: the
    requests in which it is 0, and those in which it is 1. All are repeated until there are at least RUNS."""
    digits = count.bit_length()
    for number in range(max(2 * digits, RUNS + RUNS % 2)):
        bit = (torch.arange(1, count + 1) >> (number // 2 % digits)) & 1
        yield bit == number % 2


def _run(model: nn.Module, active: ActiveBatch, args: Any, kwargs: Any) -> Seen:
    recording = Recording(active.get())
    with _apart(model, active, recording):
        args, kwargs = tree_map(_copied, (args, kwargs))
        model(*args, **kwargs)
    return recording.seen


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf)


@contextmanager
def _apart(model: nn.Module, active: ActiveBatch, recording: Recording) -> Iterator[None]:
    """Run the block in eval mode without gradients; then restore training flags and random states."""
    training = [module for module in model.modules() if module.training]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    state, token = random.getstate(), active.var.set(recording)
    with ExitStack() as stack:
        stack.callback(active.var.reset, token)
        stack.callback(random.setstate, state)
        for module in training:
            stack.callback(setattr, module, "training", True)
            module.training = False
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def _digest(x: Tensor) -> tuple[Tensor, Tensor]:
    """For each of the M rows of x (..., K): a hash int64 (M,), equal for equal bits, and for different bits with a
    probability of about 2^-60; and a sketch (M, 8) whose differences are about as large as those of the rows."""
    K, bits = x.shape[-1], {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    generator = torch.Generator().manual_seed(K)
    weights = torch.randint(-(2**62), 2**62, (K,), generator=generator).to(x.device) * 2 + 1
    signs = torch.randn(K, 8, generator=generator).to(x.device)
    hashes, sketches = [], []
    for rows in x.reshape(-1, K).contiguous().split(4096):
        hashes.append((rows.view(bits).to(torch.int64) * weights).sum(-1))
        sketches.append(rows.to(torch.float32) @ signs)
    return torch.cat(hashes).cpu(), torch.cat(sketches).cpu()
