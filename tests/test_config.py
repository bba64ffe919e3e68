"""LoRAConfig: PEFT's fields and defaults, values checked once, and the dictionary PEFT reads and writes."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels.config import OWN_FIELDS, UNSUPPORTED_FIELDS, LoRAConfig
from lora_kernels.errors import ConfigError

FULL: dict[str, Any] = {
    "r": 5,
    "lora_alpha": 12.5,
    "lora_dropout": 0.25,
    "target_modules": ["key", "query"],
    "exclude_modules": r".*\.0\..*",
    "use_rslora": True,
    "bias": "lora_only",
    "modules_to_save": ["classifier"],
    "rank_pattern": {"query": 3},
    "alpha_pattern": {"^bert.*key": 7},
    "layers_to_transform": [0, 2],
    "layers_pattern": "layer",
    "init_lora_weights": "gaussian",
    "task_type": "SEQ_CLS",
    "base_model_name_or_path": "a/b",
    "revision": "main",
    "inference_mode": True,
}


def peft_lora_config() -> Any:
    return pytest.importorskip("peft").LoraConfig


def test_every_field_of_pefts_is_known_and_defaults_agree() -> None:
    theirs = {f.name: f for f in dataclasses.fields(peft_lora_config()) if f.name != "runtime_config"}
    assert set(theirs) - set(OWN_FIELDS) - set(UNSUPPORTED_FIELDS) == {"peft_version"}
    ours, default = LoRAConfig(), peft_lora_config()()
    for name in OWN_FIELDS:
        assert getattr(ours, name) == getattr(default, name), name
    for name in UNSUPPORTED_FIELDS:
        assert getattr(ours, name) == (getattr(default, name) or getattr(ours, name)), name


@pytest.mark.parametrize("values", [{}, FULL, {"target_modules": "all-linear"}, {"target_modules": r".*\.q"}])
def test_peft_reads_what_we_write_and_we_read_what_peft_writes(tmp_path: Path, values: dict[str, Any]) -> None:
    import peft

    ours = LoRAConfig(**values)
    (tmp_path / "adapter_config.json").write_text(json.dumps(ours.to_peft_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftConfig.from_pretrained(str(tmp_path))
    for name, value in ours.to_peft_dict().items():
        found = getattr(theirs, name)
        assert (sorted(found) if isinstance(found, set) else found) == value, name
    theirs.save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    back = LoRAConfig.from_peft_dict(written)
    for name in ("target_modules", "exclude_modules"):
        value = getattr(back, name)
        back = dataclasses.replace(back, **{name: sorted(value) if isinstance(value, list) else value})
    assert back == ours


# What the releases wrote for LoraConfig(r=4, target_modules=["q"]): their fields, with these defaults.
SINCE_0_17 = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "m", "bias": "none", "corda_config": None,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "qalora_group_size": 16, "r": 4,
    "rank_pattern": {}, "revision": None, "target_modules": ["q"], "target_parameters": None, "task_type": "CAUSAL_LM",
    "trainable_token_indices": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip
SINCE_0_18 = {
    **SINCE_0_17, "alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False,
    "peft_version": "0.18.0",
}  # fmt: skip


@pytest.mark.parametrize("written", [SINCE_0_17, SINCE_0_18])
def test_older_releases_files_are_read(written: dict[str, Any]) -> None:
    config = LoRAConfig.from_peft_dict(written)
    assert (config.r, config.target_modules, config.task_type) == (4, ["q"], "CAUSAL_LM")


UNSUPPORTED = {
    "fan_in_fan_out": True,
    "megatron_config": {"a": 1},
    "megatron_core": "other",
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"verbose": True},
    "lora_ga_config": {"direction": "random"},
    "velora_config": {"scale": 1.0},
    "kasa_config": {"beta": 1.0},
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "qalora_group_size": 8,
    "monteclora_config": {"num_samples": 8},
    "target_parameters": ["w"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
}
# Of a stored adapter only a note: how W is stored, and how an initialisation went that is over.
PASSED_OVER = {"fan_in_fan_out", "eva_config", "corda_config", "lora_ga_config", "loftq_config"}


def test_the_table_below_names_every_unsupported_field() -> None:
    assert set(UNSUPPORTED) == set(UNSUPPORTED_FIELDS)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_feature_is_refused_and_its_off_value_accepted(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} = .*does not have"):
        LoRAConfig(**{name: UNSUPPORTED[name]})
    stored = {"peft_type": "LORA", name: UNSUPPORTED[name]}
    if name in PASSED_OVER:
        assert LoRAConfig.from_peft_dict(stored) == LoRAConfig()
    else:
        with pytest.raises(ConfigError, match=f"{name} = .*does not have"):
            LoRAConfig.from_peft_dict(stored)
    off = SINCE_0_18.get(name)
    assert LoRAConfig(**{name: off}) == LoRAConfig()
    assert LoRAConfig.from_peft_dict({"peft_type": "LORA", name: off}) == LoRAConfig()


@pytest.mark.parametrize(
    ("value", "fine"), [(None, True), (False, True), ({}, True), ([], True), (1, False), ("x", False)]
)
def test_field_of_a_later_release_may_only_be_off(value: Any, fine: bool) -> None:
    values = {"peft_type": "LORA", "use_tomorrows_lora": value}
    if fine:
        assert LoRAConfig.from_peft_dict(values) == LoRAConfig()
    else:
        with pytest.raises(ConfigError, match="use_tomorrows_lora"):
            LoRAConfig.from_peft_dict(values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", 0), ("r", -1), ("r", 8.0), ("r", True), ("r", "8"), ("r", None), ("r", 10**400),
        ("lora_alpha", math.nan), ("lora_alpha", math.inf), ("lora_alpha", "16"), ("lora_alpha", None),
        ("lora_alpha", 10**400), ("lora_alpha", True),
        ("lora_dropout", 1.01), ("lora_dropout", -0.1), ("lora_dropout", math.nan), ("lora_dropout", "0.1"),
        ("bias", "some"), ("bias", None), ("bias", True),
        ("use_rslora", 1), ("use_rslora", None), ("inference_mode", "yes"),
        ("target_modules", []), ("target_modules", ""), ("target_modules", [1]), ("target_modules", [""]),
        ("target_modules", "(("), ("target_modules", 3), ("target_modules", {"q": 1}), ("target_modules", [["q"]]),
        ("target_modules", "a{99999999999999999999}"), ("target_modules", "(" * 20000),
        ("exclude_modules", "*"), ("exclude_modules", [None]), ("exclude_modules", 1.5),
        ("modules_to_save", "classifier"), ("modules_to_save", ["(("]), ("modules_to_save", [None]),
        ("rank_pattern", {"q": 0}), ("rank_pattern", {"q": 2.0}), ("rank_pattern", {"((": 2}), ("rank_pattern", ["q"]),
        ("rank_pattern", {1: 2}), ("alpha_pattern", {"q": "8"}), ("alpha_pattern", {"q": math.nan}),
        ("layers_to_transform", "0"), ("layers_to_transform", [0.0]), ("layers_to_transform", {0}),
        ("layers_pattern", 3), ("layers_pattern", ["(("]), ("layers_pattern", "h|layers"),
        ("rank_pattern", {r"(q)\1": 2}),
        ("target_modules", r"(?P<x>q).*(?P=x)"), ("exclude_modules", "q*+"), ("modules_to_save", ["x" * 9] * 9000),
        ("alpha_pattern", {f"{i}": 2 for i in range(9000)}), ("target_modules", "q" * 17000),
        ("init_lora_weights", "eva"), ("init_lora_weights", "pissa_niter_16"), ("init_lora_weights", None),
        ("init_lora_weights", 1), ("init_lora_weights", "loftq"),
        ("lora_bias", 1), ("ensure_weight_tying", "yes"), ("layer_replication", [[0, 2, 3]]),
        ("layer_replication", [[2, 2]]), ("layer_replication", [[-1, 2]]), ("layer_replication", "0-2"),
        ("layer_replication", [[0, 2**40]]), ("layer_replication", [[0, 2]] * 5000), ("layer_replication", {"0": 2}),
        ("trainable_token_indices", 3), ("trainable_token_indices", [1, 1]), ("trainable_token_indices", [-1]),
        ("trainable_token_indices", [1.0]), ("trainable_token_indices", {"e": 3}),
        ("trainable_token_indices", {"": [3]}), ("trainable_token_indices", [True]),
        ("task_type", "SEQ"), ("task_type", ["SEQ_CLS"]), ("peft_type", "ADALORA"), ("revision", 3),
        ("base_model_name_or_path", ["a"]), ("auto_mapping", "x"), ("auto_mapping", {"a": {"b": {}}}),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_out_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        LoRAConfig(**{name: value})
    assert len(str(caught.value)) < 400


def test_combinations_peft_refuses() -> None:
    with pytest.raises(ConfigError, match="layers_to_transform"):
        LoRAConfig(target_modules="all-linear", layers_to_transform=0)
    with pytest.raises(ConfigError, match="layers_pattern"):
        LoRAConfig(target_modules=["q"], layers_pattern="h")


def test_members_of_pefts_enumerations_sets_and_spellings_are_taken() -> None:
    import peft

    config = LoRAConfig(
        task_type=peft.TaskType.SEQ_CLS,
        peft_type=peft.PeftType.LORA,
        target_modules={"q", "k"},
        init_lora_weights="OLoRA",
    )
    assert json.loads(json.dumps(config.to_peft_dict()))["task_type"] == "SEQ_CLS"
    assert (config.target_modules, config.init_lora_weights) == (["k", "q"], "olora")
    assert LoRAConfig(target_modules="ALL-Linear").target_modules == "all-linear"


def test_it_cannot_change_once_checked() -> None:
    names, ranks = ["q"], {"q": 2}
    config = LoRAConfig(target_modules=names, rank_pattern=ranks)
    names.append("k")
    ranks["q"] = 0
    assert (config.target_modules, config.rank_pattern) == (["q"], {"q": 2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 0  # type: ignore[misc]
    with pytest.raises(ConfigError):
        dataclasses.replace(config, r=0)


def test_scaling() -> None:
    assert LoRAConfig(r=4, lora_alpha=8).scaling() == 2
    assert LoRAConfig(r=4, lora_alpha=8, use_rslora=True).scaling() == 4
    assert LoRAConfig(r=4, lora_alpha=8).scaling(16, 4) == 0.25


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400)
@given(
    st.dictionaries(st.sampled_from([*OWN_FIELDS, *UNSUPPORTED_FIELDS]) | st.text(max_size=8), json_values, max_size=4)
)
def test_any_json_gives_a_usable_configuration_or_a_config_error(values: dict[str, Any]) -> None:
    try:
        config = LoRAConfig.from_peft_dict({"peft_type": "LORA"} | values)
    except ConfigError:
        return
    assert LoRAConfig.from_peft_dict(json.loads(json.dumps(config.to_peft_dict()))) == config
    assert math.isfinite(config.scaling())
