"""A transformer whose layers are runs of its own layers, sharing their weights: PEFT's layer_replication."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from lora_kernels.errors import ConfigError

REPLICATED_AS = "lora_replicated_layers"


def replicate_layers(model: nn.Module, runs: Sequence[Sequence[int]]) -> nn.Module:
    """Replace the model's layers by copies of those of each [start, end), one run after another; returns the model.

    [[0, 4], [2, 5]] makes 0 1 2 3 2 3 4 of five layers. The copies share the Parameters of what they are copies of. For
    models in Llama's, BERT's and Falcon's shape, as PEFT finds the layers. Does nothing where the layers are these
    runs already. Raises ConfigError for another model, other runs than it has, and layers that it does not have.
    """
    wanted = [list(run) for run in runs]
    has = getattr(model, REPLICATED_AS, None)
    if has == wanted:
        return model
    if has is not None:
        raise ConfigError(f"the model's layers are the runs {has} already, not {wanted}; take a fresh model")
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
        f"layer_replication: {type(model).__name__} has no list of layers where Llama, BERT or Falcon have theirs"
    )


def _sharing_copy(module: nn.Module) -> nn.Module:
    shared = {id(parameter): parameter for parameter in module.parameters()}
    return copy.deepcopy(module, dict(shared))  # type: ignore[arg-type]  # what deepcopy finds there it takes as copied
