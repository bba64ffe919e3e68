"""A clock for tests of code that measures time: it moves when a test moves it, however busy the machine is."""

from __future__ import annotations

import time

import pytest


class Stopwatch:
    """Replaces time.perf_counter; ``now`` is its reading in seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
