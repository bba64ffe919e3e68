"""Chooses the linear layers of a model that are pooled, gives a reason for each other layer, and restores them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from lora_kernels.config import ALL_LINEAR, LoRAConfig
from lora_kernels.errors import ConfigError
from lora_kernels.layers import LoRALinear
from lora_kernels.models.explain import unwrap
from lora_kernels.models.fast_paths import switch_off, switch_on
from lora_kernels.models.inject import FLOATS
from lora_kernels.models.targets import Matcher, is_conv1d, left_out, uncalled
from lora_kernels.planning.multi_plan import resolve
from lora_kernels.pool.active import ActiveBatch
from lora_kernels.pool.layer import PoolSettings, _Pooled, into_pooled, out_of_pooled

Targets = str | Sequence[str] | None
# Paths of the linear layers of experts, if each expert is a module. Their inputs are reordered subsets of the rows.
EXPERT = re.compile(r"(^|\.)(?!shared)\w*experts?\.\d+(\.|$)")


MAX_RANK = 64  # the default of max_rank; the memory that kernels reserve for a row grows with it


def check_sizes(capacity: object, max_rank_total: int, max_rank: int | None, batch_dim: object) -> int:
    """Return the largest rank of one adapter. Raises ConfigError for sizes out of range."""
    sizes = {"capacity": capacity, "max_rank_total": max_rank_total, "max_rank": 1 if max_rank is None else max_rank}
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"{name} = {size!r}: accepted is an integer of at least 1")
    if batch_dim not in (None, 0, 1) or isinstance(batch_dim, bool):
        raise ConfigError(f"batch_dim = {batch_dim!r}: accepted are 0, 1 and None")
    max_rank = min(MAX_RANK, max_rank_total) if max_rank is None else max_rank
    if max_rank > max_rank_total:
        raise ConfigError(f"max_rank = {max_rank}: accepted are ranks up to max_rank_total = {max_rank_total}")
    return max_rank


def choose_layers(model: nn.Module, target_modules: Targets = None) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return {path: layer} of the layers to pool, and {path: reason} of the other linear layers. Changes nothing.

    target_modules: as in LoRAConfig. None: all linear layers except the output head of a transformers model.
    Raises ConfigError for a model that has LoRA layers, for a named layer that cannot be pooled, and if no layer is
    left.
    """
    _check_model(model)
    targets = ALL_LINEAR if target_modules is None else target_modules
    config = LoRAConfig(target_modules=targets if isinstance(targets, str) else list(targets))
    everything = config.target_modules == ALL_LINEAR
    skipped = left_out(model, config) if everything else uncalled(model)
    matcher = None if everything else Matcher(config)
    layers, left = dict[str, nn.Module](), dict[str, str]()
    for path, module in model.named_modules():
        named = matcher is not None and bool(path) and matcher.why_not(path) is None
        if not isinstance(module, nn.Linear) and not is_conv1d(module) and not named:
            continue
        why_not = skipped.get(path) or _why_not(path, module)
        if matcher is not None and not named:
            left[path] = "not in the pool's target_modules"
        elif why_not is None:
            layers[path] = module
        elif named:
            raise ConfigError(f"target_modules names {path}, which cannot be pooled: {why_not}")
        else:
            left[path] = why_not
    if not layers:
        reasons = "; ".join(f"{path or 'the model itself'}: {why}" for path, why in list(left.items())[:4])
        raise ConfigError(f"{type(model).__name__} has no linear layer to pool ({reasons or 'it has none'})")
    return layers, left


def _check_model(model: nn.Module) -> None:
    if unwrap(model) is not model:
        raise ConfigError("call AdapterPool before torch.compile and before (Distributed)DataParallel wrap the model")
    for path, module in model.named_modules():
        if isinstance(module, _Pooled):
            raise ConfigError(f"{path} belongs to a pool already; one pool holds all adapters of a model, or close it")
        if isinstance(module, LoRALinear) or (hasattr(module, "base_layer") and hasattr(module, "lora_A")):
            raise ConfigError(
                f"{path or 'the model'} has an adapter already ({type(module).__name__}); give AdapterPool the base "
                "model (PEFT: unload()), save the adapter and load it into the pool"
            )


def _why_not(path: str, module: nn.Module) -> str | None:
    """Return the reason why this layer cannot be pooled, or None if it can."""
    weight = module._parameters.get("weight")
    if not path:
        return "the model itself"
    if type(module) is not nn.Linear and not is_conv1d(module):
        return f"a {type(module).__name__}; pooled are nn.Linear and Conv1D and no class made of them (quantised, ...)"
    if EXPERT.search(path):
        return "an expert of a mixture, whose rows are chosen and reordered: no row's sequence is known"
    if "forward" in vars(module):
        return "its forward is patched (offloading?), which would bypass the pool"
    if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor or weight.dtype not in FLOATS:
        return "no plain floating-point weight (quantised, sharded or lazy)"
    if weight.is_meta:
        return "its weight is on the meta device: load the model first"
    return None


class PooledModel:
    """A model whose ``layers`` are pooled, until ``restore`` undoes all changes.

    The weights of the layers are frozen. nn.TransformerEncoder's inference path is switched off, since it reads the
    weights of its linear layers without calling them. Raises BackendUnavailableError for a backend that cannot run.
    """

    def __init__(self, model: nn.Module, target_modules: Targets, settings: PoolSettings, active: ActiveBatch) -> None:
        chosen, self.left_out = choose_layers(model, target_modules)
        for weight in (layer.get_parameter("weight") for layer in chosen.values()):
            resolve(settings.backend, weight.device.type, weight.dtype)
        self.model, self.settings = model, settings
        self.layers = dict[str, _Pooled]()
        self._undo = ExitStack()
        try:
            for path, layer in chosen.items():
                self.layers[path] = into_pooled(layer, settings, active, path)
                self._undo.callback(out_of_pooled, self.layers[path])
            for layer in chosen.values():
                for name, parameter in layer.named_parameters(recurse=False):
                    self._undo.callback(_set_flag, layer, name, parameter.requires_grad)
                    _set_flag(layer, name, False)
            self._undo.callback(switch_on, model)
            switch_off(model, lambda module: isinstance(module, _Pooled))
        except BaseException:  # usually out of memory
            self.restore()
            raise

    def device(self) -> torch.device:
        """Return the device of the first layer."""
        return next(iter(self.layers.values())).pool_slots.A.device

    def restore(self) -> None:
        """Give every layer its own class again, remove the pool's buffers, and restore the flags. If one step raises,
        the other steps are still done."""
        self.layers = {}
        self._undo.close()


def _set_flag(layer: nn.Module, name: str, flag: bool) -> None:
    """Set requires_grad of a layer's parameter, which is looked up by name since ``to`` and ``half`` may replace it."""
    parameter = layer._parameters.get(name)
    if parameter is not None and parameter.requires_grad != flag:
        with torch.inference_mode(parameter.is_inference()):  # otherwise PyTorch raises
            parameter.requires_grad_(flag)
