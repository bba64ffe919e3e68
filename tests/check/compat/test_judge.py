import math

import pytest
import torch

from lora_kernels.check.compat.judge import Unlike, errors, fault

F32, BF16 = torch.float32, torch.bfloat16


def answers(noise: float, seed: int = 0) -> dict[str, torch.Tensor]:
    """A large, a small and a vanishing result of one kind, each with an error of its own size."""
    generator = torch.Generator().manual_seed(7)
    sizes = {"gradient:large": 100.0, "gradient:small": 1e-3, "gradient:nothing": 1e-12, "output:loss": 2.0}
    exact = {name: size * torch.randn(300, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    generator.manual_seed(seed)
    return {n: t + noise * max(sizes[n], 1e-9) * torch.randn(300, generator=generator) for n, t in exact.items()}


def test_the_same_errors_keep_the_rule_and_larger_ones_do_not():
    truth, plain = answers(0.0), {n: t.float() for n, t in answers(1e-6, 1).items()}
    assert fault([errors({n: t.float() for n, t in answers(1e-6, 2).items()}, plain, truth, F32)], F32) is None
    worse = errors({n: t.float() for n, t in answers(1e-5, 2).items()}, plain, truth, F32)
    assert "gradient: error is" in (fault([worse], F32) or "")


@pytest.mark.parametrize("name", ["gradient:large", "gradient:small", "output:loss"])
def test_a_term_lost_in_one_tensor_of_many_is_seen(name):
    truth, plain = answers(0.0), {n: t.float() for n, t in answers(1e-6, 1).items()}
    got = {n: t.clone() for n, t in plain.items()}
    got[name] = 1.0001 * got[name]
    assert fault([errors(got, plain, truth, F32)], F32) is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gradient:large": torch.zeros(3)}, r"\(3,\), PEFT's torch.float32 \(300,\)"),
        ({"gradient:large": torch.zeros(300, dtype=BF16)}, "torch.bfloat16"),
        ({"more": torch.zeros(1)}, "with more"),
        ({"tokens": torch.tensor([2])}, "tokens differs"),
    ],
)
def test_answers_of_another_kind_are_not_compared(change, said):
    plain = {n: t.float() for n, t in answers(1e-6, 1).items()} | {"tokens": torch.tensor([1])}
    with pytest.raises(Unlike, match=said):
        errors(plain | change, plain, {n: t.double() for n, t in plain.items()}, F32)


def test_nan_is_a_fault():
    plain = {n: t.float() for n, t in answers(1e-6, 1).items()}
    got = plain | {"output:loss": torch.full((300,), math.nan)}
    assert fault([errors(got, plain, answers(0.0), F32)], F32) is not None


def test_draws_are_averaged_over_their_middle_half():
    draws = [{"output": (1.0, ratio)} for ratio in (0.1, 0.9, 1.0, 1.1, 1.2, 1.2, 1.3, 9.0)]
    assert fault(draws, BF16) is None
    assert "1.4x PEFT's by root mean square" in (fault([{"output": (1.0, 1.4)}] * 8, BF16) or "")
    assert fault([{"output": (math.inf, math.inf)}] * 4, BF16) is not None
