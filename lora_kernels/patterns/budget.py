"""Counts the steps while patterns are matched: the work is limited by a number of steps, not by time."""

from __future__ import annotations

from typing import Any

from lora_kernels.errors import ConfigError

STEPS, STEPS_PER_PATH = 500_000, 300  # a step is about 0.2 microseconds


class Budget:
    """The steps left for all patterns of one configuration; every path that is matched adds STEPS_PER_PATH."""

    def __init__(self) -> None:
        self.left = STEPS

    def spend(self, steps: int) -> None:
        """Subtract steps. Raises ConfigError if fewer are left."""
        self.left -= steps
        if self.left < 0:
            raise ConfigError(
                "the patterns of the configuration (target_modules, exclude_modules, modules_to_save, layers_pattern, "
                "rank_pattern, alpha_pattern) take too many steps to match with this model; write fewer or simpler ones"
            )


class Text:
    """A path to be matched. ``places[c]``: an integer whose bit i is set if character i of the path is c."""

    def __init__(self, value: str, budget: Budget) -> None:
        budget.left += STEPS_PER_PATH
        self.value, self.budget = value, budget
        self.places: dict[str, int] = {}
        self.masks: dict[Any, int] = {}
        for i, char in enumerate(value):
            self.places[char] = self.places.get(char, 0) | 1 << i
