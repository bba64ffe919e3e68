"""Accesses outside a launch's tensors raise; a race between programs shows in a shuffled order."""

import pytest
import torch
import triton
import triton.language as tl

from lora_kernels.testing import interpreter

pytestmark = pytest.mark.skipif(
    isinstance(tl.philox, triton.runtime.JITFunction), reason="about Triton's interpreter, which is off on a GPU"
)


@triton.jit
def _fill_kernel(out_ptr, stride_m, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tl.store(out_ptr + rows[:, None] * stride_m + columns[None, :], 1.0)


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs), mask=offs < n)


@triton.jit
def _count_kernel(counter_ptr, index):
    tl.atomic_add(counter_ptr + index, 1)


def test_masked_lanes_may_point_anywhere() -> None:
    x, out = torch.randn(16), torch.empty(10)
    _copy_kernel[(1,)](x, out, 10, 16)
    assert torch.equal(out, x[:10])


def test_a_load_past_the_end_raises() -> None:
    with pytest.raises(Exception, match=r"out of bounds load in 6 of 16 lanes, first at element 10 of x_ptr"):
        _copy_kernel[(1,)](torch.randn(10), torch.empty(10), 10, 16)


def test_a_store_past_the_end_raises() -> None:
    with pytest.raises(Exception, match=r"out of bounds store in 1 of 11 lanes, first at element 10 of out_ptr"):
        _copy_kernel[(1,)](torch.randn(16), torch.empty(10), 11, 16)


def test_an_atomic_past_the_end_raises() -> None:
    counter = torch.zeros(2, dtype=torch.int32)
    _count_kernel[(1,)](counter, 1)
    assert counter.tolist() == [0, 1]
    with pytest.raises(Exception, match="out of bounds atomic"):
        _count_kernel[(1,)](counter, 2)


def test_an_empty_tensor_opens_no_memory() -> None:
    with pytest.raises(Exception, match="out of bounds store"):
        _fill_kernel[(1,)](torch.empty(0), 4, 4, 4)


@pytest.mark.parametrize(("stride", "columns"), [(12, 16), (11, 8), (13, 8)])
def test_the_gaps_of_a_strided_view_are_outside(stride: int, columns: int) -> None:
    view = torch.zeros(4, 20)[:, :8]
    _fill_kernel[(1,)](view, view.stride(0), 4, 8)
    assert view.eq(1).all()
    with pytest.raises(Exception, match="out of bounds store"):
        _fill_kernel[(1,)](view, stride, 4, columns)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(8, 4).T, torch.zeros(4, 16)[:, ::2], torch.zeros(1, 1).expand(4, 8), torch.zeros(6, 4, 8)[3]],
    ids=["transposed", "every-second", "expanded", "slice"],
)
def test_any_view_is_wholly_open(tensor: torch.Tensor) -> None:
    _strided_fill_kernel[(1,)](tensor, tensor.stride(0), tensor.stride(1), 4, 8)
    assert tensor.eq(1).all()


@triton.jit
def _strided_fill_kernel(out_ptr, stride_m, stride_n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tl.store(out_ptr + rows[:, None] * stride_m + columns[None, :] * stride_n, 1.0)


@triton.jit
def _last_writer_kernel(out_ptr, order_ptr):
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(out_ptr, program)
    tl.store(order_ptr + program, tl.load(out_ptr))


def test_every_program_runs_once_in_an_order_set_by_the_seed() -> None:
    last = {}
    for seed in (0, 1, 2, 1):
        out, order = torch.full((), -1), torch.full((12,), -1)
        interpreter.order(seed)
        _last_writer_kernel[(3, 4)](out, order)
        assert order.tolist() == list(range(12))
        assert last.setdefault(seed, out.item()) == out.item()
    assert last[0] == 11
    assert len(set(last.values())) > 1  # the race shows
