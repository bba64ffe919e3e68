"""Matches regular expressions from files with the results of ``re``, in bounded work for every pattern.

``re`` backtracks: a pattern of 20 characters can take years. Here a pattern is applied to all positions of a path at
once (``steps``); the work is proportional to the length of the path, and the matches are those of ``re``. The work is
counted (``budget``); if it exceeds the limit, a ConfigError is raised.
"""

from lora_kernels.patterns.budget import Budget, Text
from lora_kernels.patterns.pattern import (
    MAX_PATTERNS,
    Pattern,
    check,
    check_list_name,
    ends_in,
    saved_inside,
)

__all__ = ["MAX_PATTERNS", "Budget", "Pattern", "Text", "check", "check_list_name", "ends_in", "saved_inside"]
