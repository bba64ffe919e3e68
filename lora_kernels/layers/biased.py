"""BiasedLoRALinear: a replacement of nn.Linear with a frozen weight and a trained low-rank update that has a bias."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_kernels.autograd.lora_linear import lora_linear_unchecked
from lora_kernels.layers.init import Init
from lora_kernels.layers.linear import LoRALinear


class BiasedLoRALinear(LoRALinear):
    """y = x W^T + bias + scaling * (dropout(x) A^T B^T + lora_bias): PEFT's lora_bias.

    ``lora_bias`` (N,) is trained with lora_A and lora_B and has their dtype. Everything else is as in LoRALinear.
    """

    adapter_parameters: ClassVar[tuple[str, ...]] = (*LoRALinear.adapter_parameters, "lora_bias")
    lora_bias: nn.Parameter

    def reset_lora_parameters(self, init: Init = True) -> None:
        """Initialise lora_A and lora_B as LoRALinear does; lora_bias becomes zero, or with another init uniform in
        +-1/sqrt(r), as nn.Linear(r, N) initialises its bias."""
        super().reset_lora_parameters(init)
        if "lora_bias" not in self._parameters:
            self.lora_bias = nn.Parameter(torch.empty_like(self.lora_B[:, 0]))
        bound = 0.0 if init is True else self.r**-0.5
        nn.init.uniform_(self.lora_bias, -bound, bound)

    def total_bias(self) -> Tensor:
        """bias + scaling * lora_bias in W's dtype, rounded once; gradients flow to both."""
        own = self.scaling * self.lora_bias
        return (own if self.bias is None else self.bias.to(own.dtype) + own).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Compute y (..., N) for x (..., K)."""
        if self._base_weight is not None:
            return nn.functional.linear(x, self.weight, self.total_bias())
        p = self.lora_dropout if self.training else 0.0
        keep_bits = self.dropout_mask == "bits"
        bias = self.total_bias()
        return lora_linear_unchecked(
            x, self.weight, self.lora_A, self.lora_B, bias, self.scaling, p, None, self.backend, keep_bits
        )
