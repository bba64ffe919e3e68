"""Rules that assign each row of a layer's input to a request. Probes of the model find them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK, TILED = "block", "tiled"  # (0, 0, 1, 1) or (0, 1, 0, 1) for two requests with two rows each
Sizes = Mapping[str, int]  # {input of the model: size of its first dimension that does not count the requests}
Rule = tuple[int, str, int]  # (axis, name, factor): a request has factor * sizes[name] indices, or factor if name is ""


class Found(NamedTuple):
    """Index i of ``axis`` belongs to request i // repeats (BLOCK), or i modulo the number of requests (TILED)."""

    axis: int
    order: str
    repeats: int

    def owners(self, lead: torch.Size | tuple[int, ...], count: int) -> Tensor:
        """int64 (M,): the request of each row of an input with leading dimensions ``lead``."""
        return self.spread(torch.arange(count), lead)

    def spread(self, ids: Tensor, lead: torch.Size | tuple[int, ...]) -> Tensor:
        """Return (M,): for each row, the entry of ``ids`` (count,) for its request. May return ``ids`` itself."""
        if self.repeats != 1:
            ids = ids.repeat_interleave(self.repeats) if self.order == BLOCK else ids.repeat(self.repeats)
        behind = len(lead) - 1 - self.axis
        if self.axis == 0 and (behind == 0 or all(size == 1 for size in lead[1:])):
            return ids
        return ids.view(-1, *(1,) * behind).expand(lead).reshape(-1)


class Evidence(NamedTuple):
    """The result of one probe for a layer's inputs of one number of dimensions.

    places: for each place (axis, order) that explains every change, how many indices each request had there; None if
    the probe had one request only, which shows no place. images: the requests are items of the images.
    """

    images: bool
    places: Mapping[tuple[int, str], frozenset[int]] | None


class RowLayout:
    """The places of the requests that no probe has refuted. Empty ``places``: the rows follow no known order; None: no
    probe had several requests.

    ``plain``: the place that ``find`` returns, if it depends only on the number of requests; else None.
    """

    __slots__ = ("images", "places", "plain", "rules", "seen")

    def __init__(
        self,
        images: bool,
        places: frozenset[tuple[int, str]] | None,
        rules: frozenset[Rule],
        seen: Mapping[tuple[int, object], frozenset[int]],
    ) -> None:
        self.images, self.places, self.rules, self.seen = images, places, rules, seen
        self.plain: Found | None = None
        if places and len({axis for axis, _ in places}) == 1 and len(rules) == 1:
            ((axis, name, factor),) = rules
            orders = {order for _, order in places} if factor > 1 else {BLOCK}
            if not name and len(orders) == 1:
                self.plain = Found(axis, orders.pop(), factor)

    def content(self) -> tuple[object, ...]:
        """A tuple that is equal for equal layouts."""
        return self.images, self.places, self.rules, frozenset(self.seen.items())

    def find(self, lead: torch.Size | tuple[int, ...], count: int, sizes: Sizes, key: object) -> Found | None:
        """The place of ``count`` requests in an input with leading dimensions ``lead``; None if it is not known.

        sizes, key: sizes of the model's inputs in this call, from Call.view.
        """
        answers = set()
        for axis, order in self.places or ():
            repeats, rest = divmod(lead[axis], count)
            if rest or repeats not in self._repeats(axis, sizes, key):
                return None
            answers.add(Found(axis, order if repeats > 1 else BLOCK, repeats))
        return answers.pop() if len(answers) == 1 else None

    def has_seen(self, key: object) -> bool:
        """Whether a probe of a call with this key from Call.view has run the layer."""
        return any(at[1] == key for at in self.seen)

    def _repeats(self, axis: int, sizes: Sizes, key: object) -> frozenset[int]:
        exact = self.seen.get((axis, key))
        if exact is not None:
            return exact
        guesses = {factor * sizes.get(name, 1) for a, name, factor in self.rules if a == axis and _has(sizes, name)}
        return frozenset(guesses if len(guesses) == 1 else ())

    def after(self, evidence: Evidence, sizes: Sizes, key: object) -> RowLayout:
        """The layout without the places and rules that one more probe refutes."""
        if evidence.places is None:
            return self
        if self.places is None:
            return first_layout(evidence, sizes, key)
        places = self.places & frozenset(evidence.places)
        rules, seen = set(self.rules), dict(self.seen)
        for axis, repeats in _by_axis(evidence).items():
            seen[axis, key] = seen.get((axis, key), frozenset()) | repeats
            rules -= {rule for rule in rules if rule[0] == axis and not _holds(rule, repeats, sizes)}
        axes = {axis for axis, _ in places}
        return RowLayout(
            evidence.images and self.images,
            places,
            frozenset(rule for rule in rules if rule[0] in axes),
            {at: repeats for at, repeats in seen.items() if at[0] in axes},
        )


def first_layout(evidence: Evidence, sizes: Sizes, key: object) -> RowLayout:
    """The layout after a first probe: all rules that explain its numbers."""
    rules, seen = set[Rule](), dict[tuple[int, object], frozenset[int]]()
    for axis, repeats in _by_axis(evidence).items():
        seen[axis, key] = repeats
        if len(repeats) == 1:
            (number,) = repeats
            rules.add((axis, "", number))
            rules |= {(axis, name, number // size) for name, size in sizes.items() if size and number % size == 0}
    rules = {rule for rule in rules if rule[2]}
    places = None if evidence.places is None else frozenset(evidence.places)
    return RowLayout(evidence.images, places, frozenset(rules), seen)


def places_of(calls: Iterable[tuple[tuple[int, ...], Tensor]], full: Tensor) -> dict[tuple[int, str], frozenset[int]]:
    """{place: how many indices a request has there} for the places that explain which rows have changed.

    calls: leading dimensions, and int64 (M,) with a code for each row: bit j is set if the row changed in run j. full
    int64 (count,): the same bits for the runs in which each request was altered. A place explains the codes if each row
    changes only in runs of its request, and each request has a row that changes in all its runs.
    """
    found: dict[tuple[int, str], frozenset[int]] | None = None
    for lead, codes in calls:
        here = dict[tuple[int, str], frozenset[int]]()
        for axis, size in enumerate(lead):
            repeats, rest = divmod(size, len(full))
            for order in (BLOCK, TILED) if repeats and not rest else ():
                owners = Found(axis, order, repeats).owners(lead, len(full))
                expected = full[owners]
                complete = owners[codes == expected].unique().numel() == len(full)
                if complete and not (codes & ~expected).any():
                    here[axis, order] = frozenset({repeats})
        found = here if found is None else {at: found[at] | here[at] for at in found.keys() & here.keys()}
    return found or {}


def _by_axis(evidence: Evidence) -> dict[int, frozenset[int]]:
    return {axis: repeats for (axis, _), repeats in (evidence.places or {}).items()}


def _has(sizes: Sizes, name: str) -> bool:
    return not name or name in sizes


def _holds(rule: Rule, repeats: frozenset[int], sizes: Sizes) -> bool:
    """Whether the rule explains these numbers. True if the call does not have the rule's input."""
    _, name, factor = rule
    return not _has(sizes, name) or repeats == {factor * sizes.get(name, 1)}
