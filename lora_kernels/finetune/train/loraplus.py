"""LoRA+: parameter groups with a higher learning rate for B than for A.

Source: Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv 2402.12354.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_kernels.errors import ConfigError


def loraplus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, *, weight_decay: float = 0.0, embedding_lr: float = 1e-6
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of ``model`` into parameter groups for any torch optimizer.

    There are always four groups in this order. They equal those of PEFT's create_loraplus_optimizer, so optimizer
    states are exchangeable:

    1. "A": every matrix that is in no other group, at ``lr``.
    2. "embedding": adapters of embeddings, at ``embedding_lr``.
    3. "B": lora_B and one-dimensional parameters (DoRA's magnitudes) outside group 4, at ``ratio * lr``.
    4. "B_no_decay": the same, if the name contains "bias" or the owner is an nn.LayerNorm, at ``ratio * lr``, without
       weight decay.

    Args:
        model: with layers of this package or of PEFT; parameters that require no gradient are left out.
        lr: learning rate of A. With a large ratio, the paper recommends half of LoRA's usual rate or less.
        ratio: learning rate of B over that of A; 1 is plain LoRA.
        weight_decay: weight decay of the first three groups.
        embedding_lr: learning rate of the adapters of embeddings.

    Raises:
        ConfigError: a rate, ratio or decay that is negative, or a model without trainable parameters.
    """
    given = {"lr": lr, "ratio": ratio, "weight_decay": weight_decay, "embedding_lr": embedding_lr}
    if not all(value >= 0 for value in given.values()):
        raise ConfigError(f"{', '.join(f'{k}={v}' for k, v in given.items())}; accepted are numbers from 0 up")
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B_no_decay": []}
    modules = dict(model.named_modules())
    norms = tuple(f"{path}." for path, module in modules.items() if path and isinstance(module, nn.LayerNorm))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if _of_embedding(name, modules):
            group = "embedding"
        elif "lora_B" not in name and parameter.ndim != 1:
            group = "A"
        else:
            group = "B_no_decay" if "bias" in name or name.startswith(norms) else "B"
        groups[group].append(parameter)
    if not any(groups.values()):
        raise ConfigError(f"{type(model).__name__} has no trainable parameter; add an adapter or unfreeze something")
    rates = {"A": lr, "embedding": embedding_lr, "B": lr * ratio, "B_no_decay": lr * ratio}
    return [
        {"params": held, "lr": rates[name], "weight_decay": 0.0 if name == "B_no_decay" else weight_decay}
        for name, held in groups.items()
    ]


def _of_embedding(name: str, modules: dict[str, nn.Module]) -> bool:
    """Check whether a parameter belongs to an embedding's adapter. In PEFT, a dictionary of adapters is in between."""
    if "lora_embedding_" in name:
        return True
    owner = modules.get(".".join(name.split(".")[:-2]))
    return hasattr(owner, "lora_embedding_A") and isinstance(getattr(owner, "base_layer", None), nn.Embedding)
