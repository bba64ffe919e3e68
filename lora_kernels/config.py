"""LoRAConfig: the adapter's configuration, with PEFT's field names and meaning, validated once."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import InitVar, asdict, dataclass, field, fields
from typing import Any

from lora_kernels import patterns
from lora_kernels.errors import ConfigError

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
BASE_CHANGING_INITS = ("pissa", "olora")
ALL_LINEAR = "all-linear"
MAX_RANK, MAX_ALPHA = 2**31 - 1, 3e38  # sizes are int32 and scaling is a float32 in the kernels

# Initialisations of PEFT that do not change the base, and those whose change of the base is not in the adapter's files.
TRACELESS_INITS = ("eva", "orthogonal", "mica")
LOSSY_INITS = ("pissa_niter_", "corda", "lora_ga", "loftq")
MAX_LAYERS = 4096
# Fields that PEFT's loader ignores: information about the writer, and settings of one process.
NOT_PART_OF_THE_ADAPTER = ("peft_version", "runtime_config")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """What to adapt and how. Field names, defaults and meaning are those of ``peft.LoraConfig``.

    r, lora_alpha: rank, and numerator of the scaling: lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
    lora_dropout: probability with which an element of the LoRA branch's input is dropped in training.
    use_dora: the adapted weight's rows get a trained magnitude (lora_kernels.DoRALinear).
    target_modules: names (a module matches if its dotted path is the name or ends in ``.name``), a regular expression
        for the whole path, or "all-linear" (every nn.Linear but the output head). None: the query and value
        projections, see lora_kernels.models.targets.
    exclude_modules: names or a regular expression, matched likewise; exclusion wins.
    rank_pattern, alpha_pattern: {regular expression for the end of a path: rank or alpha}; the first match counts.
    layers_to_transform, layers_pattern: adapt only the layers with these indices (in module lists of these names).
    bias: "none", "all" (every bias of the model is trained and saved) or "lora_only" (those of the adapted layers).
    modules_to_save: ends of the paths of modules that are trained whole and saved with the adapter. The task types
        SEQ_CLS, TOKEN_CLS and QUESTION_ANS add the names of their heads.
    init_lora_weights: True (A Kaiming-uniform, B zero), False (both random), "gaussian", "pissa" or "olora"; the last
        two move the principal part of the base weight into the adapter and leave the rest in the base weight.
    lora_bias: lora_B gets a bias that is scaled and trained with it.
    trainable_token_indices: rows of the input embedding that are trained and saved, or {name of a module: rows}.
    layer_replication: [[start, end], ...]: copies of these runs replace the model's layers; copies share weights.
    ensure_weight_tying: a module that shares the input embedding's weight is trained with it, not beside it.
    task_type, base_model_name_or_path, revision, auto_mapping: PEFT's bookkeeping. inference_mode: a frozen adapter.

    PEFT's other fields (the second group below) may be given with the value that switches them off, and no other.
    Raises ConfigError for a value that cannot be carried out; the object cannot be changed afterwards
    (dataclasses.replace makes a changed copy).
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    init_lora_weights: bool | str = True
    lora_bias: bool = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    layer_replication: list[list[int]] | None = None
    ensure_weight_tying: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, Any] | None = None
    peft_type: str = "LORA"

    fan_in_fan_out: InitVar[Any] = False
    megatron_config: InitVar[Any] = None
    megatron_core: InitVar[Any] = "megatron.core"
    loftq_config: InitVar[Any] = None
    eva_config: InitVar[Any] = None
    corda_config: InitVar[Any] = None
    lora_ga_config: InitVar[Any] = None
    velora_config: InitVar[Any] = None
    kasa_config: InitVar[Any] = None
    alora_invocation_tokens: InitVar[Any] = None
    use_qalora: InitVar[Any] = False
    qalora_group_size: InitVar[Any] = 16
    monteclora_config: InitVar[Any] = None
    target_parameters: InitVar[Any] = None
    use_bdlora: InitVar[Any] = None
    arrow_config: InitVar[Any] = None

    def __post_init__(self, *unsupported: Any) -> None:
        refuse_unsupported(dict(zip(UNSUPPORTED_FIELDS, unsupported, strict=True)))
        _check(is_int(self.r) and 1 <= self.r <= MAX_RANK, "r", self.r, "an integer of at least 1")
        _check(_is_alpha(self.lora_alpha), "lora_alpha", self.lora_alpha, "a finite number")
        drops = is_number(self.lora_dropout) and 0 <= self.lora_dropout <= 1
        _check(drops, "lora_dropout", self.lora_dropout, "a probability from 0 to 1")
        _check(self.bias in ("none", "all", "lora_only"), "bias", self.bias, '"none", "all" or "lora_only"')
        for name in ("use_rslora", "use_dora", "inference_mode", "lora_bias", "ensure_weight_tying"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        for name in ("base_model_name_or_path", "revision"):
            _check(isinstance(getattr(self, name), str | None), name, getattr(self, name), "a string or None")
        self._check_modules()
        self._check_patterns()
        self._check_layers()
        self._check_extras()
        self._check_bookkeeping()

    def _check_modules(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, set | frozenset | tuple | list):
                value = sorted(value, key=str) if isinstance(value, set | frozenset) else list(value)
                object.__setattr__(self, name, value)
            if isinstance(value, str) and name != "modules_to_save":
                _check_regex(name, value, value)
            else:
                _check(value is None or _is_names(value), name, value, "a list of module names")
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            object.__setattr__(self, "target_modules", ALL_LINEAR)
        _check(self.target_modules not in ([], ""), "target_modules", self.target_modules, "at least one name")
        _check_amount("modules_to_save", self.modules_to_save or ())
        for name in self.modules_to_save or ():
            _check_regex("modules_to_save", name, patterns.saved_inside(name))

    def _check_patterns(self) -> None:
        for name, accepts, what in (
            ("rank_pattern", lambda v: is_int(v) and v >= 1, "integers of at least 1"),
            ("alpha_pattern", _is_alpha, "finite numbers"),
        ):
            pattern = {} if getattr(self, name) is None else getattr(self, name)
            _check(isinstance(pattern, dict), name, pattern, f"a dictionary from patterns to {what}")
            _check(all(isinstance(key, str) for key in pattern), name, pattern, "patterns that are strings")
            _check_amount(name, pattern)
            object.__setattr__(self, name, dict(pattern))
            for key, value in pattern.items():
                _check_regex(name, key, patterns.ends_in(key))
                _check(accepts(value), f"{name}[{reprlib.repr(key)}]", value, what)

    def _check_layers(self) -> None:
        layers, names = self.layers_to_transform, self.layers_pattern
        indices = is_int(layers) or (isinstance(layers, list) and all(is_int(i) for i in layers))
        _check(layers is None or indices, "layers_to_transform", layers, "an index or a list of them")
        _check(names is None or isinstance(names, str) or _is_names(names), "layers_pattern", names, "a name or a list")
        names = [names] if isinstance(names, str) else names or []
        _check_amount("layers_pattern", names)
        for name in names:
            _check_regex("layers_pattern", name, name, patterns.check_list_name)
        if isinstance(self.target_modules, str) and (layers is not None or self.layers_pattern is not None):
            raise ConfigError("layers_to_transform and layers_pattern need target_modules as a list, not a string")
        if names and layers is None:
            raise ConfigError("layers_pattern was given without layers_to_transform, which says which layers to adapt")

    def _check_extras(self) -> None:
        plain = isinstance(self.init_lora_weights, bool) and not self.use_dora
        _check(plain or not self.lora_bias, "lora_bias", True, "False with use_dora or a named init_lora_weights")
        tokens = {} if self.trainable_token_indices is None else self.trainable_token_indices
        tokens = tokens if isinstance(tokens, dict) else {"embed_tokens": tokens}
        fits = all(isinstance(name, str) and name and are_rows(rows) for name, rows in tokens.items())
        accepted = "a list of different rows, or {name of a module: such a list}"
        _check(fits, "trainable_token_indices", self.trainable_token_indices, accepted)
        runs = self.layer_replication or None
        accepted = f"a list of [start, end] with 0 <= start < end, up to {MAX_LAYERS} layers in all"
        _check(runs is None or are_runs(runs), "layer_replication", runs, accepted)
        object.__setattr__(self, "layer_replication", None if runs is None else [list(run) for run in runs])

    def _check_bookkeeping(self) -> None:
        init = self.init_lora_weights
        if isinstance(init, str):
            object.__setattr__(self, "init_lora_weights", init := init.lower())
        known = isinstance(init, bool) or init in ("gaussian", *BASE_CHANGING_INITS)
        _check(known, "init_lora_weights", init, 'True, False, "gaussian", "pissa" or "olora"')
        for name in ("task_type", "peft_type"):  # PEFT passes members of its enumerations
            object.__setattr__(self, name, getattr(getattr(self, name), "value", getattr(self, name)))
        _check(self.peft_type == "LORA", "peft_type", self.peft_type, '"LORA"')
        _check(self.task_type in (None, *TASK_TYPES), "task_type", self.task_type, f"None or one of {TASK_TYPES}")
        mapping = self.auto_mapping
        flat = isinstance(mapping, dict) and all(isinstance(x, str | None) for kv in mapping.items() for x in kv)
        _check(mapping is None or flat, "auto_mapping", mapping, "None or a dictionary of strings")

    def scaling(self, r: int | None = None, lora_alpha: float | None = None) -> float:
        """lora_alpha / r or lora_alpha / sqrt(r), for the configured or the given rank and alpha."""
        r, alpha = self.r if r is None else r, self.lora_alpha if lora_alpha is None else lora_alpha
        return alpha / r**0.5 if self.use_rslora else alpha / r

    def to_peft_dict(self) -> dict[str, Any]:
        """Everything of adapter_config.json that PEFT needs, as JSON values; PeftConfig.from_pretrained reads it."""
        return asdict(self) | {"fan_in_fan_out": False}

    @classmethod
    def from_peft_dict(cls, values: Mapping[str, Any]) -> LoRAConfig:
        """The configuration in an adapter_config.json of PEFT 0.17 to 0.21, or of to_peft_dict.

        Raises ConfigError for another peft_type, values of wrong type or range, and features this package lacks.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"an adapter configuration is a JSON object, not {type(values).__name__}")
        _check(values.get("peft_type") == "LORA", "peft_type", values.get("peft_type"), '"LORA"')
        values = without_traces(values)
        refuse_unsupported(values)
        return cls(**{name: value for name, value in values.items() if name in OWN_FIELDS})


OWN_FIELDS = tuple(f.name for f in fields(LoRAConfig))
UNSUPPORTED_FIELDS = tuple(name for name in LoRAConfig.__dataclass_fields__ if name not in OWN_FIELDS)


def refuse_unsupported(values: Mapping[str, Any]) -> None:
    """Raise ConfigError if `values` switches on something of PEFT's that this package does not have."""
    why_not = lossy(values)
    if why_not:
        raise ConfigError(why_not)
    for name, value in values.items():
        if name in OWN_FIELDS or name in NOT_PART_OF_THE_ADAPTER:
            continue
        off = getattr(LoRAConfig, name, None) if name in UNSUPPORTED_FIELDS else None
        if value is None or value is False or value in ({}, []) or (type(value) is type(off) and value == off):
            continue
        raise ConfigError(
            f"{name[:60]} = {reprlib.repr(value)} is a feature of PEFT's that lora_kernels does not have; "
            "leave it out or use PEFT for this adapter"
        )


def _check(ok: bool, name: str, value: Any, accepted: str) -> None:
    if not ok:
        raise ConfigError(f"{name} = {reprlib.repr(value)}: accepted is {accepted}")


def _check_regex(name: str, value: str, pattern: str, check: Callable[[str], None] = patterns.check) -> None:
    try:
        check(pattern)
    except ValueError as error:
        raise ConfigError(
            f"{name}: {reprlib.repr(value)} is not a regular expression that can be matched ({error})"
        ) from None


def _check_amount(name: str, values: Collection[str]) -> None:
    size = sum(len(value) + 30 for value in values)
    _check(
        size <= patterns.MAX_PATTERNS, name, values, f"patterns of at most {patterns.MAX_PATTERNS} characters in all"
    )


def _is_alpha(value: Any) -> bool:
    return is_number(value) and -MAX_ALPHA <= value <= MAX_ALPHA


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


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
