"""What the strict interpreter refuses, and that philox and device functions still work under it."""

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(
    isinstance(tl.philox, triton.runtime.JITFunction), reason="about Triton's interpreter, which is off on a GPU"
)


@triton.jit
def _scale_rows_kernel(X_ptr, Y_ptr, stride_xm, stride_ym, N, WIDE: tl.constexpr, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n < N
    x = tl.load(X_ptr + row * stride_xm + offs_n, mask=mask, other=0.0)
    tl.store(Y_ptr + row * stride_ym + offs_n, x * 2.0, mask=mask)


def _far_apart(rows: int, columns: int, gap: int = 2**30) -> torch.Tensor:
    """A view over more than 2**31 elements of memory that is reserved and, but for its rows, never touched."""
    flat = torch.empty((rows - 1) * gap + columns, dtype=torch.bfloat16)
    return flat.as_strided((rows, columns), (gap, 1)).copy_(torch.randn(rows, columns))


def test_int64_offsets_reach_past_2_to_the_31_elements() -> None:
    X, Y = _far_apart(4, 100), _far_apart(4, 100)
    _scale_rows_kernel[(4,)](X, Y, X.stride(0), Y.stride(0), 100, WIDE=True, BLOCK_N=128)
    assert torch.equal(Y, X * 2)


def test_int32_offsets_that_wrap_around_raise() -> None:
    X, Y = _far_apart(4, 100), _far_apart(4, 100)
    with pytest.raises(Exception, match="int32 multiply wraps around"):
        _scale_rows_kernel[(4,)](X, Y, X.stride(0), Y.stride(0), 100, WIDE=False, BLOCK_N=128)


@triton.jit
def _philox_kernel(seed_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    r0, r1, r2, r3 = tl.randint4x(tl.load(seed_ptr), offs)
    tl.store(out_ptr + offs, r0)
    tl.store(out_ptr + BLOCK + offs, r1)
    tl.store(out_ptr + 2 * BLOCK + offs, r2)
    tl.store(out_ptr + 3 * BLOCK + offs, r3)


def _philox(seed: int, counter: int) -> list[int]:
    """Philox4x32-10 (Salmon et al., 2011) in Python's integers."""
    low = 2**32 - 1
    c, key = [counter, 0, 0, 0], [seed & low, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ key[0], second & low, first >> 32 ^ c[3] ^ key[1], first & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return c


def test_philox_is_exact_and_its_unsigned_wrap_around_is_allowed() -> None:
    seed = 2**40 + 12345
    out = torch.empty(4, 64, dtype=torch.int32)
    _philox_kernel[(1,)](torch.tensor([seed]), out, 64)
    expected = torch.tensor([_philox(seed, counter) for counter in range(64)]).T
    assert torch.equal(out.long() & 0xFFFFFFFF, expected)


@triton.jit
def _low_rank_kernel(a_ptr, out_ptr, K: tl.constexpr):
    rows = tl.arange(0, 16)
    offs_k = tl.arange(0, K)
    a = tl.load(a_ptr + rows[:, None] * K + offs_k[None, :])
    tl.store(out_ptr + rows[:, None] * 16 + rows[None, :], tl.dot(a, tl.trans(a)))


def test_a_dot_that_a_gpu_refuses_is_refused() -> None:
    out = torch.empty(16, 16)
    _low_rank_kernel[(1,)](torch.ones(16, 16).half(), out, 16)
    assert torch.equal(out, torch.full((16, 16), 16.0))
    with pytest.raises(Exception, match="K >= 16"):
        _low_rank_kernel[(1,)](torch.ones(16, 8).half(), out, 8)


@triton.jit
def _add_one(x):
    return x + 1


@triton.jit
def _tensor_bound_kernel(count_ptr, out_ptr, STEP: tl.constexpr):
    total = 0
    for _ in range(0, tl.cdiv(tl.load(count_ptr), STEP)):
        total = _add_one(total)
    tl.store(out_ptr, total)


def test_loop_bounds_may_be_tensors_and_device_functions_are_called() -> None:
    out = torch.empty((), dtype=torch.int32)
    _tensor_bound_kernel[(1,)](torch.tensor(10, dtype=torch.int32), out, 4)
    assert out == 3


def test_install_after_triton_without_the_interpreter_says_what_to_do() -> None:
    code = "import triton; from lora_kernels.testing import interpreter; interpreter.install()"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "set TRITON_INTERPRET=1 before importing it" in done.stderr
