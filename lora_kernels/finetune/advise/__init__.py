"""The recipe of a fine-tuning, and what `lora-kernels advise` prints of a model."""
