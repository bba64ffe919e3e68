"""Switches off PyTorch's inference path of nn.TransformerEncoderLayer around adapted layers.

The path is one operator that reads the weights of linear1, linear2 and self_attn and does not call these modules, so
adapters on them would have an effect in training only.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

KEPT = "_lora_fast_path"  # in the __dict__ of a module whose path is off: the old value of the attribute
SWITCHES = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


def switch_off(model: nn.Module, adapted: Callable[[nn.Module], bool]) -> None:
    """Switch the path off in every module of the model that contains an adapted module."""
    for module in model.modules():
        name, off = _switch(module)
        if name and KEPT not in vars(module) and any(map(adapted, module.modules())):
            vars(module)[KEPT] = getattr(module, name, off)
            setattr(module, name, off)


def switch_on(model: nn.Module) -> None:
    """Restore in every module of the model the value that switch_off replaced."""
    for module in model.modules():
        if KEPT in vars(module):
            setattr(module, _switch(module)[0], vars(module).pop(KEPT))


def is_off(module: nn.Module) -> bool | None:
    """Whether the path of an nn.TransformerEncoderLayer is off, by switch_off or otherwise; None for other modules."""
    if not isinstance(module, nn.TransformerEncoderLayer):
        return None
    return KEPT in vars(module) or not module.activation_relu_or_gelu


def _switch(module: nn.Module) -> tuple[str, object]:
    return next(((name, off) for kind, name, off in SWITCHES if isinstance(module, kind)), ("", None))
