"""nn.Module drop-ins."""

from lora_kernels.layers.biased import BiasedLoRALinear
from lora_kernels.layers.dora import DoRALinear
from lora_kernels.layers.linear import LoRALinear
from lora_kernels.layers.mlp import LoRAMLP
from lora_kernels.layers.qkv import LoRAGateUp, LoRAQKV

__all__ = ["BiasedLoRALinear", "DoRALinear", "LoRAGateUp", "LoRALinear", "LoRAMLP", "LoRAQKV"]
