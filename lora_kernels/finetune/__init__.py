"""Fine-tuning: the LoRA wrapper, the Trainer, and tasks that bring model, data and metrics together."""

from lora_kernels.finetune.lora import LoRA
from lora_kernels.finetune.options import History, TrainOptions
from lora_kernels.finetune.trainer import Trainer

__all__ = ["History", "LoRA", "TrainOptions", "Trainer"]
