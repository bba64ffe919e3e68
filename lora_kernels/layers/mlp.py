"""LoRAMLP: a replacement of a SwiGLU block, with LoRA on gate, up and down."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.autograd.lora_mlp import lora_mlp
from lora_kernels.errors import ConfigError
from lora_kernels.layers.linear import LoRALinear
from lora_kernels.layers.qkv import LoRAContainer, projection_of


class LoRAMLP(LoRAContainer):
    """y = down(silu(gate(x)) * up(x)), as in Llama, Mistral, Qwen and Gemma's siblings with SiLU.

    LoRAMLP.from_linears(gate_proj, up_proj, down_proj, config), or by keyword under the model's names, in this order.
    In place of a LlamaMLP its children keep their names. For backward it keeps x, the outputs of gate
    and up, and two low-rank matrices: not their product.
    """

    DEFAULT_NAMES = ("gate_proj", "up_proj", "down_proj")
    STACKED = 2

    def _check(self, layers: list[LoRALinear]) -> None:
        super()._check(layers)
        gate, up, down = layers
        if not gate.out_features == up.out_features == down.in_features:
            raise ConfigError(
                f"gate gives {gate.out_features} features, up {up.out_features}, down takes {down.in_features}; "
                "expected one width"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Compute y (..., N) for x (..., K)."""
        layers = self.children_in_order()
        gate, up, down = layers
        if not self.together(layers):
            return down(torch.nn.functional.silu(gate(x)) * up(x))
        return lora_mlp(
            x,
            projection_of(gate),
            projection_of(up),
            projection_of(down),
            dropout_p=gate.lora_dropout,
            training=gate.training,
            backend=gate.backend,
            dropout_mask=gate.dropout_mask,
        )
