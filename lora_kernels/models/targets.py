"""Finds the modules that a LoRAConfig names, with PEFT's matching rules."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import nn

from lora_kernels.config import ALL_LINEAR, LoRAConfig
from lora_kernels.errors import ConfigError
from lora_kernels.patterns import Budget, Pattern, Text, ends_in, saved_inside

# target_modules=None adapts the attention's query and value projections: every row whose names all occur in the model.
DEFAULT_TARGETS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q", "v"),
    ("query_proj", "value_proj"),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("c_attn",),
)
# Model types for which PEFT chooses otherwise.
DEFAULT_TARGETS_BY_TYPE: dict[str, list[str] | str] = {
    "blip-2": ["q", "v", "q_proj", "v_proj"],
    "btlm": ["c_proj", "c_attn"],
    "deberta": ["in_proj"],
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
}
MAMBA_TYPES = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
# {class: names of children}: the class passes the weights of these children to a function and does not call them. From
# PyTorch, torchvision (Swin) and transformers (WavLM).
READ_BY = {
    "nn.MultiheadAttention": ("out_proj",),
    "ShiftedWindowAttention": ("qkv", "proj"),
    "ShiftedWindowAttentionV2": ("qkv", "proj"),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
# Heads that start from random weights and are therefore trained whole.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's linear layer with a transposed weight, transformers.pytorch_utils.Conv1D."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def resolve(model: nn.Module, config: LoRAConfig, linear: tuple[type[nn.Module], ...]) -> LoRAConfig:
    """The configuration with its defaults filled in for this model: target_modules as names or a regular expression,
    the task's head among modules_to_save, and where the model is from. `linear`: the types that count as linear layers.

    Raises ConfigError where nothing can be filled in.
    """
    named = getattr(model, "name_or_path", None)
    base = config.base_model_name_or_path or (named if isinstance(named, str) and named else None)
    kind = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    config = replace(config, base_model_name_or_path=base, auto_mapping=None if config.task_type else kind)
    heads = [name for name in TASK_HEADS.get(config.task_type or "", ()) if name not in (config.modules_to_save or ())]
    if heads:
        config = replace(config, modules_to_save=[*(config.modules_to_save or ()), *heads])
    if config.target_modules is None:
        return replace(config, target_modules=_default_targets(model, linear))
    if config.target_modules == ALL_LINEAR:
        skipped = left_out(model, config)
        names = [path for path, m in model.named_modules() if path and (isinstance(m, linear) or is_conv1d(m))]
        names = [path for path in names if path not in skipped]
        if not names:
            raise ConfigError(f'target_modules="all-linear", but {type(model).__name__} has no linear layer to adapt')
        return replace(config, target_modules=names)
    return config


def left_out(model: nn.Module, config: LoRAConfig) -> dict[str, str]:
    """{path: reason} of the linear layers that "all-linear" leaves out."""
    head = _output_head(model, config.task_type)
    return uncalled(model) | ({head: "the output head, which all-linear leaves out"} if head else {})


def uncalled(model: nn.Module) -> dict[str, str]:
    """{path: reason} of linear layers whose owner reads their weight and never calls them: LoRA there does nothing."""
    found = {}
    for path, module in model.named_modules():
        kind = "nn.MultiheadAttention" if isinstance(module, nn.MultiheadAttention) else type(module).__name__
        for name in READ_BY.get(kind, ()):
            found[f"{path}.{name}" if path else name] = f"{kind} reads its weight and never calls it"
    if model_type(model) in MAMBA_TYPES:
        reason = "Mamba's fused scan reads its weight and never calls it"
        found |= {
            path: reason for path, _ in model.named_modules() if path.rpartition(".")[2] in ("out_proj", "conv1d")
        }
    return found


def model_type(model: nn.Module) -> str:
    """model.config.model_type of a transformers model, "" elsewhere."""
    config = getattr(model, "config", None)
    found = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    return found if isinstance(found, str) else ""


def _output_head(model: nn.Module, task_type: str | None) -> str | None:
    """The path of the layer that makes a transformers model's logits, or None."""
    get = getattr(model, "get_output_embeddings", None)
    if not callable(get):
        return None
    head = get()
    if head is None and task_type == "SEQ_CLS":
        head = next(
            (h for h in (getattr(model, name, None) for name in ("score", "classifier")) if h is not None), None
        )
    return next((path for path, module in model.named_modules() if module is head), None)


def _default_targets(model: nn.Module, linear: tuple[type[nn.Module], ...]) -> list[str] | str:
    if (kind := model_type(model)) in DEFAULT_TARGETS_BY_TYPE:
        return DEFAULT_TARGETS_BY_TYPE[kind]
    present = {path.rpartition(".")[2] for path, m in model.named_modules() if isinstance(m, linear) or is_conv1d(m)}
    names = [name for row in DEFAULT_TARGETS if present.issuperset(row) for name in row]
    if not names:
        raise ConfigError(
            f"target_modules is None and {type(model).__name__} has no query and value projections of a known name; "
            f'pass target_modules="all-linear" or names, of which this model has {", ".join(sorted(present)) or "none"}'
        )
    return names


class Matcher:
    """Decides, for one resolved configuration, which paths are adapted and with which rank.

    Its methods raise ConfigError if the patterns of the configuration take too many steps (patterns.Budget).
    """

    def __init__(self, config: LoRAConfig) -> None:
        self.config = config
        self._targets = _names(config.target_modules)
        self._target = Pattern(config.target_modules) if isinstance(config.target_modules, str) else None
        self._excluded = _names(config.exclude_modules)
        self._exclude = Pattern(config.exclude_modules) if isinstance(config.exclude_modules, str) else None
        self._saved = [Pattern(saved_inside(name)) for name in config.modules_to_save or ()]
        names = config.layers_pattern or ()
        self._layers = {name: Pattern(name) for name in ([names] if isinstance(names, str) else names)}
        wanted = config.layers_to_transform
        self._indices = frozenset([wanted] if isinstance(wanted, int) else wanted or ())
        self._ranks = {key: _end(key) for key in config.rank_pattern}
        self._alphas = {key: _end(key) for key in config.alpha_pattern}
        self._budget = Budget()

    def why_not(self, path: str) -> str | None:
        """Return None if the module at `path` is adapted, else the reason why it is not."""
        text = Text(path, self._budget)
        if not self._excluded.isdisjoint(_ends(path)) or (
            self.config.exclude_modules and self._exclude and self._exclude.fullmatch(text)
        ):
            return "excluded by exclude_modules"
        if any(pattern.match(text) for pattern in self._saved):
            return "trained whole by modules_to_save"
        if self._target is not None:
            return None if self._target.fullmatch(text) else "not in target_modules"
        if path in self._targets:  # a full path is taken whatever its layer's index
            return None
        if self._targets.isdisjoint(_ends(path)):
            return "not in target_modules"
        return None if not self._indices or self._index(text) in self._indices else "not in layers_to_transform"

    def _index(self, text: Text) -> int | None:
        """The index of the path's layer in the outermost module list that layers_pattern names."""
        path = text.value
        if not self._layers:
            match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", path)
            return match and int(match["idx"])
        starts = [0, *(i + 1 for i, char in enumerate(path) if char == ".")]
        for name, pattern in self._layers.items():
            for start in starts:
                matches = (re.compile(r"\.(\d+)\.").match(path, end) for end in pattern.ends(text, start))
                found = {int(match[1]) for match in matches if match}
                if len(found) > 1:
                    raise ConfigError(
                        f"layers_pattern = {reprlib.repr(name)} finds the indices {sorted(found)[:4]} in {path}; write "
                        "it so that it ends at one list"
                    )
                if found:
                    return found.pop()
        return None

    def rank_and_alpha(self, path: str) -> tuple[int, float]:
        """Return r and lora_alpha of the layer at `path`."""
        config, text = self.config, Text(path, self._budget)
        rank = next((key for key, pattern in self._ranks.items() if pattern.match(text)), None)
        alpha = next((key for key, pattern in self._alphas.items() if pattern.match(text)), None)
        return (
            config.r if rank is None else config.rank_pattern[rank],
            config.lora_alpha if alpha is None else config.alpha_pattern[alpha],
        )

    def slips(self, paths: list[str], adapted: Iterable[str]) -> Iterator[str]:
        """List names and patterns of the configuration that match none of these paths, most likely typing errors."""
        config, ends = self.config, {end for path in paths for end in _ends(path)}
        for name in sorted(self._targets - ends):
            yield f"target_modules: no module is called {name!r}"
        if self._exclude is not None and config.exclude_modules:
            excludes = any(self._exclude.fullmatch(Text(path, self._budget)) for path in paths)
        else:
            excludes = not config.exclude_modules or not self._excluded.isdisjoint(ends)
        if not excludes:
            yield f"exclude_modules={config.exclude_modules!r} excludes nothing"
        for name in config.modules_to_save or ():
            if name not in TASK_HEADS.get(config.task_type or "", ()) and not any(
                path.endswith(name) for path in paths
            ):
                yield f"modules_to_save: no module is called {name!r}"
        texts = [Text(path, self._budget) for path in adapted]
        for field, found in (("rank_pattern", self._ranks), ("alpha_pattern", self._alphas)):
            for key, pattern in found.items():
                if not any(pattern.match(text) for text in texts):
                    yield f"{field}: {key!r} matches no adapted layer"


class _PlainEnd:
    """A key of rank_pattern or alpha_pattern that has only names and dots, so that re matches it quickly. There may be
    one for every layer, if the ranks were chosen layer by layer."""

    def __init__(self, key: str) -> None:
        self._last, self._regex = key.rpartition(".")[2], re.compile(ends_in(key))

    def match(self, text: Text) -> bool:
        return text.value.endswith(self._last) and self._regex.match(text.value) is not None


def _end(key: str) -> Pattern | _PlainEnd:
    return _PlainEnd(key) if re.fullmatch(r"[\w.]+", key) else Pattern(ends_in(key))


def _ends(path: str) -> Iterator[str]:
    """ "a.b.c", "b.c", "c" for "a.b.c"."""
    yield path
    while path := path.partition(".")[2]:
        yield path


def _names(value: str | list[str] | None) -> frozenset[str]:
    return frozenset(value or ()) if not isinstance(value, str) else frozenset()
