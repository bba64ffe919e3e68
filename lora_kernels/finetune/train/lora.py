"""LoRA: wraps a model with adapters; lists, counts and replaces its trainable parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lora_kernels.config import LoRAConfig
from lora_kernels.errors import ShapeError
from lora_kernels.models.inject import apply_lora

_INNER = "wrapped."


class LoRA(nn.Module):
    """Inject adapters into ``model`` as ``config`` says, freeze everything else, and wrap it.

    Calls and unknown attributes are forwarded to the model. ``state_dict``, ``load_state_dict``, ``named_modules`` and
    ``named_parameters`` use the model's own names, so the wrapped and the bare model have the same files, and
    save_adapter, load_adapter, merge_lora and explain accept both.
    ``wrapper.wrapped`` is the model. It is changed in place.
    """

    def __init__(self, model: nn.Module, config: LoRAConfig | None = None) -> None:
        super().__init__()
        self.wrapped = apply_lora(model, config or LoRAConfig())
        self.register_state_dict_post_hook(_strip_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped(*args, **kwargs)

    def get_params(self) -> list[nn.Parameter]:
        """List the trainable parameters, in the model's order, for an optimizer."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def get_num_params(self, total: bool = False) -> int:
        """Count the trainable values; with ``total``, all values including frozen ones."""
        return sum(parameter.numel() for parameter in (self.parameters() if total else self.get_params()))

    @torch.no_grad()
    def adjust_parameters(self, new_params: torch.Tensor | Sequence[torch.Tensor], idx: int | Sequence[int]) -> None:
        """Replace the values of the ``idx``-th trainable parameter (order of ``get_params``), or of several.

        new_params: a tensor for one index, or one tensor per index; with the shape and dtype of each parameter, finite
        values, on any device. The Parameter objects are kept, so optimizers stay valid. Raises IndexError or ShapeError
        before anything is changed.
        """
        values = [new_params] if isinstance(new_params, torch.Tensor) else list(new_params)
        indices = [idx] if isinstance(idx, int) else list(idx)
        parameters = self.get_params()
        if len(values) != len(indices):
            raise ShapeError(f"{len(values)} tensors for {len(indices)} indices; give as many of one as of the other")
        for value, index in zip(values, indices, strict=True):
            if not -len(parameters) <= index < len(parameters):
                raise IndexError(f"index {index}: there are {len(parameters)} trainable parameters, from 0")
            target = parameters[index]
            if value.shape != target.shape or value.dtype != target.dtype:
                raise ShapeError(
                    f"parameter {index} is {tuple(target.shape)} {target.dtype}, "
                    f"the new values are {tuple(value.shape)} {value.dtype}; reshape or convert them with .to(dtype)"
                )
            if not torch.isfinite(value).all():
                raise ShapeError(f"the new values of parameter {index} hold NaN or infinity; nothing was changed")
        for value, index in zip(values, indices, strict=True):
            parameters[index].copy_(value)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """List the model's modules by its own names; ``named_parameters`` and other methods use this one."""
        return self.wrapped.named_modules(memo, prefix, remove_duplicate)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "wrapped":  # not set yet: forwarding it would recurse forever
                raise
            return getattr(self.wrapped, name)


def _strip_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    inner = prefix + _INNER
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key[len(inner) :]] = state.pop(key)


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[prefix + _INNER + key[len(prefix) :]] = state.pop(key)
