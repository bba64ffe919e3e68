"""Elements of a regular expression as functions from their possible start positions to their possible end positions.

    literal(S) = (S & places of the character) << 1        sequence(S) = last(... first(S))
    branch(S)  = union of its alternatives                 repeat(S)   = union of the iterates of its body

A set S of positions is an integer: bit i is set for the position before character i. The result of an element depends
only on the position, not on how the match reached it, so nothing is tried twice. Elements for which this does not hold
(backreferences) are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

from lora_kernels.patterns.budget import Budget, Text

re_parser: Any = re._parser  # type: ignore[attr-defined]
re_compiler: Any = re._compiler  # type: ignore[attr-defined]

MAX_DEPTH = 40  # groups inside groups
_ANCHORS = {
    "AT_BEGINNING": "^", "AT_BEGINNING_STRING": r"\A", "AT_BOUNDARY": r"\b", "AT_NON_BOUNDARY": r"\B", "AT_END": "$",
    "AT_END_STRING": r"\Z",
}  # fmt: skip
_DEPENDS_ON_PATH_TAKEN = {
    "GROUPREF": "a backreference", "GROUPREF_IGNORE": "a backreference", "GROUPREF_EXISTS": "a conditional group",
    "ATOMIC_GROUP": "an atomic group", "POSSESSIVE_REPEAT": "a possessive quantifier",
}  # fmt: skip

Step = Callable[[Text, int], int]


def sequence_step(items: Iterable[Any], flags: int, depth: int) -> Step:
    """The items of ``re``'s parser in sequence. Raises ValueError with the reason for an item that is not supported."""
    if depth > MAX_DEPTH:
        raise ValueError(f"groups nested more than {MAX_DEPTH} deep")
    steps = list[Step]()
    for literal, group in groupby(items, lambda item: str(item[0]) == "LITERAL" and not flags & re.IGNORECASE):
        if literal:
            steps.append(_literal("".join(chr(value) for _, value in group)))
        else:
            steps += [_element(item, flags, depth + 1) for item in group]
    steps = steps or [_empty]
    if len(steps) == 1:
        return steps[0]

    def sequence(text: Text, S: int) -> int:
        for step in steps:
            if not S:
                return 0
            S = step(text, S)
        return S

    return sequence


def _element(item: Any, flags: int, depth: int) -> Step:
    kind, value = str(item[0]), item[1]
    if kind == "SUBPATTERN":
        _, added, removed, body = value
        if added & re_parser.TYPE_FLAGS:
            flags &= ~re_parser.TYPE_FLAGS
        return sequence_step(body, (flags | added) & ~removed, depth)
    if kind == "BRANCH":
        return _branch([sequence_step(body, flags, depth) for body in value[1]])
    if kind in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, body = value
        if most is re_parser.MAXREPEAT and least <= 1 and len(body) == 1 and _is_character(body[0]):
            return _run(_mask(body[0], flags), int(least))
        return _repeat(sequence_step(body, flags, depth), int(least), int(most))
    if kind in ("ASSERT", "ASSERT_NOT"):
        return _look(value[1], value[0], kind == "ASSERT", flags, depth)
    if kind == "FAILURE":
        return lambda text, S: 0
    if kind == "AT":
        return _anchor(_ANCHORS[str(value)], flags & (re.MULTILINE | re.ASCII))
    if kind in _DEPENDS_ON_PATH_TAKEN:
        raise ValueError(f"{_DEPENDS_ON_PATH_TAKEN[kind]} is not supported")
    mask = _mask(item, flags)

    def character(text: Text, S: int) -> int:
        text.budget.left -= 1
        return (S & mask(text)) << 1

    return character


def _empty(text: Text, S: int) -> int:
    text.budget.left -= 1
    return S


def _literal(value: str) -> Step:
    def literal(text: Text, S: int) -> int:
        found, S = 0, S & text.places.get(value[0], 0)
        text.budget.left -= 1
        for i in bits(S):
            text.budget.left -= 1
            if text.value.startswith(value, i):
                found |= 1 << i + len(value)
        return found

    return literal


def _branch(steps: list[Step]) -> Step:
    def branch(text: Text, S: int) -> int:
        found = 0
        for step in steps:
            found |= step(text, S)
        return found

    return branch


def _run(mask: Callable[[Text], int], least: int) -> Step:
    """A character class repeated without limit: in one addition the carry runs through each run of its positions."""

    def run(text: Text, S: int) -> int:
        text.budget.left -= 1
        C = mask(text)
        if least:
            S = (S & C) << 1
        return (((S & C) + C) ^ C) | S

    return run


def _repeat(body: Step, least: int, most: int) -> Step:
    def repeat(text: Text, S: int) -> int:
        for _ in range(least):  # ends early: the set becomes empty or no longer changes
            text.budget.spend(1)
            before, S = S, body(text, S)
            if S in (0, before):
                break
        new = S
        for _ in range(most - least):
            text.budget.spend(1)
            new = body(text, new) & ~S
            if not new:
                break
            S |= new
        return S

    return repeat


def _look(body: Any, direction: int, wanted: bool, flags: int, depth: int) -> Step:
    step = sequence_step(body, flags, depth)
    low, width = body.getwidth()
    if direction < 0 and low != width:
        raise ValueError("look-behind requires fixed-width pattern")

    def behind(text: Text, S: int) -> int:
        text.budget.spend(1)
        found = S & step(text, S >> width)
        return found if wanted else S ^ found

    def ahead(text: Text, S: int) -> int:
        found = 0
        for i in bits(S):
            text.budget.spend(1)
            if step(text, 1 << i):
                found |= 1 << i
        return found if wanted else S ^ found

    return behind if direction < 0 else ahead


def _anchor(source: str, flags: int) -> Step:
    def anchor(text: Text, S: int) -> int:
        text.budget.left -= 1
        mask = text.masks.get((source, flags))
        if mask is None:
            mask = sum(1 << found.start() for found in re.finditer(source, text.value, flags))
            text.masks[source, flags] = mask
        return S & mask

    return anchor


def _is_character(item: Any) -> bool:
    return str(item[0]) in ("LITERAL", "NOT_LITERAL", "ANY", "IN")


def _mask(item: Any, flags: int) -> Callable[[Text], int]:
    """A function that gives the positions (bits) of a text whose character the item matches."""
    if str(item[0]) == "LITERAL" and not flags & re.IGNORECASE:
        char = chr(item[1])
        return lambda text: text.places.get(char, 0)
    accepted, key = dict[str, bool](), (repr(item), flags)
    matcher: re.Pattern[str] | None = None

    def accepts(char: str, budget: Budget) -> bool:
        nonlocal matcher
        if char not in accepted:
            if matcher is None:  # compiled by re, so that case and categories are those of re
                budget.spend(_width(item) // 4)
                state = re_parser.State()
                matcher = re_compiler.compile(re_parser.SubPattern(state, [item]), flags)
            accepted[char] = matcher.match(char) is not None
        return accepted[char]

    def mask(text: Text) -> int:
        found = text.masks.get(key)
        if found is None:
            text.budget.spend(len(text.places))
            found = sum(places for char, places in text.places.items() if accepts(char, text.budget))
            text.masks[key] = found
        return found

    return mask


def _width(item: Any) -> int:
    """The approximate number of steps for compiling a character class."""
    members = item[1] if str(item[0]) == "IN" else ()
    return 40 + sum(value[1] - value[0] if str(kind) == "RANGE" else 1 for kind, value in members)


def bits(S: int) -> Iterator[int]:
    """The positions of a set, ascending."""
    while S:
        low = S & -S
        yield low.bit_length() - 1
        S ^= low
