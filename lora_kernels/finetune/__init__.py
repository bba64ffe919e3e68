"""Fine-tuning: the LoRA wrapper, the Trainer, and tasks with model, data and metrics."""

from lora_kernels.finetune.train.lora import LoRA
from lora_kernels.finetune.train.options import History, TrainOptions
from lora_kernels.finetune.train.trainer import Trainer

__all__ = ["History", "LoRA", "TrainOptions", "Trainer"]
