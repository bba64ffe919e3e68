"""The stand-in is tested first: where Triton's internals move, these fail and not two thousand kernel tests."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import lora_kernels
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.testing.interpreter import bf16 as interpreter_bf16
from lora_kernels.testing.interpreter.bf16 import bf16_bits, bf16_values, round_to_tf32

INTERPRETED = pytest.mark.skipif(
    isinstance(tl.philox, triton.runtime.JITFunction), reason="about Triton's interpreter, which is off on a GPU"
)


@triton.jit
def _elementwise_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "div":
        out = x / y
    elif OP == "less":
        out = tl.where(x < y, x, y)
    elif OP == "neg":
        out = -x
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "max":
        out = tl.maximum(x, y)
    elif OP == "constant":
        out = x + tl.full((BLOCK,), 1.5, tl.bfloat16)
    elif OP == "through_float32":
        out = (x.to(tl.float32) * 1.0009765625).to(tl.bfloat16)
    elif OP == "through_float16":
        out = x.to(tl.float16).to(tl.bfloat16)
    elif OP == "from_int":
        out = offs.to(tl.bfloat16)
    elif OP == "to_int":
        out = (x * 8).to(tl.int32).to(tl.bfloat16)
    tl.store(out_ptr + offs, out)


IN_TORCH = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "less": lambda x, y: torch.where(x < y, x, y),
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "max": torch.maximum,
    "constant": lambda x, y: x + 1.5,
    "through_float32": lambda x, y: (x.float() * 1.0009765625).bfloat16(),
    "through_float16": lambda x, y: x.half().bfloat16(),
    "from_int": lambda x, y: torch.arange(x.numel(), device=x.device).bfloat16(),
    "to_int": lambda x, y: (x * 8).int().bfloat16(),
}


@pytest.mark.parametrize("op", IN_TORCH)
def test_elementwise_is_bit_exact(op: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4096, generator=generator).bfloat16().to(device) for _ in range(2))
    out = torch.empty_like(x)
    _elementwise_kernel[(1,)](x, y, out, op, 4096)
    assert torch.equal(out, IN_TORCH[op](x, y))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, K: tl.constexpr, PRECISION: tl.constexpr):
    rows = tl.arange(0, 16)
    offs_k = tl.arange(0, K)
    a = tl.load(a_ptr + rows[:, None] * K + offs_k[None, :])
    b = tl.load(b_ptr + offs_k[:, None] * 16 + rows[None, :])
    out = tl.dot(a, b, input_precision=PRECISION)
    tl.store(out_ptr + rows[:, None] * 16 + rows[None, :], out)


def _dot(a: torch.Tensor, b: torch.Tensor, precision: str) -> torch.Tensor:
    out = torch.empty(16, 16, device=a.device)
    _dot_kernel[(1,)](a, b, out, a.shape[1], precision)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_accumulates_in_float32(dtype: torch.dtype, device: str) -> None:
    a, b = torch.randn(16, 32, device=device).to(dtype), torch.randn(32, 16, device=device).to(dtype)
    torch.testing.assert_close(_dot(a, b, "ieee"), a.float() @ b.float(), rtol=0, atol=1e-5)


def test_float32_dot_rounds_to_tf32_unless_told_otherwise(device: str) -> None:
    a, b = torch.randn(16, 32, device=device), torch.randn(32, 16, device=device)
    exact = a.double() @ b.double()
    ieee, tf32 = ((_dot(a, b, precision) - exact).abs().max() for precision in ("ieee", "tf32"))
    assert ieee < 1e-5
    assert 1e-4 < tf32 < 1e-1


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, OP: tl.constexpr):
    rows = tl.arange(0, 16)
    x = tl.load(x_ptr + rows[:, None] * 16 + rows[None, :])
    if OP == "max":
        out = tl.max(x, axis=1)
    elif OP == "sum_in_float32":
        out = tl.sum(x.to(tl.float32), axis=1)
    elif OP == "sum":
        out = tl.sum(x, axis=1)
    tl.store(out_ptr + rows, out.to(tl.bfloat16))


def test_reductions(device: str) -> None:
    x, out = torch.randn(16, 16, device=device).bfloat16(), torch.empty(16, device=device).bfloat16()
    _reduce_kernel[(1,)](x, out, "max")
    assert torch.equal(out, x.max(dim=1).values)
    _reduce_kernel[(1,)](x, out, "sum_in_float32")
    torch.testing.assert_close(out, x.float().sum(dim=1).bfloat16(), rtol=2**-8, atol=0)


@INTERPRETED
def test_a_sum_in_bf16_is_refused() -> None:
    x = torch.zeros(16, 16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="convert the tile to float32"):
        _reduce_kernel[(1,)](x, x[0], "sum")


A_USERS_PROGRAM = """
import torch, triton, triton.language as tl
import lora_kernels as lk
from lora_kernels.testing import assert_close, make_problem, plain, truth
from lora_kernels.testing.multi import make_multi_problem, mix_ids, multi_plain, multi_truth

@triton.jit
def sums(x_ptr, out_ptr):
    rows = tl.arange(0, 16)
    tl.store(out_ptr + rows, tl.sum(tl.load(x_ptr + rows[:, None] * 16 + rows[None, :]), axis=1))

def judge(got, expected, true, dtype):
    for name, T in got.items():
        assert_close(T, getattr(expected, name), getattr(true, name), what=name, dtype=dtype)

for dtype, adapters in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
    q = make_problem(9, 24, 40, 4, dtype, adapter_dtype=adapters)
    X, A, B = (T.clone().requires_grad_() for T in (q.X, q.A, q.B))
    Y = lk.lora_linear(X, q.W, A, B, q.bias, scaling=q.scaling, backend="triton:one_pass")
    Y.backward(q.dY)
    judge({"Y": Y.detach(), "dX": X.grad, "dA": A.grad, "dB": B.grad}, plain(q), truth(q), dtype)
    p = make_multi_problem(mix_ids("uniform", 9, 3), 24, 40, (4, 3, 0), dtype, adapter_dtype=adapters)
    Y = lk.multi_lora_linear(p.X, p.W, p.slots, p.ids, p.bias, backend="triton:decode")
    judge({"Y": Y}, multi_plain(p), multi_truth(p), dtype)
x, out = torch.ones(16, 16).bfloat16(), torch.empty(16).bfloat16()
sums[(1,)](x, out)
assert torch.equal(out, x.sum(1)), "a kernel of the user's own is refused or wrong"
print("all is right")
"""


@pytest.mark.slow
def test_bf16_is_exact_in_a_program_that_installs_nothing(tmp_path: Path) -> None:
    """The package makes the interpreter exact itself, where TRITON_INTERPRET=1 is all that a user did."""
    program = tmp_path / "program.py"
    program.write_text(A_USERS_PROGRAM)
    path = os.pathsep.join([str(Path(lora_kernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "all is right", done.stderr[-2000:]


def test_an_interpreter_that_has_moved_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(**options: bool) -> None:
        raise AttributeError("no attribute 'ternary_op'")

    monkeypatch.setattr(interpreter_bf16._state, "installed", False)
    monkeypatch.setattr(interpreter_bf16, "make_exact", moved)
    with pytest.raises(BackendUnavailableError, match=r"no attribute 'ternary_op'.*backend='reference'"):
        interpreter_bf16.ensure_exact()


def test_rounding_agrees_with_torch_on_every_kind_of_number() -> None:
    bits = np.arange(0, 2**32, 65521, dtype=np.uint64).astype(np.uint32)
    edges = np.array([0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0x00000001, 0x3F808000, 0x3F818000])
    values = np.concatenate([bits, edges.astype(np.uint32)]).view(np.float32)
    expected = torch.from_numpy(values).bfloat16()
    got = torch.from_numpy(bf16_values(bf16_bits(values)))
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=0, equal_nan=True)


def test_tf32_keeps_ten_bits() -> None:
    step = np.float32(2**-10)
    values = np.array([1 + step, 1 + step * np.float32(0.49), 1 + step * np.float32(1.51), np.inf], dtype=np.float32)
    assert np.array_equal(round_to_tf32(values), np.array([1 + step, 1, 1 + 2 * step, np.inf], dtype=np.float32))
