import torch

from benchmarks.checks import step
from benchmarks.counting import operators, saved_mib
from benchmarks.rivals import FROZEN, PEFT, Implementation, ours
from benchmarks.timing import MIB
from lora_kernels.testing import make_problem

M, K = 256, 64
PROBLEM = make_problem(M, 32, K, 4, torch.float32, bias=False)


def _saved(implementation: Implementation) -> float:
    layer = implementation.build(PROBLEM, None)
    given = (PROBLEM.W, *layer.params)
    return saved_mib(lambda: step(layer, PROBLEM.X, PROBLEM.dY, backward=True), given) * MIB


def test_a_frozen_layer_keeps_nothing_and_ours_x_and_xa() -> None:
    assert _saved(FROZEN) == 0
    assert _saved(ours("reference")) == 4 * (M * K + M * 4)


def test_pefts_layer_keeps_no_less() -> None:
    assert _saved(PEFT) >= _saved(ours("reference"))


def test_memory_saved_twice_counts_once() -> None:
    x = torch.ones(MIB // 4, requires_grad=True)
    assert saved_mib(lambda: (x * x).sum().backward(), ()) == 1.0
    assert saved_mib(lambda: (x * x).sum().backward(), (x,)) == 0.0


def test_operators_of_forward_and_backward_are_counted() -> None:
    x = torch.ones(4, requires_grad=True)
    assert operators(lambda: torch.ones(4).add_(1)) == 2
    assert operators(lambda: torch.autograd.grad(x.exp().sum(), x)) >= 4


def test_ours_dispatches_fewer_than_peft() -> None:
    counts = []
    for implementation in (ours("reference"), PEFT):
        layer = implementation.build(PROBLEM, None)
        counts.append(operators(lambda layer=layer: step(layer, PROBLEM.X, PROBLEM.dY, backward=True)))  # type: ignore[misc]
    assert counts[0] < counts[1]
