"""What is counted while patterns are matched: the work is bounded by steps, never by time."""

from __future__ import annotations

from typing import Any

from lora_kernels.errors import ConfigError

STEPS, STEPS_PER_PATH = 500_000, 300  # a step is about 0.2 microseconds


class Budget:
    """The steps that are left for all patterns of one configuration; every path that is looked at adds some."""

    def __init__(self) -> None:
        self.left = STEPS

    def spend(self, steps: int) -> None:
        """Count steps. Raises ConfigError where none are left."""
        self.left -= steps
        if self.left < 0:
            raise ConfigError(
                "the patterns of the configuration (target_modules, exclude_modules, modules_to_save, layers_pattern, "
                "rank_pattern, alpha_pattern) take too many steps to match with this model; write fewer or simpler ones"
            )


class Text:
    """A path to be matched: ``places[c]`` are the positions of the character c, as bits."""

    def __init__(self, value: str, budget: Budget) -> None:
        budget.left += STEPS_PER_PATH
        self.value, self.budget = value, budget
        self.places: dict[str, int] = {}
        self.masks: dict[Any, int] = {}
        for i, char in enumerate(value):
            self.places[char] = self.places.get(char, 0) | 1 << i
