"""What the operators call; importing it imports Triton."""

from lora_kernels.kernels.lora_linear import lora_linear_fwd
from lora_kernels.kernels.lora_linear_bwd import lora_linear_bwd

__all__ = ["lora_linear_bwd", "lora_linear_fwd"]
