"""Fine-tuning tasks by name."""

from lora_kernels.finetune.tasks.base import Task
from lora_kernels.finetune.tasks.causal_lm import CausalLM
from lora_kernels.finetune.tasks.classification import Classification
from lora_kernels.finetune.tasks.translation import Translation

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Translation, CausalLM)}

__all__ = ["TASKS", "CausalLM", "Classification", "Task", "Translation"]
