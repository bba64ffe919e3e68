"""Launches every Triton and Gluon kernel of the package; no other code launches one."""

from __future__ import annotations

from typing import Any

import torch
from triton import knobs


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, /, *args: Any, cooperative: bool = False, **options: Any
) -> None:
    """Launch ``kernel`` on ``device``, where its tensors are; ``options`` are keyword arguments and Triton's options.

    Triton launches on the current CUDA device and its stream, so ``device`` is made current for the launch. CPU
    tensors (interpreter, emulator, dry GPU) cause no CUDA call.

    Args:
        cooperative: all programs are resident at once, or the launch fails. Triton's interpreter has no such option.
    """
    if cooperative and not knobs.runtime.interpret:
        options["launch_cooperative_grid"] = True
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*args, **options)
    else:
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
