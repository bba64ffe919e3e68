"""Counts which calls of a model's LoRA layers ran fused, in the layers' forwards instead of in their reports."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_kernels.integrations.peft import mlp
from lora_kernels.integrations.peft.accelerate import FUSED
from lora_kernels.integrations.peft.linear import CALLS
from lora_kernels.integrations.peft.report import report


@dataclass
class Calls:
    """Count calls of PEFT's LoRA layers: those that began in a fused class, those of them that ended in PEFT's own
    forward, and the reasons, including those of layers that have no fused class."""

    begun: int = 0
    peft: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def fused(self) -> int:
        return self.begun - self.peft

    def note(self, model: nn.Module) -> None:
        """Add the reasons counted in the layers of ``model``, and those of layers without a fused class."""
        classes = tuple(FUSED.values())
        modules = dict(model.named_modules())
        for path, reason in report(model, FUSED).layers.items():
            layer = modules[path]
            self.reasons.update(layer.__dict__.get(CALLS, {}))
            if not isinstance(layer, classes) and reason is not None:
                self.reasons[reason] += 1


@contextlib.contextmanager
def counted() -> Iterator[Calls]:
    """Count, inside the context, the calls of every fused class and those that it passes to PEFT's forward. A gated MLP
    that runs as one call counts as its three layers."""
    calls = Calls()
    fused = tuple(FUSED.values())
    owners = {_owner(own): "peft" for own in FUSED} | {_owner(kind): "begun" for kind in fused}
    originals = {owner: owner.__dict__["forward"] for owner in owners}

    def counting(forward: Callable[..., Any], name: str) -> Callable[..., Any]:
        def count(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if isinstance(self, fused):
                setattr(calls, name, getattr(calls, name) + 1)
            return forward(self, *args, **kwargs)

        return count

    run_whole = mlp.whole

    def whole(*args: Any) -> Any:
        y = run_whole(*args)
        calls.begun += 0 if y is None else 3  # of gate, up and down
        return y

    mlp.whole = whole  # type: ignore[assignment]
    for owner, name in owners.items():
        owner.forward = counting(originals[owner], name)  # type: ignore[attr-defined]
    try:
        yield calls
    finally:
        mlp.whole = run_whole
        for owner, forward in originals.items():
            owner.forward = forward  # type: ignore[attr-defined]


def _owner(kind: type) -> type:
    """Return the class that defines the forward of ``kind``."""
    return next(each for each in kind.__mro__ if "forward" in each.__dict__)
