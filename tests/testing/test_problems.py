"""Problems have a LoRA term as large as the base term, and truth and plain results that follow the equations."""

import pytest
import torch

from lora_kernels.testing import REGIMES, Problem, Results, fuzz_problems, make_problem, plain, truth


def _terms(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    X, W, A, B = (tensor.double() for tensor in (problem.X, problem.W, problem.A, problem.B))
    return X @ W.T, problem.scaling * (X @ A.T) @ B.T


@pytest.mark.parametrize("lora_scale", [1.0, 0.25])
@pytest.mark.parametrize("shape", [(1, 3, 5, 1), (33, 64, 48, 8), (512, 128, 96, 64)])
def test_the_lora_term_is_as_large_as_asked(shape: tuple[int, int, int, int], lora_scale: float) -> None:
    base_term, lora_term = _terms(make_problem(*shape, torch.bfloat16, lora_scale=lora_scale))
    ratio = lora_term.square().mean().sqrt() / base_term.square().mean().sqrt()
    assert ratio == pytest.approx(lora_scale, rel=0.15)


def test_the_equations() -> None:
    problem = make_problem(7, 5, 6, 2, torch.float64, dropout_p=0.25)
    keep = torch.rand(7, 6, generator=torch.Generator().manual_seed(0)) >= 0.25
    X, W, A, B, dY = problem.X, problem.W, problem.A, problem.B, problem.dY
    D = keep.double() / 0.75
    XA = (D * X) @ A.T
    dYB = problem.scaling * dY @ B
    assert problem.bias is not None
    expected = Results(
        Y=X @ W.T + problem.bias + problem.scaling * XA @ B.T,
        dX=dY @ W + D * (dYB @ A),
        dA=dYB.T @ (D * X),
        dB=problem.scaling * dY.T @ XA,
        dbias=dY.sum(dim=0),
    )
    for results in (truth(problem, keep), plain(problem, keep)):
        for name, value in vars(expected).items():
            torch.testing.assert_close(getattr(results, name), value, msg=name)


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, adapter_dtype: torch.dtype | None) -> None:
    problem = make_problem(9, 10, 11, 3, dtype, adapter_dtype=adapter_dtype, bias=False)
    results = plain(problem)
    assert {results.Y.dtype, results.dX.dtype} == {dtype}
    assert {problem.A.dtype, results.dA.dtype, results.dB.dtype} == {adapter_dtype or dtype}
    assert problem.bias is None
    assert results.dbias is None
    assert truth(problem).dA.dtype == torch.float64
    assert problem.shape == (9, 10, 11, 3)


def test_strided_problems_hold_the_same_values() -> None:
    dense, strided = (make_problem(9, 10, 11, 3, torch.float32, strided=strided) for strided in (False, True))
    for name in ("X", "W", "A", "B", "bias", "dY"):
        assert torch.equal(getattr(dense, name), getattr(strided, name))
        assert not getattr(strided, name).is_contiguous()


def test_the_same_seed_gives_the_same_problem() -> None:
    first, again, other = (make_problem(4, 4, 4, 2, torch.float32, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.X, again.X)
    assert not torch.equal(first.X, other.X)


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_regimes(regime: tuple) -> None:
    problem = make_problem(regime.M, regime.N, regime.K, regime.r, torch.bfloat16, strided=regime.strided)
    assert plain(problem).Y.shape == (regime.M, regime.N)
    assert truth(problem).dA.isfinite().all()


def test_fuzz_cases_repeat_and_cover_the_edges() -> None:
    cases = list(fuzz_problems(500, seed=3))
    assert cases == list(fuzz_problems(500, seed=3))
    assert cases != list(fuzz_problems(500, seed=4))
    assert {0, 1} <= {case.M for case in cases}
    assert {1, 17, 64} <= {case.r for case in cases}
    assert {torch.float16, torch.bfloat16, torch.float32} == {case.dtype for case in cases}
