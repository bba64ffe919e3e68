"""The fine-tuning recipe, and the costs that `lora-kernels advise` prints."""
