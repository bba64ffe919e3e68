"""Adapters with random damage in header, configuration or place are loaded or refused; refused, they change nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lora_kernels.adapters import load_adapter, save_adapter
from lora_kernels.adapters.files import CONFIG_NAME, WEIGHTS_NAME
from lora_kernels.config import UNSUPPORTED_FIELDS, LoRAConfig
from lora_kernels.errors import AdapterFormatError, ConfigError, UnservableAdapterError
from lora_kernels.models.inject import apply_lora
from lora_kernels.pool import AdapterPool

FIELDS = [*LoRAConfig(target_modules=["q"]).to_peft_dict(), *UNSUPPORTED_FIELDS, "field_of_a_later_release"]
VALUES: list[Any] = [
    None, True, False, 0, -1, 2, 3, 10**400, 1e308, float("nan"), "", "x", "\ud800", "\0", "a" * 100_000, [], {}, [[]],
    [None], ["q"], [""], ["\ud800"], {"q": 1}, {"q": "1"}, {"": 1}, {"(a+)+$": 1}, "(.*.*)*x", ["(.*)*x"], [1, 2, 3],
    list(range(100_000)), {str(i): 1 for i in range(20_000)}, ["(a|a)*x"] * 500, "\\", "[", "(?P<idx>x)", "(?i)q",
    "all-linear", "LORA", "ADALORA", 2**31, 2**63, 0.5, "pissa", "eva", "CAUSAL_LM", "SEQ_CLS", "../../etc/passwd",
]  # fmt: skip
CLAIMS: list[Any] = [
    "F16", "F64", "I64", "F8_E4M3", "F4", "", None, [], [0], [2, 8], [0, 8], [8, 2], [16], [1] * 9, [2**62, 4],
    [-1, -16], [0, 64], [64, 0], [2.0, 8], [True, 8], ["2", 8], {}, [0, 2**60],
]  # fmt: skip
KEYS = ["x", "", "\ud800", "a" * 5000, "base_model.model.blocks.0.q.lora_A.default.weight", "__metadata__"]


def damage_config(rng: random.Random, folder: Path) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    for _ in range(rng.randrange(1, 3)):
        if rng.random() < 0.1:
            config.pop(rng.choice(sorted(config)))
        else:
            config[rng.choice(FIELDS)] = rng.choice(VALUES)
    (folder / CONFIG_NAME).write_text(json.dumps(config))


def damage_header(rng: random.Random, folder: Path) -> None:
    data = (folder / WEIGHTS_NAME).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    key, kind = rng.choice(sorted(header)), rng.random()
    if key == "__metadata__":
        header[key] = rng.choice([None, [], {}, "x", {"adapter_config": "{", "adapter_config_replaced": "0" * 64}])
    elif kind < 0.5:
        header[key][rng.choice(["dtype", "shape", "data_offsets"])] = rng.choice(CLAIMS)
    elif kind < 0.8:
        header[rng.choice(KEYS)] = header.pop(key)
    elif kind < 0.9:
        header["twin"] = header[key]
    else:
        header.pop(key)
    text = json.dumps(header).encode()
    (folder / WEIGHTS_NAME).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def damage_bytes(rng: random.Random, folder: Path) -> None:
    path = folder / rng.choice([CONFIG_NAME, WEIGHTS_NAME])
    data = bytearray(path.read_bytes())
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(min(len(data), rng.choice([16, 2000, len(data)])))
        if rng.random() < 0.6:
            data[at] ^= 1 << rng.randrange(8)
        else:
            data[at : at + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
    path.write_bytes(data)


def damage_place(rng: random.Random, folder: Path) -> None:
    path = folder / rng.choice([CONFIG_NAME, WEIGHTS_NAME])
    if rng.random() < 0.3:
        os.truncate(path, rng.choice([0, 7, 8, 9, 100, 10**11, 2**33, 50 << 20]))
        return
    path.unlink()
    kind = rng.randrange(5)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(rng.choice(["/dev/zero", "/etc/passwd", str(path)]))
    elif kind == 3:
        (folder / "adapter_model.bin").write_bytes(b"\x80\x04")


DAMAGES = [damage_config, damage_header, damage_bytes, damage_place]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("into", ["fresh", "adapted", "pool"])
def test_random_damage(
    tmp_path: Path, toy: Any, served: Any, into: str, damage: Callable[[random.Random, Path], None]
) -> None:
    rng, refused = random.Random(f"{into} {damage.__name__}"), 0
    model: nn.Module
    if into == "pool":
        config = LoRAConfig(r=2, lora_alpha=6, target_modules=["q", "v"])
        save_adapter(apply_lora(served(), config), tmp_path / "good")
        model = served().eval()
        pool = AdapterPool(model, capacity=2, max_rank_total=16)
    else:
        save_adapter(toy.trained(), tmp_path / "good")
        model = toy.fresh() if into == "fresh" else toy.trained()
    for i in range(25):
        folder = tmp_path / str(i)
        shutil.copytree(tmp_path / "good", folder)
        damage(rng, folder)
        before = toy.state_of(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            message = None
            try:
                _ = pool.load("a", folder) if into == "pool" else load_adapter(model, folder)
            except (AdapterFormatError, ConfigError, UnservableAdapterError) as error:
                message = str(error)
        if message is not None:
            refused += 1
            assert len(message) < 1200, message
            assert toy.state_of(model) == before, message
        elif into == "pool":
            pool.evict("a")
        else:
            model = toy.fresh() if into == "fresh" else toy.trained()
    assert refused > 8, "hardly any damage was refused: nothing was tested"
