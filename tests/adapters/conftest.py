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
from lora_kernels.models.explain import injection_of
from lora_kernels.models.inject import apply_lora
from lora_kernels.pool import AdapterPool
from lora_kernels.testing import Pool

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


class Adapter:
    """An adapter of a Served model as PEFT would write it, with a term as large as the base's."""

    def __init__(
        self, seed: int, r: int, targets: tuple[str, ...] = ("q", "v"), blocks: tuple[int, ...] = (0, 1)
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.config = LoRAConfig(
            r=r,
            lora_alpha=(seed % 5 + 1) * r / 2,
            target_modules=[f"blocks.{block}.{name}" for block in blocks for name in targets],
        )
        self.scaling = self.config.scaling()
        self.tensors = {}
        for path in self.config.target_modules or ():
            N, K = {"q": (6, 8), "v": (8, 6)}[path[-1]]
            self.tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(r, K, generator=generator) / K**0.5
            B = torch.randn(N, r, generator=generator) / (self.scaling * r**0.5)
            self.tensors[f"base_model.model.{path}.lora_B.weight"] = B


class Served(nn.Module):
    """Two blocks for pools: x (n, T, 8) to (n, T, 8)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    @staticmethod
    def alone(x: Tensor, adapter: Adapter | None, dtype: torch.dtype, stored: torch.dtype | None = None) -> Tensor:
        """x (..., 8) through a model with this adapter only, by plain PyTorch; weights are kept in ``stored``."""
        model, stored = Served().to(stored or dtype).to(dtype), stored or dtype
        for path, layer in model.named_modules():
            key = f"base_model.model.{path}.lora_{{}}.weight"
            if adapter is None or key.format("A") not in adapter.tensors:
                continue
            A, B = (adapter.tensors[key.format(letter)].to(stored).to(dtype) for letter in "AB")

            def add(_: Any, args: Any, y: Tensor, A: Tensor = A, B: Tensor = B, s: float = adapter.scaling) -> Tensor:
                return y + s * (args[0] @ A.t() @ B.t())

            layer.register_forward_hook(add)
        with torch.no_grad():
            return model(x.to(dtype))

    @classmethod
    def check(cls, y: Tensor, x: Tensor, adapters: list[Adapter | None], pool: Pool | None = None) -> None:
        """The rows of y are by the error rule what the adapter of each alone gives; judged together with what else
        is in ``pool``, when that is closed."""
        plain, truth = (
            torch.stack([cls.alone(row, adapter, dtype, x.dtype) for row, adapter in zip(x, adapters, strict=True)])
            for dtype in (x.dtype, torch.float64)
        )
        judge = pool or Pool()
        judge.assert_close(y, plain, truth, what="rows")
        if pool is None:
            judge.close()

    @staticmethod
    def bits(model: nn.Module) -> dict[str, Any]:
        """Where every buffer and parameter lies and what is in it."""
        tensors = [*model.named_buffers(), *model.named_parameters()]
        return {name: (t.data_ptr(), t.detach().reshape(-1).view(torch.uint8).tolist()) for name, t in tensors}


@pytest.fixture(scope="session")
def served() -> type[Served]:
    return Served


@pytest.fixture(scope="session")
def adapter() -> type[Adapter]:
    return Adapter


@pytest.fixture
def model() -> nn.Module:
    return Served().eval()


@pytest.fixture
def pool(model: nn.Module) -> AdapterPool:
    return AdapterPool(model, capacity=3, max_rank_total=12)


@pytest.fixture(scope="session")
def toy() -> type[Toy]:
    return Toy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(Toy.trained(), tmp_path)
    return tmp_path
