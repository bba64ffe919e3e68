"""Regular expressions for paths of modules, and the forms in which PEFT applies those of a configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from lora_kernels.patterns.budget import Text
from lora_kernels.patterns.steps import bits, re_parser, sequence_step

MAX_PATTERN, MAX_PATTERNS = 16_000, 80_000  # characters in one pattern, and in all patterns of one setting


class Pattern:
    """A regular expression for paths. Raises ValueError with the reason if ``source`` is not supported or too long."""

    def __init__(self, source: str) -> None:
        tree = parse(source)
        self._step = sequence_step(tree.data, tree.state.flags, 0)
        self._tail = "" if tree.state.flags & re.IGNORECASE else _tail(tree.data)
        self._to_end = bool(tree.data) and str(tree.data[-1][1]) in ("AT_END", "AT_END_STRING")

    def match(self, text: Text) -> bool:
        """Whether re.match finds a match."""
        return self._may_end(text, self._to_end) and self._step(text, 1) != 0

    def fullmatch(self, text: Text) -> bool:
        """Whether re.fullmatch finds a match."""
        return self._may_end(text, True) and self._step(text, 1) >> len(text.value) != 0

    def ends(self, text: Text, start: int) -> Iterator[int]:
        """The positions where matches that begin at ``start`` can end, in ascending order."""
        text.budget.spend(1)
        return bits(self._step(text, 1 << start))

    def _may_end(self, text: Text, to_end: bool) -> bool:
        text.budget.spend(1)
        return not to_end or text.value.endswith(self._tail) or "\n" in text.value  # "$" also matches before a newline


@lru_cache(maxsize=2048)
def check(source: str) -> None:
    """Raise ValueError with the reason if Pattern(source) cannot be made."""
    Pattern(source)


def parse(source: str) -> Any:
    """The tree of ``re``'s own parser. Raises ValueError with a reason."""
    if len(source) > MAX_PATTERN:
        raise ValueError(f"{len(source)} characters; accepted are at most {MAX_PATTERN}")
    try:
        return re_parser.parse(source)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None


def saved_inside(name: str) -> str:
    """PEFT's pattern for the paths that an entry of modules_to_save covers."""
    return rf"(^|.*\.){name}($|\..*)"


def ends_in(key: str) -> str:
    """PEFT's pattern for the paths that a key of rank_pattern or alpha_pattern names."""
    return rf"(.*\.)?({key})$"


def check_list_name(name: str) -> None:
    """Raise ValueError with the reason unless ``name``, an entry of layers_pattern, is a pattern by itself and has the
    same meaning inside PEFT's pattern for the index of a layer."""
    before_index = r"(?:^|.*?\.){}\.(?P<idx>\d+)\.".format
    check(before_index(name))
    check(name)
    if repr(parse(before_index(name)).data) != repr(parse(before_index(f"(?:{name})")).data):
        raise ValueError("its alternatives are not in parentheses: write (a|b), or a list of names")


def _tail(items: Any) -> str:
    """A suffix of every string that the items match, as far as the parse tree shows it; else ""."""
    tail = ""
    for item in reversed(items):
        kind, value = str(item[0]), item[1]
        if kind == "LITERAL":
            tail = chr(value) + tail
        elif kind == "SUBPATTERN" and not value[1]:
            return _tail(value[3]) + tail
        elif kind != "AT":
            return tail
    return tail
