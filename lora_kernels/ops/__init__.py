"""The operators that torch.compile and torch.export use."""

from lora_kernels.ops.lora_linear import lora_linear_bwd, lora_linear_fwd
from lora_kernels.ops.multi_lora_linear import multi_lora_linear_bwd, multi_lora_linear_fwd

__all__ = ["lora_linear_bwd", "lora_linear_fwd", "multi_lora_linear_bwd", "multi_lora_linear_fwd"]
