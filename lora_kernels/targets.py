"""Which modules of a model a LoRAConfig names. The semantics of every match are PEFT's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import nn

from lora_kernels.config import ALL_LINEAR, LoRAConfig
from lora_kernels.errors import ConfigError

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
# Modules that give the weights of these children to a function and call none of them: of PyTorch, torchvision (Swin),
# transformers (WavLM).
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
    """Answers, for one resolved configuration, which paths are adapted and with which rank."""

    def __init__(self, config: LoRAConfig) -> None:
        self.config = config
        self._targets = frozenset(config.target_modules or ()) if not isinstance(config.target_modules, str) else None
        excluded = config.exclude_modules
        self._excluded = frozenset(excluded or ()) if not isinstance(excluded, str) else None
        names = config.layers_pattern or ()
        self._layers = [names] if isinstance(names, str) else list(names)

    def why_not(self, path: str) -> str | None:
        """None where the module at `path` is to be adapted, else the reason why it is not."""
        config = self.config
        if config.exclude_modules:
            by_name = self._excluded is not None and not self._excluded.isdisjoint(_ends(path))
            if by_name or (isinstance(config.exclude_modules, str) and re.fullmatch(config.exclude_modules, path)):
                return "excluded by exclude_modules"
        if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.modules_to_save or ()):
            return "trained whole by modules_to_save"
        if isinstance(config.target_modules, str):
            return None if re.fullmatch(config.target_modules, path) else "not in target_modules"
        assert self._targets is not None
        if path in self._targets:  # a full path is taken whatever its layer's index
            return None
        if self._targets.isdisjoint(_ends(path)):
            return "not in target_modules"
        return None if self._in_layers(path) else "not in layers_to_transform"

    def _in_layers(self, path: str) -> bool:
        wanted = self.config.layers_to_transform
        if wanted is None or wanted == []:
            return True
        patterns = [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in self._layers] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        match = next((m for m in (re.match(pattern, path) for pattern in patterns) if m), None)
        return match is not None and int(match["idx"]) in ([wanted] if isinstance(wanted, int) else wanted)

    def rank_and_alpha(self, path: str) -> tuple[int, float]:
        """r and lora_alpha of the layer at `path`."""
        config = self.config
        return (
            next((r for key, r in config.rank_pattern.items() if _ends_in(key, path)), config.r),
            next((alpha for key, alpha in config.alpha_pattern.items() if _ends_in(key, path)), config.lora_alpha),
        )

    def slips(self, paths: list[str], adapted: Iterable[str]) -> Iterator[str]:
        """What the configuration names and the model, of these paths, does not have: most likely slips of the pen."""
        config, adapted = self.config, list(adapted)
        ends = {end for path in paths for end in _ends(path)}
        for name in sorted((self._targets or frozenset()) - ends):
            yield f"target_modules: no module is called {name!r}"
        by_pattern = isinstance(config.exclude_modules, str)
        if config.exclude_modules and not (
            any(re.fullmatch(str(config.exclude_modules), path) for path in paths)
            if by_pattern
            else ends.intersection(config.exclude_modules)
        ):
            yield f"exclude_modules={config.exclude_modules!r} excludes nothing"
        for name in config.modules_to_save or ():
            if name not in TASK_HEADS.get(config.task_type or "", ()) and not any(
                path.endswith(name) for path in paths
            ):
                yield f"modules_to_save: no module is called {name!r}"
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(config, field):
                if not any(_ends_in(key, path) for path in adapted):
                    yield f"{field}: {key!r} matches no adapted layer"


def _ends(path: str) -> Iterator[str]:
    """ "a.b.c", "b.c", "c" for "a.b.c"."""
    yield path
    while path := path.partition(".")[2]:
        yield path


def _ends_in(pattern: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", path) is not None
