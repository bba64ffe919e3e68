"""PEFT as the oracle: the same base and the same adapter give the same numbers, judged by the error rule."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.testing.rule import assert_close


def randomised(model: nn.Module, seed: int = 1) -> nn.Module:
    """What can be trained, moved so much that leaving any of it out shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            if parameter.requires_grad:
                parameter += (torch.randn(parameter.shape, generator=generator) * 0.3).to(parameter.dtype)
    return model.eval()


def outputs(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """What the model makes of the arguments, as one tensor."""
    with torch.no_grad():
        found = model(*args, **kwargs)
    return found.logits if hasattr(found, "logits") else found


def assert_same(ours: nn.Module, theirs: nn.Module, base: nn.Module, *args: Any, what: str = "outputs") -> None:
    """ours computes what theirs does, which must differ from base."""
    doubled = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
    truth = outputs(copy.deepcopy(theirs).double(), *doubled)
    plain = outputs(theirs, *args)
    moved = (plain - outputs(base, *args)).abs().max()
    assert moved > 0.05 * plain.abs().max(), "the adapter makes no difference: nothing is tested"
    assert_close(outputs(ours, *args), plain, truth, what=what)
