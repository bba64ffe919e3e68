"""Token embeddings of an adapted model, as in PEFT: the rows that are trained, and modules that share the weight."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lora_kernels.config import LoRAConfig
from lora_kernels.errors import ConfigError
from lora_kernels.models.explain import Injection, TrainedTokens

EMBEDDING_NAMES = ("embed_tokens", "lm_head")  # the names under which PEFT looks for tied modules


def input_embedding(model: nn.Module) -> str | None:
    """The path of the module that get_input_embeddings() of a transformers model returns; None for other models."""
    get = getattr(model, "get_input_embeddings", None)
    found = get() if callable(get) else None
    return next((path for path, module in model.named_modules() if path and module is found), None)


def embeddings(model: nn.Module) -> list[str]:
    """The paths of the input embedding and of the output head of a transformers model, as far as it has them."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    paths = [path for path, module in model.named_modules() if path and head is not None and module is head]
    path = input_embedding(model)
    return paths if path is None else [path, *paths]


def tied_to_embedding(model: nn.Module) -> tuple[str, ...]:
    """The paths of the other modules with the input embedding's weight, if the model's configuration ties them."""
    path, settings = input_embedding(model), getattr(model, "config", None)
    if path is None or not getattr(settings, "tie_word_embeddings", False):
        return ()
    embedding = model.get_submodule(path)
    weight = embedding._parameters.get("weight")
    others = [(other, module) for other, module in model.named_modules() if module is not embedding]
    return tuple(other for other, module in others if weight is not None and module._parameters.get("weight") is weight)


def trained_tokens(model: nn.Module, config: LoRAConfig) -> tuple[TrainedTokens, ...]:
    """The modules with rows that config.trainable_token_indices trains. ConfigError for a module whose rows cannot be
    trained."""
    wanted, path = config.trainable_token_indices, input_embedding(model)
    if wanted is None:
        return ()
    if not isinstance(wanted, dict):
        wanted = {path or "embed_tokens": wanted}
    found = dict[str, tuple[int, ...]]()
    for name, rows in wanted.items():
        paths = [one for one, _ in model.named_modules() if one.endswith(name)]
        if not paths:
            raise ConfigError(f"trainable_token_indices: no module of {type(model).__name__} is called {name!r}")
        for one in paths:
            _check_module(one, model.get_submodule(one), rows)
            if found.setdefault(one, tuple(rows)) != tuple(rows):
                raise ConfigError(f"trainable_token_indices gives two lists of rows for {one}; give its whole path")
    tied = tied_to_embedding(model) if path in found else ()
    other = next((one for one in tied if found.get(one, found[path or ""]) != found[path or ""]), None)
    if other is not None:
        if config.ensure_weight_tying:
            raise ConfigError(f"ensure_weight_tying: {path} and {other} share a weight; give both the same rows")
        tied = ()
    for one in tied:
        _check_module(one, model.get_submodule(one), found[path or ""])
    return tuple(
        TrainedTokens(one, rows, tied if one == path else ()) for one, rows in found.items() if one not in tied
    )


def _check_module(path: str, module: nn.Module, rows: list[int] | tuple[int, ...]) -> None:
    weight = module._parameters.get("weight")
    if not isinstance(module, nn.Embedding | nn.Linear) or weight is None or weight.dim() != 2:
        wrong = f"is a {type(module).__name__}; rows of nn.Embedding and nn.Linear can be trained"
    elif getattr(module, "bias", None) is not None:
        wrong = "has a bias, which PEFT leaves out where it trains rows"
    elif max(rows, default=0) >= len(weight):
        wrong = f"has {len(weight)} rows, and row {max(rows)} is asked for; resize_token_embeddings first"
    else:
        return
    raise ConfigError(f"trainable_token_indices names {path}, which {wrong}")


def check_embeddings(model: nn.Module, injection: Injection) -> Injection:
    """The injection, with the modules added that ensure_weight_tying trains whole. ConfigError if two settings train
    one weight, and for an adapter on a tied weight, which PEFT would put on the embedding as well."""
    config = injection.config
    for one in injection.tokens:
        for path in (one.path, *one.tied):
            whole = any(path == saved or path.startswith(f"{saved}.") for saved in injection.saved)
            if whole or path in injection.adapted:
                other = "modules_to_save" if whole else "target_modules"
                raise ConfigError(f"{path} is named by trainable_token_indices and by {other}; choose one of the two")
    group = tied_group(model, config)
    if not group:
        return injection
    targets = config.target_modules if isinstance(config.target_modules, list) else []
    targeted = [path for path in group if path in injection.adapted]
    targeted += [name for name in targets if name.rpartition(".")[2] in EMBEDDING_NAMES]
    if not _saves_embeddings(config):
        if targeted:
            raise ConfigError(
                f"ensure_weight_tying with {targeted[0]} among target_modules adapts the embedding that shares its "
                "weight, too, and embeddings are not adapted here; leave one of the two out"
            )
        return injection
    biased = next((path for path in group if getattr(model.get_submodule(path), "bias", None) is not None), None)
    if biased is not None:
        raise ConfigError(f"ensure_weight_tying: {biased} shares its weight and has a bias of its own; not supported")
    return replace(injection, saved=(*(path for path in injection.saved if path not in group), *group))


def kept_tied(model: nn.Module, config: LoRAConfig) -> tuple[str, ...]:
    """The paths of the modules that are trained whole and share one weight."""
    return tied_group(model, config) if _saves_embeddings(config) else ()


def tied_group(model: nn.Module, config: LoRAConfig) -> tuple[str, ...]:
    """Paths of the input embedding and of modules that share its weight, if ensure_weight_tying is set; else ()."""
    tied, path = tied_to_embedding(model) if config.ensure_weight_tying else (), input_embedding(model)
    return (path, *tied) if tied and path is not None else ()


def _saves_embeddings(config: LoRAConfig) -> bool:
    return any(name.rpartition(".")[2] in EMBEDDING_NAMES for name in config.modules_to_save or ())
