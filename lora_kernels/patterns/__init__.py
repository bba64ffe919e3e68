"""Regular expressions from files: ``re``'s answers in bounded work, whatever the pattern.

``re`` backtracks: a pattern of 20 characters can keep it busy for years. Here a pattern is applied to all positions of
a path at once (``steps``), which takes work in proportion to its length and finds a match where ``re`` finds one. The
work is counted (``budget``), and more than is allowed is a ConfigError.
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
