"""The tasks that can be fine-tuned, by name."""

from lora_kernels.finetune.tasks.base import Task
from lora_kernels.finetune.tasks.classification import Classification

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification,)}

__all__ = ["TASKS", "Classification", "Task"]
