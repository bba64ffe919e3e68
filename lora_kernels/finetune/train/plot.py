"""Plot the training curve."""

from __future__ import annotations

from pathlib import Path

from lora_kernels.finetune.train.extras import require
from lora_kernels.finetune.train.options import History


def plot_history(history: History, path: Path, metric: str = "accuracy") -> None:
    """Write a PNG: loss per step (thin) and its mean over 20 steps, validation loss and ``metric`` per epoch."""
    figure_module = require("matplotlib.figure")  # no pyplot: no window system, no global state
    figure = figure_module.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = [record["step"] for record in history.steps]
    losses = [record["loss"] for record in history.steps]
    means = [sum(losses[max(0, i - 19) : i + 1]) / min(i + 1, 20) for i in range(len(losses))]
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
    axes.plot(steps, means, color="tab:blue", label="training loss (mean of 20 steps)")
    axes.set(xlabel="optimizer step", ylabel="loss")
    ends = [max(record["step"] for record in history.steps if record["epoch"] == e["epoch"]) for e in history.epochs]
    validation = [record.get("val_loss") for record in history.epochs]
    figures = [record.get(f"val_{metric}") for record in history.epochs]
    if all(value is not None for value in validation):
        axes.plot(ends, validation, "o--", color="tab:orange", label="validation loss")
    if all(value is not None for value in figures):
        right = axes.twinx()
        right.plot(ends, figures, "s-", color="tab:green", label=f"validation {metric}")
        right.set(ylabel=metric, ylim=(0, 1))
        right.legend(loc="lower right")
    axes.legend(loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
