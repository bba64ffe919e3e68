"""Adds adapters to the base weights for inference, and restores the base weights bit for bit."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from lora_kernels.adapters.sharded import is_sharded
from lora_kernels.errors import ConfigError, MergeError
from lora_kernels.layers import LoRALinear
from lora_kernels.layers.tokens import TrainedRows
from lora_kernels.models.explain import unwrap


def merge_lora(model: nn.Module) -> nn.Module:
    """Replace W by W + scaling * B A in every adapted layer, in place; returns the model.

    Each sum is rounded once to W's dtype. The base weights are kept for unmerge_lora, which doubles their memory.
    Layers that are already merged are skipped. A weight tied to another module
    becomes the layer's own while merged. Trained rows (trainable_token_indices) are written into their weight, too.
    Raises MergeError naming the layer if a sum is not finite, with nothing merged, and for a model that is sharded
    over processes; ConfigError without LoRA layers.
    """
    for name, parameter in unwrap(model).named_parameters():
        if is_sharded(parameter):
            raise MergeError(f"{name} is sharded over processes; save_adapter, and merge it in one process")
    layers = {path: layer for path, layer in _layers(model).items() if not layer.merged}
    for path, layer in layers.items():
        try:
            layer.merged_weight()
        except MergeError as error:
            raise MergeError(f"{path}: {error}. No layer of the model was merged") from None
    rows = {path: module for path, module in unwrap(model).named_modules() if isinstance(module, TrainedRows)}
    for path, module in rows.items():
        if not torch.isfinite(module.trainable_tokens_delta).all():
            raise MergeError(f"{path}: its trained rows hold NaN or infinity. No layer of the model was merged")
    owners: dict[int, int] = {}
    for _, parameter in unwrap(model).named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    done = list[LoRALinear | TrainedRows]()
    try:
        for path, layer in layers.items():
            if owners[id(layer.weight)] > 1:
                warnings.warn(f"{path}.weight is tied to another module, which keeps the base weight", stacklevel=2)
            layer.merge()
            done.append(layer)
        shared: dict[tuple[int, int], nn.Parameter] = {}
        for module in rows.values():
            if not module.merged:
                done.append(module)
                key = id(module._parameters["weight"]), id(module.trainable_tokens_delta)
                shared[key] = module.merge(shared.get(key))
    except BaseException:
        for merged in done:
            merged.unmerge()
        raise
    return model


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Restore the base weight tensors that merge_lora kept, in place; returns the model.

    Layers that are not merged are skipped. Raises ConfigError without LoRA layers.
    """
    for layer in _layers(model).values():
        layer.unmerge()
    for module in unwrap(model).modules():
        if isinstance(module, TrainedRows):
            module.unmerge()
    return model


def _layers(model: nn.Module) -> dict[str, LoRALinear]:
    layers = {path: module for path, module in unwrap(model).named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no LoRA layers; call apply_lora or load_adapter first")
    return layers
