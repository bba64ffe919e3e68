"""A module with the paths of a Stable Diffusion UNet, one with those of its text encoder, and files as tools write."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        mix = torch.softmax(self.to_q(x) @ self.to_k(x).mT / 8, -1)
        return self.to_out[1](self.to_out[0](mix @ self.to_v(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.proj_in = Attention(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn1(self.proj_in(x))


class UNet(nn.Module):
    """x (n, T, 8) to (n, T, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv1d(8, 8, 1)
        self.down_blocks = nn.ModuleList([Block(), Block()])
        self.mid_block = Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x.mT).mT
        for block in self.down_blocks:
            x = block(x)
        return self.mid_block(x)


class TextAttention(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out_proj(torch.softmax(self.q_proj(x) @ self.k_proj(x).mT / 8, -1) @ self.v_proj(x))


class TextLayer(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.self_attn = TextAttention(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.self_attn(x)


class TextEncoder(nn.Module):
    """x (n, T, size) to the same."""

    def __init__(self, size: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.text_model = nn.Module()
        self.text_model.layers = nn.ModuleList([TextLayer(size) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.text_model.layers:
            x = layer(x)
        return x


class Pipeline(nn.Module):
    """Both, as attributes."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.unet(self.text_encoder(x))


def made(kind: Any, *args: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(*args).eval()


def pipeline() -> nn.Module:
    return Pipeline(made(UNet), made(TextEncoder)).eval()


UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in"]
TEXT_TARGETS = ["q_proj", "out_proj"]


def trained(model: nn.Module, targets: list[str], **config: Any) -> peft.PeftModel:
    """An adapter of PEFT's on the model, random."""
    settings = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, "target_modules": targets} | config
    torch.manual_seed(5)
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()


def parts(model: peft.PeftModel) -> dict[str, dict[str, Tensor]]:
    """{path: {"A", "B", "alpha"}} of every adapted module."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in peft.get_peft_model_state_dict(model).items():
        path, _, kind = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        found.setdefault(path, {})[kind] = tensor.detach().clone()
    for path, one in found.items():
        module = model.base_model.model.get_submodule(path)
        one["alpha"] = torch.tensor(module.scaling["default"] * module.r["default"])
    return found


def kohya(prefix: str, found: dict[str, dict[str, Tensor]], alpha: bool = True) -> dict[str, Tensor]:
    names = {"A": ".lora_down.weight", "B": ".lora_up.weight", "alpha": ".alpha"}
    return {
        f"{prefix}{path.replace('.', '_')}{names[kind]}": tensor
        for path, one in found.items()
        for kind, tensor in one.items()
        if kind != "alpha" or alpha
    }


def diffusers(prefix: str, found: dict[str, dict[str, Tensor]], style: str = "peft") -> dict[str, Tensor]:
    """style: "peft", "lora" (to_q.lora.down), "linear" (q_proj.lora_linear_layer.down) or "processor"."""
    down, up = {
        "peft": (".lora_A.weight", ".lora_B.weight"),
        "lora": (".lora.down.weight", ".lora.up.weight"),
        "linear": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        "processor": ("_lora.down.weight", "_lora.up.weight"),
    }[style]
    result = {}
    for path, one in found.items():
        owner, name = path, ""
        if style == "processor":
            owner, _, name = path.removesuffix(".0").rpartition(".")
            name = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}.get(name, name)
            name = f".{name}" if prefix.startswith("text") else f".processor.{name}"
        result[f"{prefix}{owner}{name}{down}"], result[f"{prefix}{owner}{name}{up}"] = one["A"], one["B"]
    return result
