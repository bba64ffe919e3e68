"""Fields of PEFT's LoraConfig that have no part in an adapter that is read, and the values that some of them take."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

# Initialisations of PEFT that leave the base as it is, and those that change it by what no file of the adapter holds.
TRACELESS_INITS = ("eva", "orthogonal", "mica")
LOSSY_INITS = ("pissa_niter_", "corda", "lora_ga", "loftq")
MAX_LAYERS = 4096
# What PEFT's own loader passes over: notes of the writer, and settings that hold for a process only.
NOT_PART_OF_THE_ADAPTER = ("peft_version", "runtime_config")


def without_traces(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a stored adapter without those that only said how its lora_A and lora_B were filled, or how the
    base stores W: nothing of them is left to be done when the adapter is read."""
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
        if method != name or method in TRACELESS_INITS:  # PEFT passes over the settings of another method
            result.pop(f"{name}_config", None)
    return result


def lossy(values: Mapping[str, Any]) -> str | None:
    """Why the base that the adapter belongs to cannot be known from its files; None where it can."""
    init = values.get("init_lora_weights")
    if not isinstance(init, str) or not init.lower().startswith(LOSSY_INITS):
        return None
    return (
        f"init_lora_weights = {reprlib.repr(init)} changed the base weights, by what the adapter's files do not say; "
        "save it in PEFT with path_initial_model_for_weight_conversion, or save the changed base too"
    )


def is_int(value: Any) -> bool:
    """Whether this is an integer and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether this is an integer or a float."""
    return is_int(value) or isinstance(value, float)


def are_rows(value: Any) -> bool:
    """Whether this is a list of different indices of rows."""
    rows = isinstance(value, list) and all(_is_index(row) and row < 2**31 for row in value)
    return rows and len(set(value)) == len(value)


def are_runs(value: Any) -> bool:
    """Whether this is a list of [start, end] with 0 <= start < end, of no more layers than a model may have."""
    if not isinstance(value, list | tuple) or not all(_is_run(run) for run in value):
        return False
    return sum(end - start for start, end in value) <= MAX_LAYERS


def _is_index(value: Any) -> bool:
    return is_int(value) and value >= 0


def _is_run(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_index, value)) and value[0] < value[1]
