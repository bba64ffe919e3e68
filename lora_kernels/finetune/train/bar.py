"""The progress bar: loss and tokens per second."""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType
from typing import Any

from lora_kernels.finetune.train.extras import require


class ProgressBar:
    """A tqdm bar over the batches of an epoch, or nothing when not ``shown``; use as a context manager."""

    def __init__(self, title: str, total: int, initial: int = 0, shown: bool = True) -> None:
        self._bar: Any = None
        self._losses: deque[float] = deque(maxlen=20)  # what is shown is the mean over the last steps
        self._tokens = 0
        self._started = time.perf_counter()
        if shown:
            interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file gets a line now and then
            tqdm = require("tqdm").tqdm
            self._bar = tqdm(desc=title, total=total, initial=initial, unit="batch", mininterval=interval)

    def advance(self, batches: int, loss: float, tokens: int) -> None:
        """After a step: how many batches it took, its loss, and its tokens."""
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
        """Prints a line without disturbing a bar."""
        require("tqdm").tqdm.write(line)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
