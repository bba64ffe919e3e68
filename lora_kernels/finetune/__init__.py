"""Fine-tuning: the LoRA wrapper, the Trainer, and tasks that bring model, data and metrics together."""

from lora_kernels.finetune.train.lora import LoRA
from lora_kernels.finetune.train.options import History, TrainOptions
from lora_kernels.finetune.train.trainer import Trainer

__all__ = ["History", "LoRA", "TrainOptions", "Trainer"]
