"""Modules for several projections of one input: attention's query, key and value; an MLP's gate and up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lora_kernels.autograd.lora_linear_stacked import Projection, lora_linear_stacked
from lora_kernels.config import LoRAConfig
from lora_kernels.errors import ConfigError
from lora_kernels.formats.side_by_side import put_side_by_side
from lora_kernels.layers.linear import LoRALinear


def projection_of(layer: LoRALinear) -> Projection:
    """Return the operands of a layer in the form that the stacked functions take."""
    held = layer._parameters  # a module's attributes take a microsecond each
    return Projection(held["weight"], held["lora_A"], held["lora_B"], held.get("bias"), layer.scaling)  # type: ignore[arg-type]


class LoRAContainer(nn.Module):
    """LoRALinear children with the caller's names, computed together if possible.

    The names of the children are those of the state_dict and of adapter files; merging, apply_lora and save_adapter
    work with them as usual. With ``pack`` the weights of children with the same input are stored in one buffer, and
    each child's weight is a view of its part, so that one GEMM can compute them all. Moving, copying and unpickling
    the module pack the weights again; after load_state_dict(assign=True) call pack().

    Each child runs its own forward, with its own dropout mask as in PEFT, if one child is merged, is not a LoRALinear,
    has hooks, or is in training mode while another is not.

    Args:
        layers: the children by name, in order, of equal lora_dropout.
        pack: store the weights in one buffer.

    Raises:
        ConfigError: a wrong number of layers, sizes that do not fit together, or different lora_dropout.
    """

    DEFAULT_NAMES: ClassVar[tuple[str, ...]]
    STACKED: ClassVar[int]  # the first of the children, which read the module's own input

    def __init__(self, layers: Mapping[str, LoRALinear], pack: bool = True) -> None:
        super().__init__()
        if len(layers) != len(self.DEFAULT_NAMES):
            raise ConfigError(
                f"{type(self).__name__} takes {len(self.DEFAULT_NAMES)} layers ({', '.join(self.DEFAULT_NAMES)}); "
                f"given are {', '.join(layers) or 'none'}"
            )
        self.names = tuple(layers)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.packed = pack
        self._check(self.children_in_order())
        self.pack()

    @classmethod
    def from_linears(
        cls,
        *linears: nn.Linear | LoRALinear | LoRAConfig | None,
        config: LoRAConfig | None = None,
        pack: bool = True,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
        **named: nn.Linear | LoRALinear,
    ) -> Self:
        """Make a module that shares and freezes the Parameters of the linears.

        Linears given by keyword get that name; those given by position get the class's DEFAULT_NAMES. A LoRALinear,
        as apply_lora makes it, is used unchanged. ``config`` may also come last by position.
        """
        given = list(linears)
        if given and (given[-1] is None or isinstance(given[-1], LoRAConfig)):
            last = given.pop()
            config = last if isinstance(last, LoRAConfig) else config
        if given and (named or len(given) != len(cls.DEFAULT_NAMES)):
            raise ConfigError(
                f"{cls.__name__} takes {len(cls.DEFAULT_NAMES)} linears, by position or by keyword; given are "
                f"{len(given)} by position, {len(named)} by keyword"
            )
        sources = dict(zip(cls.DEFAULT_NAMES, given, strict=True)) if given else named
        if not all(isinstance(linear, nn.Linear | LoRALinear) for linear in sources.values()):
            kinds = ", ".join(type(linear).__name__ for linear in sources.values())
            raise ConfigError(f"{cls.__name__} takes nn.Linear and LoRALinear; given are {kinds}")
        layers = {
            name: linear
            if isinstance(linear, LoRALinear)
            else LoRALinear.from_linear(linear, config, adapter_dtype=adapter_dtype, backend=backend)  # type: ignore[arg-type]
            for name, linear in sources.items()
        }
        module = cls(layers, pack)
        module.train(all(layer.training for layer in layers.values()))
        return module

    def children_in_order(self) -> list[LoRALinear]:
        """Return the children in the order of the constructor's arguments."""
        return [self._modules[name] for name in self.names]  # type: ignore[misc]

    def pack(self) -> None:
        """Copy the weights into one buffer, if ``packed`` asks for it and no child is merged."""
        stacked = self.children_in_order()[: self.STACKED]
        if self.packed and all(isinstance(layer, LoRALinear) and not layer.merged for layer in stacked):
            put_side_by_side([layer.weight for layer in stacked])  # type: ignore[misc]

    def _check(self, layers: list[LoRALinear]) -> None:
        if len({layer.lora_dropout for layer in layers}) > 1:
            given = ", ".join(f"{name} {layer.lora_dropout}" for name, layer in zip(self.names, layers, strict=True))
            raise ConfigError(f"lora_dropout differs ({given}); one module draws its masks with one probability")
        stacked = layers[: self.STACKED]
        if len({layer.in_features for layer in stacked}) > 1:
            raise ConfigError(f"in_features differ: {[layer.in_features for layer in stacked]}; they read one input")
        if len({(layer.weight.dtype, layer.weight.device) for layer in layers}) > 1:
            raise ConfigError(f"dtype or device differ: {[(lay.weight.dtype, lay.weight.device) for lay in layers]}")

    def together(self, layers: list[LoRALinear]) -> bool:
        """Whether the children run as one; raises ConfigError where their lora_dropout has been made to differ."""
        first = layers[0]
        for layer in layers:
            if type(layer) is not LoRALinear or layer._base_weight is not None or layer.training != first.training:
                return False
            if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
                return False
            if layer.lora_dropout != first.lora_dropout:
                self._check(layers)
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.pack()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled module, and pack its weights, which are separate tensors by then."""
        super().__setstate__(state)
        self.pack()

    def extra_repr(self) -> str:
        return f"packed={self.packed}"


class _LoRAStack(LoRAContainer):
    """Projections of one input: forward(x) returns their outputs in order."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute all y_p (..., N_p) for x (..., K)."""
        layers = self.children_in_order()
        if not self.together(layers):
            return tuple(layer(x) for layer in layers)
        first = layers[0]
        return lora_linear_stacked(
            x,
            [projection_of(layer) for layer in layers],
            dropout_p=first.lora_dropout,
            training=first.training,
            backend=first.backend,
            dropout_mask=first.dropout_mask,
        )


class LoRAQKV(_LoRAStack):
    """q, k, v = module(x) for attention's three projections of one input; widths, ranks and scalings of their own.

    LoRAQKV.from_linears(q_proj, k_proj, v_proj, config), or from_linears(query=..., key=..., value=..., config=...).
    """

    DEFAULT_NAMES = ("q_proj", "k_proj", "v_proj")
    STACKED = 3


class LoRAGateUp(_LoRAStack):
    """gate, up = module(x) for the two projections that a gated MLP starts with.

    LoRAGateUp.from_linears(gate_proj, up_proj, config), or by keyword under other names.
    """

    DEFAULT_NAMES = ("gate_proj", "up_proj")
    STACKED = 2
