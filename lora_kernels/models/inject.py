"""Puts LoRA layers into an existing model, and records for each linear layer whether it was adapted and why not."""

from __future__ import annotations

import reprlib
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lora_kernels.config import ALL_LINEAR, BASE_CHANGING_INITS, LoRAConfig
from lora_kernels.errors import ConfigError
from lora_kernels.layers import BiasedLoRALinear, DoRALinear, LoRALinear
from lora_kernels.layers.replication import replicate_layers
from lora_kernels.layers.tokens import DELTA, into_trained_rows
from lora_kernels.models.embeddings import check_embeddings, kept_tied, trained_tokens
from lora_kernels.models.explain import REMEMBERED_AS, Injection, LayerPlan, explain, injection_of, unwrap
from lora_kernels.models.fast_paths import switch_off
from lora_kernels.models.targets import Matcher, is_conv1d, left_out, resolve, uncalled

__all__ = ["apply_lora", "explain"]

LINEAR = (nn.Linear, LoRALinear)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def plan_injection(model: nn.Module, config: LoRAConfig) -> Injection:
    """Return what apply_lora(model, config) would do. Changes nothing.

    Raises ConfigError for a target that is not a plain nn.Linear, if there is no target, and for modules_to_save that
    contain a target or have no forward.
    """
    if any(nn.parameter.is_lazy(parameter) for parameter in model.parameters()):
        raise ConfigError("the model has lazy parameters without a shape; run it once on an example first")
    skipped = left_out(model, config) if config.target_modules == ALL_LINEAR else {}
    config = resolve(model, config, LINEAR)
    matcher = Matcher(config)
    unused_weights = uncalled(model)
    layers = []
    for path, module in model.named_modules():
        why_not = matcher.why_not(path) if path else "the model itself"
        if why_not is None:
            _check_target(path, module, unused_weights.get(path))
            layers.append(LayerPlan(path, None, *matcher.rank_and_alpha(path)))
        elif isinstance(module, LINEAR) or is_conv1d(module):
            layers.append(LayerPlan(path, skipped.get(path, why_not)))
    saved = _saved_modules(model, config.modules_to_save or ())
    injection = Injection(config, tuple(layers), saved, trained_tokens(model, config))
    if not injection.adapted:
        ends = sorted({layer.path.rpartition(".")[2] for layer in layers if layer.path})
        named = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform")
        given = ((name, getattr(config, name)) for name in named)
        raise ConfigError(
            f"no layer of {type(model).__name__} matches "
            f"{', '.join(f'{name}={reprlib.repr(value)}' for name, value in given if value is not None)}; "
            f"its linear layers are called {', '.join(ends) or '(it has none)'}"
        )
    for path in injection.saved:
        inside = [name for name in injection.adapted if name == path or name.startswith(f"{path}.")]
        if inside:
            raise ConfigError(
                f"{path} is among modules_to_save, but holds the target {inside[0]}; choose one of the two"
            )
    return check_embeddings(model, injection)


def apply_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Replace the linear layers that `config` names by LoRALinear, in place, and freeze everything else.

    The layers share their Parameters with those they replace. Trainable afterwards: lora_A and lora_B, the modules of
    modules_to_save, and the biases that `config.bias` names; with inference_mode nothing. A tied weight is adapted only
    where a target layer uses it; a tied module among modules_to_save gets weights of its own. Both warn.

    Returns the same model. Raises ConfigError, with the model as it was, if it has LoRA layers already, if nothing
    matches, or if a target cannot be adapted.
    """
    if unwrap(model) is not model:
        raise ConfigError("call apply_lora before torch.compile and before DistributedDataParallel wrap the model")
    if injection_of(model) is not None or any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ConfigError(
            "this model has LoRA layers already; take a fresh one, or load_adapter to exchange their weights"
        )
    with torch.inference_mode(False), rollback(model):  # tensors made in inference mode cannot be trained
        if config.layer_replication:
            replicate_layers(model, config.layer_replication)
        injection = plan_injection(model, config)
        paths = [path for path, _ in model.named_modules() if path]
        for slip in Matcher(injection.config).slips(paths, injection.adapted):
            warnings.warn(slip, stacklevel=2)
        inject(model, injection, build_layers(model, injection))
    return model


@contextmanager
def rollback(model: nn.Module) -> Iterator[None]:
    """If the block raises, the model's modules, Parameters, attributes, flags and weights (as tensors, not their
    contents) are put back as they were at its start."""
    before = [(m, type(m), dict(vars(m)), dict(m._parameters), dict(m._modules)) for m in model.modules()]
    settings = getattr(model, "config", None)
    depth = getattr(settings, "num_hidden_layers", None)
    parameters = [parameter for parameter in model.parameters() if not nn.parameter.is_lazy(parameter)]
    weights = [(parameter, parameter.data, parameter.requires_grad) for parameter in parameters]
    try:
        yield
    except BaseException:
        for module, kind, attributes, held, modules in before:
            for kept, was in ((vars(module), attributes), (module._parameters, held), (module._modules, modules)):
                kept.clear()
                kept.update(was)  # type: ignore[arg-type]
            if type(module) is not kind:
                module.__class__ = kind  # type: ignore[assignment]
        if depth is not None:
            settings.num_hidden_layers = depth  # type: ignore[union-attr]
        for parameter, data, flag in weights:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            if parameter.requires_grad != flag:
                with torch.inference_mode(parameter.is_inference()):
                    parameter.requires_grad_(flag)
        raise


def build_layers(model: nn.Module, injection: Injection) -> dict[str, LoRALinear]:
    """The LoRALinear for each adapted path, over the model's own Parameters and not yet in their places.

    Raises ConfigError where an initialisation fails; call it inside rollback.
    """
    init, owners, made = injection.config.init_lora_weights, _owners(model), {}
    kind = BiasedLoRALinear if injection.config.lora_bias else LoRALinear
    kind = DoRALinear if injection.config.use_dora else kind
    for path, layer in injection.adapted.items():
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        elsewhere = [name for name in owners[id(linear.weight)] if name != f"{path}.weight"]
        if elsewhere and init in BASE_CHANGING_INITS:
            raise ConfigError(
                f"init_lora_weights={init!r} would change {elsewhere[0]}, tied to {path}.weight; exclude that or "
                "untie the two first"
            )
        if elsewhere and not injection.config.layer_replication:  # replicated layers share weights
            warnings.warn(f"{path}.weight is tied to {elsewhere[0]}; only {path} is adapted", stacklevel=4)
        try:
            made[path] = kind.from_linear(linear, injection.config, r=layer.r, lora_alpha=layer.lora_alpha)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    return made


def inject(model: nn.Module, injection: Injection, layers: dict[str, LoRALinear]) -> None:
    """Put built layers into their places, choose what is trainable, and remember the injection on the model."""
    config, tied = injection.config, kept_tied(model, injection.config)
    model.requires_grad_(False)
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    for path in injection.saved:
        if path not in tied:
            _untie(model, path)
    for one in injection.tokens:
        delta = into_trained_rows(model.get_submodule(one.path), one.rows)
        for other in one.tied:
            into_trained_rows(model.get_submodule(other), one.rows, delta)
        delta.requires_grad_(False)
    if not config.inference_mode:
        for path in injection.saved:
            for name, parameter in model.get_submodule(path).named_parameters():
                _train(f"{path}.{name}", parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owner, _, kind = name.rpartition(".")
            adapted = owner in layers
            is_bias = kind == "bias" and (config.bias == "all" or (config.bias == "lora_only" and adapted))
            if is_bias or kind == DELTA or (adapted and kind in layers[owner].adapter_parameters):
                _train(name, parameter)
    else:
        for layer in layers.values():
            layer.requires_grad_(False)
    switch_off(model, lambda module: isinstance(module, LoRALinear))
    setattr(model, REMEMBERED_AS, injection)


def _train(name: str, parameter: nn.Parameter) -> None:
    if parameter.is_inference():
        raise ConfigError(
            f"{name} was created in torch.inference_mode and cannot be trained; build the model outside of it"
        )
    parameter.requires_grad_(True)


def _check_target(path: str, module: nn.Module, unused_because: str | None) -> None:
    if isinstance(module, LoRALinear):
        return
    weight = module._parameters.get("weight")
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        wrong = f"is a {type(module).__name__}; only nn.Linear is supported"
    elif unused_because:
        wrong = f"would never be called: {unused_because}"
    elif type(weight) is not nn.Parameter or weight.dtype not in FLOATS or weight.dim() != 2:
        wrong = "has no plain floating-point weight (quantised, parametrised or sharded)"
    elif "forward" in vars(module) or any(getattr(module, kind) for kind in HOOKS):
        wrong = "has a patched forward or hooks, which would be lost; remove them and put them on the new layer"
    else:
        return
    raise ConfigError(f"target_modules names {path}, which {wrong}. Change target_modules or use exclude_modules")


def _saved_modules(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """The paths that end in one of the names, as PEFT matches them; of nested ones the outermost."""
    names, found = tuple(names), list[str]()
    for path, module in model.named_modules(remove_duplicate=False):
        if not path.endswith(names) or any(path.startswith(f"{outer}.") for outer in found):
            continue
        if isinstance(module, CONTAINERS):
            raise ConfigError(
                f"modules_to_save names {path}, a {type(module).__name__}, which has no forward of its own"
            )
        found.append(path)
    return tuple(found)


def _owners(model: nn.Module) -> dict[int, list[str]]:
    owners = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    return owners


def _untie(model: nn.Module, path: str) -> None:
    """Give the module its own copies of Parameters that it shares with others: PEFT trains a copy of it, too."""
    owners, module = _owners(model), model.get_submodule(path)
    for name, parameter in list(module.named_parameters()):
        elsewhere = [other for other in owners[id(parameter)] if not other.startswith(f"{path}.")]
        if elsewhere:
            owner, _, last = name.rpartition(".")
            copy = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            setattr(module.get_submodule(owner), last, copy)
            warnings.warn(f"{path}.{name} is no longer tied to {elsewhere[0]}: modules_to_save trains it", stacklevel=4)
