"""Elements map sets of positions to sets of positions."""

from __future__ import annotations

import pytest

from lora_kernels.patterns.budget import Budget, Text
from lora_kernels.patterns.steps import bits, re_parser, sequence_step


@pytest.mark.parametrize(
    ("source", "starts", "ends"),
    [
        ("a", 0b01111, 0b10110),  # aaba: after each a
        ("", 0b01011, 0b01011),
        ("a*", 0b00001, 0b00111),
        ("a*", 0b01001, 0b11111),
        ("a+", 0b00001, 0b00110),
        (".*", 0b00100, 0b11100),
        ("(?:aa|b)", 0b00111, 0b01100),
        ("(?:a|b){2}", 0b00101, 0b10100),
        ("(?:ab?){1,2}", 0b00001, 0b01110),
        ("(?:a?){9}", 0b00011, 0b00111),
        ("(?=a)", 0b11111, 0b01011),
        ("(?!a)", 0b11111, 0b10100),
        ("(?<=a)", 0b11111, 0b10110),
        ("(?<!a)", 0b11111, 0b01001),
        ("^", 0b11111, 0b00001),
        ("$", 0b11111, 0b10000),
    ],
)
def test_elements(source: str, starts: int, ends: int) -> None:
    tree = re_parser.parse(source)
    step = sequence_step(tree.data, tree.state.flags, 0)
    assert step(Text("aaba", Budget()), starts) == ends


def test_bits() -> None:
    assert list(bits(0b101001)) == [0, 3, 5]


def test_an_endless_count_ends_when_nothing_changes() -> None:
    tree, budget = re_parser.parse("(?:(?:a?){4000000000}){4000000000,}"), Budget()
    before = budget.left
    assert sequence_step(tree.data, tree.state.flags, 0)(Text("aa", budget), 1) == 0b111
    assert before - budget.left < 100


def test_a_wide_class_is_charged() -> None:
    tree, budget = re_parser.parse("(?i)[\\u0000-\\uffff]"), Budget()
    before = budget.left
    assert sequence_step(tree.data, tree.state.flags, 0)(Text("a", budget), 1) == 0b10
    assert before - budget.left > 10_000
