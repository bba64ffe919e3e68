"""Progress bars, by tqdm."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

from lora_kernels.finetune.train.extras import require


def tqdm_bar(title: str, total: int, unit: str, initial: int = 0) -> Any:
    """Open a tqdm bar that updates 10 times per second on a terminal and every 10 s in a log file."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return require("tqdm").tqdm(desc=title, total=total, initial=initial, unit=unit, mininterval=interval)


class ProgressBar:
    """A bar over an epoch's batches with loss and tokens/s; inactive if not ``shown``. Use as a context manager."""

    def __init__(self, title: str, total: int, initial: int = 0, shown: bool = True) -> None:
        self._bar = tqdm_bar(title, total, "batch", initial) if shown else None
        self._losses: deque[float] = deque(maxlen=20)  # the bar shows the mean over the last steps
        self._tokens = 0
        self._started = time.perf_counter()

    def advance(self, batches: int, loss: float, tokens: int) -> None:
        """Record a step: its number of batches, its loss and its tokens."""
        if self._bar is None:
            return
        self._losses.append(loss)
        self._tokens += tokens
        rate = self._tokens / (time.perf_counter() - self._started)
        mean = sum(self._losses) / len(self._losses)
        self._bar.set_postfix_str(f"loss {mean:.3f}, {rate:,.0f} tokens/s", refresh=False)
        self._bar.update(batches)

    @staticmethod
    def write(line: str) -> None:
        """Print a line above an active bar."""
        require("tqdm").tqdm.write(line)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
