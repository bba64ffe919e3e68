"""The checks together: they pass a right kernel on odd shapes and catch every bug planted in it within 60 of them."""

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from lora_kernels.testing import interpreter, make_problem, plain, poison, truth, within_rule

pytestmark = pytest.mark.skipif(
    isinstance(tl.philox, triton.runtime.JITFunction), reason="a planted bug on a GPU may take the process with it"
)

SOURCE = (Path(__file__).parent / "fused_kernel.py").read_text()
X_MASK = "tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)"
W_MASK = "tl.load(w_ptrs, mask=mask_n[None, :] & mask_k[:, None], other=0.0)"
A_MASK = "tl.load(a_ptrs, mask=mask_r[None, :] & mask_k[:, None], other=0.0)"
B_MASK = "tl.load(b_ptrs, mask=mask_n[None, :] & mask_r[:, None], other=0.0)"
STORE = "acc.to(Y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :]"
PROGRAM_IDS = "tl.program_id(0)\n    pid_n = tl.program_id(1)"
BASE_DOT = 'acc = tl.dot(x, w, acc, input_precision="ieee")'
LORA_DOT = 'acc = tl.dot((xa * scaling).to(b.dtype), b, acc, input_precision="ieee")'

BUGS = {
    "no K mask on X": (X_MASK, "tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)"),
    "no M mask on X": (X_MASK, "tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)"),
    "no N mask on W": (W_MASK, "tl.load(w_ptrs, mask=mask_k[:, None], other=0.0)"),
    "no rank mask on A": (A_MASK, "tl.load(a_ptrs, mask=mask_k[:, None], other=0.0)"),
    "no mask on A": (A_MASK, "tl.load(a_ptrs)"),
    "no N mask on B": (B_MASK, "tl.load(b_ptrs, mask=mask_r[:, None], other=0.0)"),
    "no mask on the store": (STORE, "acc.to(Y_ptr.dtype.element_ty)"),
    "last column not stored": (STORE, STORE + " & (offs_n[None, :] < N - 1)"),
    "<= for < in the K mask": ("k * BLOCK_K + offs_k < K", "k * BLOCK_K + offs_k <= K"),
    "one K step short": ("tl.cdiv(K, BLOCK_K)", "(K // BLOCK_K)"),
    "row stride of X taken as K": ("* stride_xm", "* K"),
    "scaling forgotten": ("(xa * scaling)", "xa"),
    "scaling squared": ("(xa * scaling)", "(xa * scaling * scaling)"),
    "last rank skipped": ("offs_r < r", "offs_r < r - 1"),
    "LoRA branch dropped": (LORA_DOT, "acc += 0 * tl.dot((xa * scaling).to(b.dtype), b)"),
    "LoRA branch overwrites the base": (LORA_DOT, LORA_DOT.replace("b, acc", "b")),
    "accumulator not carried": (BASE_DOT, BASE_DOT.replace("w, acc", "w")),
    "A not advanced": ("a_ptrs += BLOCK_K", "a_ptrs += 0"),
    "W advanced twice": ("w_ptrs += BLOCK_K", "w_ptrs += 2 * BLOCK_K"),
    "B read transposed": ("offs_n[None, :] * r + offs_r[:, None]", "offs_n[None, :] + offs_r[:, None] * N"),
    "program ids swapped": (PROGRAM_IDS, PROGRAM_IDS.replace("0", "2").replace("1", "0").replace("2", "1")),
    "accumulator rounded to bf16": (BASE_DOT, BASE_DOT + ".to(tl.bfloat16).to(tl.float32)"),
    "XA rounded to 8 bits": ("(xa * scaling).to(b.dtype)", "(xa * scaling).to(tl.float8e5).to(b.dtype)"),
    "later row blocks off by one": ("acc.to(Y_ptr", "(acc + (pid_m > 1)).to(Y_ptr"),
    "blocks race for the first rows": ("Y_ptr + offs_m[:, None]", "Y_ptr + (offs_m % BLOCK_M)[:, None]"),
}  # fmt: skip


def _load(source: str, path: Path) -> Callable[..., torch.Tensor]:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fused


def _case(fused: Callable[..., torch.Tensor], rng: random.Random) -> str | None:
    """None where the kernel passes one random case, otherwise what was wrong with it."""
    M, N, K = (rng.choice([1, 2, 3, 7, 15, 16, 17, 31, 33, 48, 65]) for _ in range(3))
    r, dtype = rng.choice([1, 2, 4, 8, 16, 17]), rng.choice([torch.bfloat16, torch.float16, torch.float32])
    tiles = tuple(rng.choice([16, 32]) for _ in range(3))
    problem = make_problem(M, N, K, r, dtype, bias=False, seed=rng.randrange(2**30))
    X = problem.X.new_full((M, K + 5), float("nan"))[:, :K].copy_(problem.X) if rng.random() < 0.3 else problem.X
    interpreter.order(rng.randrange(3))
    try:
        with poison():
            Y = fused(X, problem.W, problem.A, problem.B, problem.scaling, tiles)
    except triton.runtime.errors.InterpreterError as error:
        return str(error)
    verdict = within_rule(Y, plain(problem).Y, truth(problem).Y)
    return None if verdict else verdict.message


def test_the_kernel_itself_passes(tmp_path: Path) -> None:
    fused, rng = _load(SOURCE, tmp_path / "right.py"), random.Random(0)
    assert [failure for _ in range(100) if (failure := _case(fused, rng))] == []


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, tmp_path: Path) -> None:
    right, wrong = BUGS[bug]
    assert SOURCE.count(right) == 1
    fused, rng = _load(SOURCE.replace(right, wrong), tmp_path / "wrong.py"), random.Random(1)
    assert any(_case(fused, rng) for _ in range(60))
