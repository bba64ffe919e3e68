"""What of PEFT's settings counts for an adapter that is read."""

from typing import Any

import pytest

from lora_kernels.config import LoRAConfig, are_rows, are_runs, lossy, without_traces
from lora_kernels.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "left"),
    [
        ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, {"init_lora_weights": True}),
        ({"init_lora_weights": "orthogonal"}, {"init_lora_weights": True}),
        ({"init_lora_weights": "Orthogonal"}, {"init_lora_weights": True}),
        ({"init_lora_weights": "mica"}, {"init_lora_weights": True}),
        ({"init_lora_weights": True, "corda_config": {"a": 1}, "loftq_config": {"b": 1}}, {"init_lora_weights": True}),
        ({"init_lora_weights": "corda", "corda_config": {"a": 1}},) * 2,
        ({"init_lora_weights": "pissa", "lora_ga_config": {}}, {"init_lora_weights": "pissa"}),
        ({"fan_in_fan_out": True}, {"fan_in_fan_out": False}),
        ({"lora_bias": None, "ensure_weight_tying": None}, {"lora_bias": False, "ensure_weight_tying": False}),
        ({"fan_in_fan_out": "yes", "init_lora_weights": ["eva"]},) * 2,
    ],
)
def test_settings_without_traces(values: dict[str, Any], left: dict[str, Any]) -> None:
    assert without_traces(values) == left


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga", "CorDA"])
def test_inits_that_changed_the_base_are_refused_with_the_remedy(init: str) -> None:
    assert "path_initial_model_for_weight_conversion" in (lossy({"init_lora_weights": init}) or "")
    with pytest.raises(ConfigError, match="changed the base weights"):
        LoRAConfig.from_peft_dict({"peft_type": "LORA", "init_lora_weights": init})


def test_inits_that_did_not() -> None:
    assert all(lossy({"init_lora_weights": init}) is None for init in (True, False, "pissa", "olora", "eva", None, [1]))


def test_rows_and_runs() -> None:
    assert all(map(are_rows, ([], [3, 1])))
    assert not any(map(are_rows, ([1, 1], [2**31], (1,), [-1], [True], None)))
    assert all(map(are_runs, ([[0, 4], [2, 5]], [], ((0, 1),))))
    assert not any(map(are_runs, ([[0, 4, 5]], [[0, 2**40]], [[1, 1]], 3, [3])))
