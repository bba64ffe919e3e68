"""nn.Module drop-ins."""

from lora_kernels.layers.linear import LoRALinear

__all__ = ["LoRALinear"]
