"""PEFT's layers with fused forwards: they stay PEFT layers."""

from lora_kernels.integrations.peft.accelerate import accelerate, decelerate

__all__ = ["accelerate", "decelerate"]
