"""The C++ operator of a mixed batch on a CPU, as it was built here; tests/csrc/test_update.py has its text alone."""

from dataclasses import replace

import pytest
import torch

from lora_kernels import multi_lora_linear
from lora_kernels.errors import BackendUnavailableError, ConfigError
from lora_kernels.kernels import csrc
from lora_kernels.planning import multi_plan
from lora_kernels.testing.multi import make_multi_problem, mix_ids, multi_plain, multi_truth
from lora_kernels.testing.rule import assert_close

BUILT = pytest.mark.skipif(csrc.update_missing() is not None, reason=f"not built: {csrc.update_missing()}")
RANKS = (16, 0, 3, 33, 64)


def problem(M=40, N=136, K=72, dtype=torch.float32, distribution="half", **options):
    options = {"pool_layout": True} | options
    return make_multi_problem(mix_ids(distribution, M, len(RANKS)), N, K, RANKS, dtype, **options)


@pytest.fixture
def calls(monkeypatch):
    """How many rows each call of the operator had."""
    seen, run = [], csrc.multi_lora_update_
    monkeypatch.setattr(csrc, "multi_lora_update_", lambda Y, X, *rest: seen.append(X.shape[0]) or run(Y, X, *rest))
    return seen


@BUILT
@pytest.mark.parametrize("dtype", csrc.UPDATE_DTYPES)
@pytest.mark.parametrize("distribution", ["distinct", "half", "identical", "none"])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 768, 768), (8, 200, 521), (64, 65, 136), (300, 130, 64)])
@pytest.mark.parametrize(("pool_layout", "gap"), [(True, 3), (False, 0)])
def test_it_is_right(dtype, distribution, M, N, K, pool_layout, gap):
    p = problem(M, N, K, dtype, distribution, pool_layout=pool_layout, gap=gap)
    assert_close(multi_lora_linear(p.X, p.W, p.slots, p.ids, p.bias, backend="cpp"), multi_plain(p).Y, multi_truth(p).Y)


@BUILT
@pytest.mark.parametrize("dtype", csrc.UPDATE_DTYPES)
def test_threads_and_neighbours_change_no_bit(dtype):
    p = problem(200, 300, 400, dtype, "uniform")
    start = torch.randn(200, 300).to(dtype)
    before = torch.get_num_threads()
    try:
        made = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made.append(csrc.multi_lora_update_(start.clone(), p.X, p.slots, p.ids))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    for m in (0, 77, 199):
        alone = csrc.multi_lora_update_(start[m : m + 1].clone(), p.X[m : m + 1], p.slots, p.ids[m : m + 1])
        assert torch.equal(alone[0], made[0][m])


@BUILT
def test_no_rows_no_slots_no_columns():
    p = problem(0)
    assert multi_lora_linear(p.X, p.W, p.slots, p.ids, p.bias, backend="cpp").shape == (0, 136)
    p = problem(4, 0)
    assert multi_lora_linear(p.X, p.W, p.slots, p.ids, p.bias, backend="cpp").shape == (4, 0)
    p = make_multi_problem(mix_ids("none", 4, 1), 8, 8, (0,), torch.float32)
    assert torch.equal(multi_lora_linear(p.X, p.W, p.slots, p.ids, None, backend="cpp"), p.X @ p.W.t())


@BUILT
def test_auto_takes_it_for_few_rows_without_gradients(calls, monkeypatch):
    p = problem()
    call = lambda q, **options: multi_lora_linear(q.X, q.W, q.slots, q.ids, q.bias, **options)  # noqa: E731
    Y = call(p)
    assert calls == [40]
    x = p.X.view(5, 8, -1)
    assert torch.equal(multi_lora_linear(x, p.W, p.slots, p.ids.view(5, 8), p.bias).view(40, -1), Y)
    assert calls == [40, 40]
    calls.clear()
    call(p, backend="reference")
    call(problem(dtype=torch.float64))
    call(problem(dtype=torch.float16))
    call(problem(dtype=torch.bfloat16, adapter_dtype=torch.float32))
    monkeypatch.setitem(multi_plan.CPP_ROWS, torch.float32, 39)
    call(p)
    monkeypatch.undo()
    A = p.slots.A.clone().requires_grad_()
    multi_lora_linear(p.X, p.W, p.slots._replace(A=A), p.ids, p.bias).sum().backward()
    assert A.grad is not None
    assert calls == []


@BUILT
def test_it_can_be_switched_off(calls, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "cpp")
    multi_plan.cpp_missing.cache_clear()
    p = problem()
    multi_lora_linear(p.X, p.W, p.slots, p.ids, p.bias)
    assert calls == []
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "c++")
    multi_plan.cpp_missing.cache_clear()
    with pytest.raises(ConfigError, match="cpp"):
        multi_lora_linear(p.X, p.W, p.slots, p.ids, p.bias)
    multi_plan.cpp_missing.cache_clear()


@BUILT
def test_by_name_it_refuses_what_it_does_not_take():
    def refused(match, q, **options):
        with pytest.raises(BackendUnavailableError, match=match):
            multi_lora_linear(q.X, q.W, q.slots, q.ids, q.bias, backend="cpp", **options)

    refused("float64", problem(dtype=torch.float64))
    refused("it converts none", problem(dtype=torch.bfloat16, adapter_dtype=torch.float32))
    p = problem()
    refused("rows of neighbours", replace(p, slots=p.slots._replace(A=p.slots.A.t().contiguous().t())))
    refused("keeps nothing", replace(p, X=p.X.clone().requires_grad_()))


@BUILT
def test_the_operator_checks_its_operands():
    p = problem()
    Y = torch.zeros(40, 136)
    update = torch.ops.lora_kernels.multi_lora_update_
    for wrong in (
        (Y[:, :100], p.X, *p.slots, p.ids),
        (Y, p.X[:, :50], *p.slots, p.ids),
        (Y, p.X.double(), *p.slots, p.ids),
        (Y.t().contiguous().t(), p.X, *p.slots, p.ids),
        (Y, p.X, *p.slots._replace(starts=p.slots.starts.long()), p.ids),
        (Y, p.X, *p.slots._replace(scalings=p.slots.scalings.double()), p.ids),
        (Y, p.X, *p.slots._replace(max_rank=10**6), p.ids),
        (Y, p.X, *p.slots, p.ids[:-1]),
    ):
        with pytest.raises(RuntimeError, match="multi_lora_update_"):
            update(*wrong)


def test_without_the_extension_by_name_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(csrc, "update_missing", lambda: "no compiler was found")
    p = problem()
    with pytest.raises(BackendUnavailableError, match="no compiler was found"):
        multi_lora_linear(p.X, p.W, p.slots, p.ids, p.bias, backend="cpp")
    with pytest.raises(BackendUnavailableError, match="no compiler was found"):
        csrc.multi_lora_update_(torch.zeros(40, 136), p.X, p.slots, p.ids)
