"""DoRALinear: a replacement of nn.Linear with a frozen weight, a trained low-rank update and a trained magnitude."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_kernels.autograd.dora_linear import NormCache, dora_linear, weight_norm
from lora_kernels.errors import MergeError
from lora_kernels.layers.init import Init
from lora_kernels.layers.linear import LoRALinear


class DoRALinear(LoRALinear):
    """y = g * (x W^T + scaling * x A^T B^T) + bias with g = lora_magnitude_vector / ||W + scaling * B A||, row by row.

    Under dropout as in dora_linear. A LoRALinear in everything else: arguments, attributes, merging. It starts as
    LoRALinear does, since ``lora_magnitude_vector`` (N,) starts as the norm.

    Source: Liu et al., DoRA, arXiv 2402.09353.
    """

    use_dora: ClassVar[bool] = True
    adapter_parameters: ClassVar[tuple[str, ...]] = (*LoRALinear.adapter_parameters, "lora_magnitude_vector")
    lora_magnitude_vector: nn.Parameter

    def reset_lora_parameters(self, init: Init = True) -> None:
        """Initialise lora_A and lora_B as LoRALinear does, and set the magnitude to the norm of the adapted weight."""
        super().reset_lora_parameters(init)
        norm = self._norm()
        if "lora_magnitude_vector" in self._parameters:
            with torch.no_grad():
                self.lora_magnitude_vector.copy_(norm)
        else:
            self.lora_magnitude_vector = nn.Parameter(norm.to(self.lora_A.dtype))
            self._norms = NormCache()

    def forward(self, x: Tensor) -> Tensor:
        """Compute y (..., N) for x (..., K)."""
        if self._base_weight is not None:
            return nn.functional.linear(x, self.weight, self.bias)
        return dora_linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.lora_magnitude_vector,
            self.bias,
            scaling=self.scaling,
            backend=self.backend,
            dropout_p=self.lora_dropout,
            training=self.training,
            norms=self._norms,
        )

    def merged_weight(self) -> Tensor:
        """g * (W + scaling * B A) in W's dtype, rounded once.

        Raises:
            MergeError: a value that is not finite.
        """
        delta = self.delta_weight()
        g = (self.lora_magnitude_vector.detach() / self._norm()).to(delta.dtype)
        merged = (delta.add_(self.weight.detach()).mul_(g[:, None])).to(self.weight.dtype)
        if not torch.isfinite(merged).all():
            raise MergeError("the merged weight holds NaN or infinity; W was left as it is. Check the adapter")
        return merged

    def _norm(self) -> Tensor:
        return weight_norm(self.weight, self.lora_A, self.lora_B, self.scaling)
