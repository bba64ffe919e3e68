"""A small model whose adapter holds every kind of tensor, and the means to look at it and to spoil its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_kernels.adapters import save_adapter
from lora_kernels.adapters.files import CONFIG_NAME, WEIGHTS_NAME
from lora_kernels.config import LoRAConfig
from lora_kernels.inject import apply_lora
from lora_kernels.report import injection_of

CONFIG = LoRAConfig(r=2, lora_alpha=6, target_modules=["q", "v"], modules_to_save=["head"], bias="lora_only")
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(8, 6), nn.Linear(6, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.v(torch.tanh(self.q(x)))


class Toy:
    config, x = CONFIG, X

    @staticmethod
    def fresh(dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        head = nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3))
        model = nn.Sequential()
        model.add_module("blocks", nn.Sequential(Block(), Block()))
        model.add_module("head", head)
        return model.to(dtype).eval()

    @staticmethod
    def trained(dtype: torch.dtype = torch.float32, config: LoRAConfig = CONFIG) -> nn.Module:
        model = apply_lora(Toy.fresh(dtype), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn(parameter.shape).to(parameter.dtype)
            model.get_buffer("head.1.num_batches_tracked").fill_(7)
        return model

    @staticmethod
    def state_of(model: nn.Module) -> dict[str, Any]:
        """Everything a refusal must leave alone."""
        return {
            "modules": [(path, id(m), m.training, sorted(vars(m))) for path, m in model.named_modules()],
            "tensors": [
                (name, id(t), t.data_ptr(), t.requires_grad, t.detach().clone().reshape(-1).view(torch.uint8).tolist())
                for name, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
            ],
            "injection": injection_of(model),
        }

    @staticmethod
    def rewrite(folder: Path, tensors: dict[str, Tensor], config: Any, inside: bool = True) -> None:
        text = config if isinstance(config, str) else json.dumps(config)
        metadata = {"format": "pt"} | ({"adapter_config": text} if inside else {})
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS_NAME, metadata=metadata
        )
        (folder / CONFIG_NAME).write_text(text)

    @staticmethod
    def contents(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return load_file(folder / WEIGHTS_NAME), json.loads((folder / CONFIG_NAME).read_text())


@pytest.fixture(scope="session")
def toy() -> type[Toy]:
    return Toy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(Toy.trained(), tmp_path)
    return tmp_path
