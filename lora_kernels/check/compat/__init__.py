"""What of PEFT works on which family of models once lora_kernels.accelerate was called: found out by running it."""
