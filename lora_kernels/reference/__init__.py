"""The oracle: plain PyTorch, any dtype, explicit backward, no autograd."""

from lora_kernels.reference.dropout import generator_keep_mask, pack_keep, packed_width, philox_keep_mask, unpack_keep
from lora_kernels.reference.lora_linear import GradMask, lora_linear_bwd, lora_linear_fwd
from lora_kernels.reference.multi_infer import multi_lora_linear_infer
from lora_kernels.reference.multi_lora_linear import multi_lora_linear_bwd, multi_lora_linear_fwd

__all__ = [
    "GradMask",
    "generator_keep_mask",
    "lora_linear_bwd",
    "lora_linear_fwd",
    "multi_lora_linear_bwd",
    "multi_lora_linear_fwd",
    "multi_lora_linear_infer",
    "pack_keep",
    "packed_width",
    "philox_keep_mask",
    "unpack_keep",
]
