"""Save and restore all random states of a training run, so that a resumed run draws the same numbers."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


def seed_all(seed: int) -> None:
    """Seed the generators of Python, NumPy (if imported) and torch, on all devices."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Return the states of the global generators as numbers and tensors; NumPy's only if it is imported."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        name, keys, position, has_gauss, gauss = sys.modules["numpy"].random.get_state()
        state["numpy"] = (name, keys.tolist(), int(position), int(has_gauss), float(gauss))
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the states that ``rng_state`` returned."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(state["numpy"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _generators(dataloader: Any) -> list[torch.Generator]:
    """List the generators of a DataLoader and its samplers, each once, in a stable order."""
    batch_sampler = getattr(dataloader, "batch_sampler", None)
    places = (dataloader, getattr(dataloader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(place, "generator", None) for place in places]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def loader_state(dataloader: Any) -> dict[str, Any]:
    """Return ``rng_state`` and the states of the loader's own generators. They decide its next batches."""
    return {**rng_state(), "loader": [generator.get_state() for generator in _generators(dataloader)]}


def set_loader_state(dataloader: Any, state: dict[str, Any]) -> None:
    """Restore the states that ``loader_state`` returned."""
    set_rng_state(state)
    for generator, value in zip(_generators(dataloader), state["loader"], strict=True):
        generator.set_state(value)
