"""Programs that watch a worker from outside: compute-sanitizer and Nsight Compute."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import checks
from benchmarks.cases import SANITIZED
from benchmarks.rows import Check

CUDA_BIN = "/usr/local/cuda/bin"
SANITIZED_PHASE, PROFILED_PHASE = "sanitized", "profiled"  # what a worker runs under the tool
SERVING_PHASE = "serving_sanitized"
LAUNCHES = 12  # profiled


def _found(tool: str) -> str | None:
    return shutil.which(tool) or shutil.which(tool, path=CUDA_BIN)


def _worker(phase: str, folder: str, rehearse: bool) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.worker", "--phase", phase, "--out", folder]
    return [*command, "--rehearse"] if rehearse else command


def sanitize(kind: str, rehearse: bool, phase: str = SANITIZED_PHASE) -> Check:
    """compute-sanitizer's ``kind`` ("memcheck", "racecheck") over small shapes: those of ``phase``.

    Without PyTorch's caching allocator, so that every overrun leaves a block.
    """
    case, name, tool = SANITIZED[0], f"compute-sanitizer {kind}", _found("compute-sanitizer")
    if rehearse and kind != "memcheck":
        return checks.not_run(case, name, "rehearsed as memcheck", check=kind)
    if tool is None and not rehearse:
        return checks.not_run(case, name, "compute-sanitizer is not on this machine", check=kind)
    with tempfile.TemporaryDirectory() as folder:
        watched = [] if rehearse else [str(tool), "--tool", kind, "--error-exitcode", "9"]
        done = subprocess.run(
            [*watched, *_worker(phase, folder, rehearse)],
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True,
        )  # fmt: skip
    if rehearse and done.returncode == 0:
        return checks.not_run(case, name, "rehearsed without the sanitizer", check=kind)
    said = " | ".join((done.stdout + done.stderr).splitlines()[-6:])
    return checks.judged(case, name, done.returncode == 0, f"exit status {done.returncode}: {said}", check=kind)


def profile(out: Path, rehearse: bool) -> Check:
    """Nsight Compute's basic set of our first kernels, as OUT/profile.csv. Counters that are locked are no failure."""
    case, name, tool = SANITIZED[0], "ncu", _found("ncu")
    if tool is None:
        return checks.not_run(case, name, "ncu is not on this machine", check="profile")
    with tempfile.TemporaryDirectory() as folder:
        table = out / "profile.csv"
        watched = [tool, "--set", "basic", "--csv", "--log-file", str(table), "--launch-count", str(LAUNCHES)]
        watched += ["--kernel-name", "regex:_kernel$"]
        done = subprocess.run([*watched, *_worker(PROFILED_PHASE, folder, rehearse)], capture_output=True, text=True)
    said = table.read_text() if table.exists() else ""
    if done.returncode != 0 or "ERR_NVGPUCTRPERM" in said:
        why = next((line for line in (said + done.stdout + done.stderr).splitlines() if "ERROR" in line), "")
        table.unlink(missing_ok=True)
        return checks.not_run(case, name, f"exit status {done.returncode}: {why[:200]}", check="profile")
    return checks.judged(case, name, "_kernel" in said, "no kernel in its table", check="profile")
