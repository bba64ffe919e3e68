"""Steps are counted, and paths bring some with them."""

from __future__ import annotations

import pytest

from lora_kernels.errors import ConfigError
from lora_kernels.patterns.budget import STEPS, STEPS_PER_PATH, Budget, Text


def test_a_path_brings_steps_and_what_is_above_them_is_refused() -> None:
    budget = Budget()
    text = Text("a.b.a", budget)
    assert text.places == {"a": 0b10001, ".": 0b01010, "b": 0b00100}
    budget.spend(STEPS + STEPS_PER_PATH)
    with pytest.raises(ConfigError, match=r"target_modules.*write fewer or simpler ones"):
        budget.spend(1)
