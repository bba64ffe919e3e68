"""Runs a scenario in one of three ways: with PEFT alone, with PEFT in float64, or accelerated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lora_kernels import reference
from lora_kernels.check.compat.calls import Calls
from lora_kernels.check.compat.families import Family, Inputs, fill_adapters
from lora_kernels.check.compat.judge import Answers
from lora_kernels.integrations.peft import accelerate

RANK, ALPHA = 4, 6


class Unavailable(Exception):
    """This family, or PEFT on this family, does not have the feature."""


@dataclass
class Stage:
    """Build the models of a scenario: weights, adapters and batch of one ``seed``.

    exact: everything in float64. accelerated: by lora_kernels.
    """

    family: Family
    seed: int = 0
    exact: bool = False
    accelerated: bool = False
    calls: Calls = field(default_factory=Calls)
    models: list[Any] = field(default_factory=list)

    def config(self, targets: Sequence[str] = (), **options: Any) -> LoraConfig:
        """Return PEFT's configuration. ``targets``: by default every linear layer of the family except the head."""
        options = {"r": RANK, "lora_alpha": ALPHA, "task_type": self.family.task or None} | options
        if "target_parameters" not in options:
            options["target_modules"] = list(targets or self.family.linear)
        return LoraConfig(**options)

    def build(
        self,
        config: LoraConfig | None = None,
        dtype: torch.dtype = torch.float32,
        others: Sequence[LoraConfig] = (),
        fill: bool = True,
        **options: Any,
    ) -> tuple[Any, Inputs]:
        """Return PEFT's model with filled adapters, accelerated if this stage is, and a batch.

        others: configurations of further adapters, "other0" and so on. options: of get_peft_model.
        """
        base, inputs = self.family.build(self.seed)
        model = self.wrap(base.to(dtype), config, others, fill, **options)
        return self.accelerate(model), self.batch(inputs, dtype)

    def wrap(
        self,
        base: Any,
        config: LoraConfig | None = None,
        others: Sequence[LoraConfig] = (),
        fill: bool = True,
        **options: Any,
    ) -> Any:
        """Return ``base`` with PEFT's adapters, which have the same values in every stage."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1)
            model = get_peft_model(base, config or self.config(), **options)
            for number, other in enumerate(others):
                model.add_adapter(f"other{number}", other)
        if fill:
            fill_adapters(model, self.seed)
        return model

    def accelerate(self, model: Any) -> Any:
        """Return the model, accelerated if this stage is; its calls are counted when the scenario ends."""
        self.models.append(model)
        return accelerate(model, verbose=False) if self.accelerated else model

    def batch(self, inputs: Inputs, dtype: torch.dtype = torch.float32) -> Inputs:
        """Return the batch with floating-point tensors in ``dtype``, or in float64 if the stage is exact."""
        kind = torch.float64 if self.exact else dtype
        return {name: t.to(kind) if t.is_floating_point() else t for name, t in inputs.items()}

    def cast(self, model: Any) -> Any:
        """Return the model, converted to float64 if the stage is exact."""
        return model.double() if self.exact else model

    def step(self, model: Any, inputs: Inputs, tag: str = "") -> Answers:
        """Return loss, logits and every gradient of a forward and backward.

        An accelerated model runs two of them and returns the second: the first finds which layers read one input.
        """
        model = self.cast(model)
        for _ in range(1 + self.accelerated):
            model.zero_grad()
            output = model(**inputs)
            output.loss.backward()
        return self.outputs(output, tag) | gradients(model, tag)

    def infer(self, model: Any, inputs: Inputs, tag: str = "") -> Answers:
        """Return loss and logits in evaluation mode, without gradients."""
        model = self.cast(model)
        training = model.training
        with torch.no_grad():
            for _ in range(1 + self.accelerated):
                output = model.eval()(**inputs)
        model.train(training)
        return self.outputs(output, tag)

    def outputs(self, output: Any, tag: str = "") -> Answers:
        """Return loss and logits of a model's output."""
        return {f"output:loss {tag}": output.loss.detach().reshape(1), f"output:logits {tag}": output.logits.detach()}


def gradients(model: nn.Module, tag: str = "") -> Answers:
    """Return a copy of every gradient, by its parameter's name."""
    return {
        f"gradient:{name} {tag}": parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@contextlib.contextmanager
def one_mask_a_shape() -> Iterator[None]:
    """Make the dropout mask of PEFT and of ours a function of p and the input's shape, so that both can be compared.

    A group of layers also draws one mask for all its inputs of one shape.
    """

    def keep(rows: int, columns: int, p: float) -> Tensor:
        return torch.rand(rows, columns, generator=torch.Generator().manual_seed(5)) >= p

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0:
            return x
        kept = keep(x[..., 0].numel(), x.shape[-1], p).view(x.shape)
        return x * kept / (1 - p)

    def ours(seed: Tensor, p: float, M: int, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return keep(M, K, p).to(dtype)

    with mock.patch.object(F, "dropout", dropout), mock.patch.object(reference, "generator_keep_mask", ours):
        yield
