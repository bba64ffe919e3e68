"""Runs PEFT's features on families of models after lora_kernels.accelerate, for the compatibility table."""
