"""Storage formats of a frozen weight. A format is one object in this folder and one tile decoder in the kernels."""

from lora_kernels.formats.base import WeightFormat, format_of, register
from lora_kernels.formats.dense import Dense

DENSE = register(Dense())

__all__ = ["DENSE", "Dense", "WeightFormat", "format_of", "register"]
