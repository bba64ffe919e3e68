"""Replaces a transformer's layers by copies of runs of them that share weights: PEFT's layer_replication."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from lora_kernels.errors import ConfigError

REPLICATED_AS = "lora_replicated_layers"


def replicate_layers(model: nn.Module, runs: Sequence[Sequence[int]]) -> nn.Module:
    """Replace the model's layers by copies of the layers of each run [start, end), in order; returns the model.

    [[0, 4], [2, 5]] turns layers 0 to 4 into 0 1 2 3 2 3 4. A copy shares the Parameters of its original. The layers
    are found as in PEFT, for models with the structure of Llama, BERT or Falcon. Does nothing if the model was already
    replicated with these runs. Raises ConfigError for a model of another structure, a model that was replicated with
    other runs, and indices of layers that the model does not have.
    """
    wanted = [list(run) for run in runs]
    has = getattr(model, REPLICATED_AS, None)
    if has == wanted:
        return model
    if has is not None:
        raise ConfigError(f"the model's layers were already replicated by {has}, not {wanted}; use a fresh model")
    owner, name, layers = _layers_of(model)
    if max(end for _, end in wanted) > len(layers):
        raise ConfigError(f"layer_replication = {wanted}: {type(model).__name__} has {len(layers)} layers")
    made = nn.ModuleList()
    for start, end in wanted:
        for i in range(start, end):
            clone = _sharing_copy(layers[i])
            for module in clone.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = len(made)  # type: ignore[assignment]  # where a cache keeps this layer's keys
            made.append(clone)
    setattr(owner, name, made)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = len(made)
    vars(model)[REPLICATED_AS] = wanted
    return model


def _layers_of(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    inner = model
    while isinstance(getattr(inner, "model", None), nn.Module):
        inner = inner.model  # type: ignore[assignment]
    inner = inner.bert if isinstance(getattr(inner, "bert", None), nn.Module) else inner  # type: ignore[assignment]
    for path in ("layers", "encoder.layer", "h"):
        before, _, name = path.rpartition(".")
        owner = getattr(inner, before, None) if before else inner
        layers = getattr(owner, name, None)
        if isinstance(owner, nn.Module) and isinstance(layers, nn.ModuleList):
            return owner, name, layers
    raise ConfigError(
        f"layer_replication: {type(model).__name__} has no list of layers at the path of Llama's, BERT's or "
        "Falcon's; leave layer_replication out"
    )


def _sharing_copy(module: nn.Module) -> nn.Module:
    shared = {id(parameter): parameter for parameter in module.parameters()}
    return copy.deepcopy(module, dict(shared))  # type: ignore[arg-type]  # deepcopy reuses what this dict holds
