"""Patterns match where ``re`` matches, and no pattern takes more than its budget."""

from __future__ import annotations

import random
import re
import warnings

import pytest

from lora_kernels.errors import ConfigError
from lora_kernels.patterns import Budget, Pattern, Text, check, check_list_name, ends_in, saved_inside
from lora_kernels.patterns.budget import STEPS, STEPS_PER_PATH

PATHS = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(40) for name in "qkvo"]
PATHS += [f"vision.blocks.{i}.mlp.{name}" for i in range(20) for name in ("fc1", "fc2", "Norm")] + ["", "q", "lm_head"]
SANE = [
    r".*\.(q|v)_proj", r"^(?!.*vision).*(?:q|k|v|o)_proj$", r"model\.layers\.\d+\.self_attn\.(q|v)_proj", "q", ".*",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))", r".*(?<!vision)\.layers\.([02468]|1\d)\..*", r"(?i).*\.NORM", "",
    r".*layers\.(?:1[0-5]|[2-9])\.[^.]*\.[qv]_proj", r"\w+(\.\w+)*\.fc[12]", r"(?s:.)*_head", r"\Avision\..*\d\Z", "|",
]  # fmt: skip
KEYS = ["q_proj", "layers.1.self_attn.v_proj", r"layers\.(0|1|2)\..*", "q_proj|fc1", "a)|(fc2", "x?", ".*mlp.*", "1"]
# re takes exponential time for these, or a power of the length above 5.
HANGS = [
    r"(\w+)+!", "(.*)*!", "(.|.)*!", r"((\w|\.)*)*!", "(.*.*)*!", "(.?){60}.{60}", "(?:.*,){30}", ".*" * 30 + "!",
    r"^(\w+\.?)+$!", "(?=(.+)+!)", "(?!(.+)+!)x", "(?i)(l|L|.)*!", r"(\.?\w?)*\.!", "(((((.*)*)*)*)*)*!",
    "(.{0,40}){0,40}!",
]  # fmt: skip


def agrees(source: str, value: str) -> bool:
    ours, text = Pattern(source), Text(value, Budget())
    return (ours.match(text), ours.fullmatch(text)) == (
        re.match(source, value) is not None,
        re.fullmatch(source, value) is not None,
    )


@pytest.mark.parametrize(
    "source", SANE + [ends_in(key) for key in KEYS] + [saved_inside(key) for key in KEYS if "a)" not in key]
)
def test_patterns_of_adapters_match_what_re_matches(source: str) -> None:
    for value in [*PATHS, "q\n", "a\nb.q_proj", "İ.ſelf.K"]:
        assert agrees(source, value), value


ATOMS = ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", "1", "^", "$", r"\b", r"\B", "", "A", "(?i:a)", "(?s:.)"]
ATOMS += [r"[^\W\d]", "(?m:$)", "(?m:^)", r"\A", r"\Z", "k", "(?i:[k-s])", "(?a:\\w)", "é"]
REPEATS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{0,3}?", "{2,}", "{,1}"]
BEHIND = ["a", "b.", "[ab]1", "", "(a|b)", r"(?:a|1)\."]


def random_pattern(rng: random.Random, depth: int) -> str:
    kind = rng.random()
    if depth == 0 or kind < 0.3:
        return rng.choice(ATOMS)
    inner = random_pattern(rng, depth - 1)
    if kind < 0.55:
        return inner + random_pattern(rng, depth - 1)
    if kind < 0.7:
        return f"({inner}|{random_pattern(rng, depth - 1)})"
    if kind < 0.9:
        return f"(?:{inner}){rng.choice(REPEATS)}"
    return f"{rng.choice(['(?=', '(?!'])}{inner})" if kind < 0.97 else f"(?<={rng.choice(BEHIND)}){inner}"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", range(8))
def test_random_patterns_match_what_re_matches(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(400):
        source = random_pattern(rng, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                re.compile(source)
            except re.error:
                with pytest.raises(ValueError, match=r"."):
                    Pattern(source)
                continue
            for _ in range(4):
                value = "".join(rng.choice("aabb.1Akſé\n") for _ in range(rng.randrange(9)))
                assert agrees(source, value), (source, value)


@pytest.mark.parametrize("source", HANGS)
@pytest.mark.parametrize("form", [str, ends_in, saved_inside])
def test_patterns_that_keep_re_busy_for_years_are_decided_in_few_steps(source: str, form: type[str]) -> None:
    if form is not str and source.startswith("(?i)"):
        source = "(?i:(l|L|.)*!)"
    pattern, budget = Pattern(form(source)), Budget()
    values = [*PATHS, "layers" * 10, "a" * 60]
    for value in values:
        text = Text(value, budget)
        pattern.match(text)
        pattern.fullmatch(text)
    assert STEPS + STEPS_PER_PATH * len(values) - budget.left < STEPS


def test_what_takes_too_many_steps_is_a_config_error() -> None:
    pattern, budget = Pattern("(?:(?=(?:(?=(?:(?=.*!|.).)*).)*).)*" + "|".join(f".*{i}" for i in range(1000))), Budget()
    with pytest.raises(ConfigError, match="take too many steps"):
        [pattern.match(Text(value, budget)) for value in PATHS * 100]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (r"(a)\1", "backreference"), ("(?P<x>a)(?P=x)", "backreference"), ("(a)?(?(1)b|c)", "conditional"),
        ("(?>a|ab)c", "atomic"), ("a*+b", "possessive"), ("(", "unterminated"), ("*", "nothing to repeat"), ("(?<=a*)b",
        "fixed-width"), ("a" * 17000, "17000 characters"), ("(" * 41 + ")" * 41, "nested more than 40"),
        ("(" * 5000 + ")" * 5000, "."), ("a{99999999999}", "too large"), ("(?L)a", "flag"), (r"\p{L}", "bad escape"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_with_the_reason(source: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Pattern(source)
    with pytest.raises(ValueError, match=says):
        check(source)


def test_ends_are_all_ends() -> None:
    assert list(Pattern("a*").ends(Text("baab", Budget()), 1)) == [1, 2, 3]
    assert list(Pattern("(ab|a)(b?)").ends(Text("abb", Budget()), 0)) == [1, 2, 3]
    assert list(Pattern("x").ends(Text("abb", Budget()), 0)) == []


@pytest.mark.parametrize("name", ["layers", r"layers\w*", "(h|layers)", "[hl]", r"a\.b", "h"])
def test_names_of_module_lists(name: str) -> None:
    check_list_name(name)


@pytest.mark.parametrize("name", ["h|layers", "h|hidden", "h|i", "*h", "h\\", "(?P<idx>a)", "a)(b", "(?i)h", "h|"])
def test_names_of_module_lists_that_change_the_pattern_around_them(name: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        check_list_name(name)
