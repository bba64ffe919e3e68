"""How a frozen weight is stored. A format is one object here and one tile decoder in kernels/decode."""

from lora_kernels.formats.base import WeightFormat, format_of, register
from lora_kernels.formats.dense import Dense

DENSE = register(Dense())

__all__ = ["DENSE", "Dense", "WeightFormat", "format_of", "register"]
