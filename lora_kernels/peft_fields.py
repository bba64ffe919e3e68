"""Fields of PEFT's LoraConfig that have no effect when an adapter is read, and checks of values of other fields."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

# Initialisations of PEFT that do not change the base, and those whose change of the base is not in the adapter's files.
TRACELESS_INITS = ("eva", "orthogonal", "mica")
LOSSY_INITS = ("pissa_niter_", "corda", "lora_ga", "loftq")
MAX_LAYERS = 4096
# Fields that PEFT's loader ignores: information about the writer, and settings of one process.
NOT_PART_OF_THE_ADAPTER = ("peft_version", "runtime_config")


def without_traces(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a stored adapter without those that have no effect when it is read: how lora_A and lora_B were
    initialised, and how the base stores W."""
    result, init = dict(values), values.get("init_lora_weights")
    method = init.lower() if isinstance(init, str) else None
    if method in TRACELESS_INITS:
        result["init_lora_weights"] = True
    if isinstance(result.get("fan_in_fan_out"), bool):
        result["fan_in_fan_out"] = False
    for name in ("lora_bias", "ensure_weight_tying"):
        if name in result and result[name] is None:
            result[name] = False
    for name in ("eva", "corda", "lora_ga", "loftq"):
        if method != name or method in TRACELESS_INITS:  # PEFT ignores the settings of another method
            result.pop(f"{name}_config", None)
    return result


def lossy(values: Mapping[str, Any]) -> str | None:
    """The reason why the adapter's base weights cannot be computed from its files; None if they can."""
    init = values.get("init_lora_weights")
    if not isinstance(init, str) or not init.lower().startswith(LOSSY_INITS):
        return None
    return (
        f"init_lora_weights = {reprlib.repr(init)} changed the base weights, and the adapter's files do not hold it; "
        "save it in PEFT with path_initial_model_for_weight_conversion, or save the changed base too"
    )


def is_int(value: Any) -> bool:
    """Whether this is an integer and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether this is an integer or a float."""
    return is_int(value) or isinstance(value, float)


def are_rows(value: Any) -> bool:
    """Whether this is a list of distinct row indices."""
    rows = isinstance(value, list) and all(_is_index(row) and row < 2**31 for row in value)
    return rows and len(set(value)) == len(value)


def are_runs(value: Any) -> bool:
    """Whether this is a list of [start, end] with 0 <= start < end, of at most MAX_LAYERS layers in all."""
    if not isinstance(value, list | tuple) or not all(_is_run(run) for run in value):
        return False
    return sum(end - start for start, end in value) <= MAX_LAYERS


def _is_index(value: Any) -> bool:
    return is_int(value) and value >= 0


def _is_run(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_index, value)) and value[0] < value[1]
