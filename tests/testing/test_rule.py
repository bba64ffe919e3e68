"""The error rule accepts another order of summation and refuses every bug that leaves a trace."""

from dataclasses import replace

import pytest
import torch

from lora_kernels.testing import Pool, Problem, assert_close, make_problem, plain, truth, within_rule

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _forward(problem: Problem, splits: int = 1) -> torch.Tensor:
    """Y as a kernel makes it: float32 sums over parts of K, XA rounded once, Y rounded once."""
    dtype, terms = problem.X.dtype, []
    X, W, A, B = (tensor.float() for tensor in (problem.X, problem.W, problem.A, problem.B))
    parts = [slice(None, None, splits)] if splits == 1 else [slice(i, None, splits) for i in range(splits)]
    XA = sum(X[:, part] @ A[:, part].T for part in parts)
    terms = [X[:, part] @ W[:, part].T for part in reversed(parts)]
    Y = sum(terms) + (problem.scaling * XA).to(dtype).float() @ B.T
    return (Y if problem.bias is None else Y + problem.bias.float()).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("shape", [(1, 64, 48, 8), (37, 53, 71, 1), (64, 96, 512, 64)])
def test_another_order_of_summation_passes(shape: tuple[int, int, int, int], splits: int, dtype: torch.dtype) -> None:
    problem = make_problem(*shape, dtype)
    ratios = assert_close(_forward(problem, splits), plain(problem).Y, truth(problem).Y)
    assert all(0 <= ratio <= 4 for ratio in ratios)


PLANTED = {
    "LoRA branch dropped": lambda p: replace(p, B=torch.zeros_like(p.B)),
    "scaling forgotten": lambda p: replace(p, scaling=1.0),
    "scaling squared": lambda p: replace(p, scaling=p.scaling**2),
    "a rank skipped": lambda p: replace(p, A=torch.cat([p.A[:-1], torch.zeros_like(p.A[-1:])])),
    "bias dropped": lambda p: replace(p, bias=torch.zeros_like(p.bias)),
    "a row of X not read": lambda p: replace(p, X=torch.cat([p.X[:-1], torch.zeros_like(p.X[-1:])])),
    "a column of K not read": lambda p: replace(p, X=torch.cat([p.X[:, :-1], torch.zeros_like(p.X[:, -1:])], dim=1)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bug", PLANTED)
def test_a_wrong_term_is_caught(bug: str, dtype: torch.dtype) -> None:
    problem = make_problem(32, 48, 64, 64, dtype)
    wrong = _forward(PLANTED[bug](problem))
    assert not within_rule(wrong, plain(problem).Y, truth(problem).Y)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_unwritten_element_is_caught(dtype: torch.dtype, value: float) -> None:
    problem = make_problem(32, 48, 64, 8, dtype)
    got = _forward(problem)
    largest = int(got.abs().argmax())
    got.view(-1)[largest] = value
    with pytest.raises(AssertionError, match=rf"Y: error is .* worst at \({largest // 48}, {largest % 48}\)"):
        assert_close(got, plain(problem).Y, truth(problem).Y, what="Y")


def test_a_result_of_lower_precision_is_caught() -> None:
    problem = make_problem(32, 48, 64, 8, torch.float32)
    rounded = _forward(problem).half().float()
    assert not within_rule(rounded, plain(problem).Y, truth(problem).Y)


def test_shapes_and_dtypes_must_agree() -> None:
    exact = torch.zeros(2, 3, dtype=torch.float64)
    assert not within_rule(torch.zeros(2, 1), torch.zeros(2, 3), exact)
    assert not within_rule(torch.zeros(2, 3), torch.zeros(2, 1), exact)
    assert not within_rule(torch.zeros(2, 3).half(), torch.zeros(2, 3), exact)
    assert within_rule(torch.zeros(2, 3), torch.zeros(2, 3), exact)
    assert within_rule(torch.zeros(0, 3), torch.zeros(0, 3), exact[:0])
    assert not within_rule(torch.zeros(0, 4), torch.zeros(0, 3), exact[:0])


def test_a_problem_that_can_judge_nothing_is_refused() -> None:
    ones = torch.ones(3)
    with pytest.raises(ValueError, match=r"torch\.float64"):
        within_rule(ones, ones, ones)
    with pytest.raises(ValueError, match="plain is not finite"):
        within_rule(ones, ones / 0, ones.double())


def test_a_pool_judges_small_results_together() -> None:
    generator = torch.Generator().manual_seed(0)
    pool = Pool()
    for _ in range(40):
        exact = torch.randn(2, generator=generator, dtype=torch.float64)
        pool.assert_close((exact + 1e-9).bfloat16(), exact.bfloat16(), exact, what="dB")
    pool.close()
    for _ in range(40):
        exact = torch.randn(2, generator=generator, dtype=torch.float64)
        pool.assert_close((exact * 0.99).bfloat16(), exact.bfloat16(), exact, what="dB")
    with pytest.raises(AssertionError, match="dB of 40 small problems"):
        pool.close()
    with pytest.raises(AssertionError, match="not finite"):
        pool.assert_close(torch.full((1,), float("nan")), torch.ones(1), torch.ones(1, dtype=torch.float64))
    with pytest.raises(AssertionError, match="error is"):
        pool.assert_close(torch.zeros(Pool.SMALL), torch.ones(Pool.SMALL), torch.ones(Pool.SMALL, dtype=torch.float64))
