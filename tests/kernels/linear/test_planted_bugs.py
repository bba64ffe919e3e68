"""Bugs planted into a copy of our kernels; each must turn the checks red. The copy without a bug stays green."""
# ruff: noqa: E501  (a bug is a line of source)

import pytest
import torch

from lora_kernels.kernels.chip import CHIPS
from lora_kernels.reference import packed_width, philox_keep_mask
from lora_kernels.testing import assert_close, make_problem, plain, poison, truth

# (what, file, text, replacement)
BUGS = [
    ("the LoRA branch is dropped", "linear/launchers.py", "return extend(X, W, XA, B,", "return extend(X, W, XA * 0, B,"),
    ("one_pass drops the LoRA branch", "linear/lora_linear.py", "acc = tl.dot(xa, b.to(xa.dtype), acc,", "acc += 0 * tl.dot(xa, b.to(xa.dtype),"),
    ("scaling is forgotten", "linear/shrink.py", "factor=scaling * inv_keep(drop)", "factor=inv_keep(drop)"),
    ("scaling is applied twice", "linear/shrink.py", "factor=scaling * inv_keep(drop)", "factor=scaling**2 * inv_keep(drop)"),
    ("scaling is forgotten in dYB", "linear/lora_linear_bwd.py", "Partial(part_dyb, XA.dtype, scaling)", "Partial(part_dyb, XA.dtype)"),
    ("1/(1-p) is forgotten", "linear/shrink.py", "factor=scaling * inv_keep(drop)", "factor=scaling"),
    ("1/(1-p) is forgotten in dA", "linear/lora_linear_bwd.py", "reduce_partials(Partial(part_da, A.dtype, inv_keep(drop)))", "reduce_partials(Partial(part_da, A.dtype))"),
    ("the last rank is skipped", "linear/shrink.py", "mask_r = offs_r < r\n", "mask_r = offs_r < r - 1\n"),
    ("the last rank is skipped in low_rank", "common.py", "mask_r = offs_r < r\n", "mask_r = offs_r < r - 1\n"),
    ("ranks are read past the end", "common.py", "mask=mask_n[None, :] & mask_r[:, None], other=0.0)\n        acc", "mask=mask_n[None, :], other=0.0)\n        acc"),
    ("the last column is not written", "linear/lora_linear.py", "mask=mask_m[:, None] & mask_n[None, :])\n\n\n@triton.jit\ndef _one", "mask=mask_m[:, None] & (offs_n < N - 1)[None, :])\n\n\n@triton.jit\ndef _one"),
    ("the last row of dX is not written", "linear/lora_linear_bwd.py", "tile_mask = mask_m[:, None]", "tile_mask = (offs_m < M - 1)[:, None]"),
    ("rows are written past the end", "linear/lora_linear.py", "tl.store(y_ptrs, acc.to(Y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])\n\n\n@triton.jit\ndef _one", "tl.store(y_ptrs, acc.to(Y_ptr.dtype.element_ty), mask=mask_n[None, :])\n\n\n@triton.jit\ndef _one"),
    ("one K step short", "common.py", "for k in range(0, tl.cdiv(K, BLOCK_K)):", "for k in range(0, K // BLOCK_K):"),
    ("K is read past the end", "common.py", "mask_m[:, None] & mask_k[None, :], other=0.0)\n            q", "mask_m[:, None], other=0.0)\n            q"),
    ("the accumulator is not carried", "common.py", "acc = tl.dot(p, q, acc,", "acc = tl.dot(p, q,"),
    ("the accumulator is bf16", "common.py", "acc = tl.dot(p, q, acc, input_precision=PRECISION)", "acc = tl.dot(p, q, acc, input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)"),
    ("bias is added twice", "linear/lora_linear.py", "bias_ptr + offs_n.to(tl.int64) * stride_bias, mask=mask_n, other=0.0).to(tl.float32)[None, :]\n    y_ptrs = Y_ptr + offs_m[:, None].to(tl.int64) * stride_ym + offs_n[None, :]\n    tl.store(y_ptrs, acc.to(Y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])\n\n\n@triton.jit\ndef _one", "bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(tl.float32)[None, :] * 2\n    y_ptrs = Y_ptr + offs_m[:, None].to(tl.int64) * stride_ym + offs_n[None, :]\n    tl.store(y_ptrs, acc.to(Y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])\n\n\n@triton.jit\ndef _one"),
    ("the mask is drawn for the wrong columns", "linear/shrink.py", "col = k * BLOCK_K", "col = 0 * k"),
    ("the mask ignores the row", "common.py", "c1 = tl.broadcast_to(offs_m[:, None],", "c1 = tl.broadcast_to(offs_m[:, None] * 0,"),
    ("the mask ignores the offset's high word", "common.py", "((offset >> 32) & 0xFFFFFFFF)", "(offset & 0)"),
    ("six rounds of Philox", "common.py", "tl.philox(seed, c0, c1, c2, c3, 7)", "tl.philox(seed, c0, c1, c2, c3, 6)"),
    ("bits are packed in the wrong order", "common.py", "| (_two_bits(w2, threshold) << 4) | (_two_bits(w3, threshold) << 6)", "| (_two_bits(w3, threshold) << 4) | (_two_bits(w2, threshold) << 6)"),
    ("bits of the row before are read", "common.py", "c_ptrs = keep_ptr + offs_m[:, None].to(tl.int64) * stride_keep + offs_c[None, :]\n        return", "c_ptrs = keep_ptr + offs_m[:, None].to(tl.int64) * stride_keep + offs_c[None, :] - stride_keep\n        return"),
    ("bits are read past the end", "common.py", "mask=mask_m[:, None] & (offs_c * 8 < K)[None, :], other=0)", "mask=mask_m[:, None], other=0)"),
    ("only the first block of columns keeps its bits", "linear/shrink.py", "mask_m & (tl.program_id(1) == 0), col,", "mask_m & (tl.program_id(1) == 0) & (k == 0), col,"),
    ("dX forgets the mask", "linear/lora_linear_bwd.py", "acc = tl.where(keep, acc * factor, 0.0)", "acc = acc * factor"),
    ("dA forgets the mask", "linear/lora_linear_bwd.py", "            x = tl.where(keep, x, 0.0)\n        s_ptrs", "            x = x * 1.0\n        s_ptrs"),
    ("a partial sum is left out", "reduce.py", "for _ in range(0, count):", "for _ in range(0, max(count - 1, 1)):"),
    ("row blocks of dB's span overlap", "linear/lora_linear_bwd.py", "for m in range(0, SPAN_M, BLOCK_M):\n        offs_m = span * SPAN_M + m + tl.arange(0, BLOCK_M)\n        mask_m = offs_m < M\n        rows = offs_m[:, None].to(tl.int64)\n        dy_ptrs", "for m in range(0, SPAN_M, BLOCK_M):\n        offs_m = span * SPAN_M + m // 2 + tl.arange(0, BLOCK_M)\n        mask_m = offs_m < M\n        rows = offs_m[:, None].to(tl.int64)\n        dy_ptrs"),
    ("rows and columns of tiles are swapped", "linear/lora_linear.py", "pid_m, pid_n = tile_order(", "pid_n, pid_m = tile_order("),
    ("a 32-bit row offset", "common.py", "p_ptrs = P_ptr + offs_m[:, None].to(tl.int64) * stride_pm", "p_ptrs = P_ptr + offs_m[:, None] * stride_pm"),
]  # fmt: skip


def judge(launchers, device):
    """Every plan forward and backward on two problems, one of them with far-apart rows."""
    chip = CHIPS["sm_90"]
    for M, N, K, r, dtype, p, far in (
        (140, 70, 90, 20, torch.bfloat16, 0.25, False),
        (5, 40, 70, 3, torch.float16, 0.0, True),
    ):
        q = make_problem(M, N, K, r, dtype, device, dropout_p=p)
        seed = torch.tensor([3, 2**40 + 1], device=device) if p else None
        keep = philox_keep_mask(seed, p, M, K) if p else None
        expected, true = plain(q, keep), truth(q, keep)
        X = q.X
        if far:
            X = torch.empty((M - 1) * 2**29 + K, dtype=dtype, device=device).as_strided((M, K), (2**29, 1)).copy_(X)
        for plan in ("shrink_extend", "one_pass"):
            with poison():
                bits = torch.empty(M, packed_width(K), dtype=torch.uint8, device=device)[:, : -(-K // 8)]
                drop = launchers.Dropout(p, seed, bits) if p else None
                Y, XA = launchers.lora_linear_fwd(X, q.W, q.A, q.B, q.bias, q.scaling, drop, plan, chip)
                grads = launchers.lora_linear_bwd(
                    q.dY, X, q.W, q.A, q.B, XA, q.scaling, drop, (True,) * 4, "shrink_extend", chip
                )
            for name, got in zip(("Y", "dX", "dA", "dB", "dbias"), (Y, *grads), strict=True):
                assert_close(got, getattr(expected, name), getattr(true, name), what=f"{plan} {name}")


def test_the_copy_itself_is_right(kernels_with, device):
    judge(*kernels_with(("linear.launchers",)), device)


@pytest.mark.sampled(8)
@pytest.mark.parametrize(("what", "file", "text", "replacement"), BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_caught(what, file, text, replacement, kernels_with, device):
    (launchers,) = kernels_with(("linear.launchers",), file, text, replacement)
    with pytest.raises(Exception, match=r"plain PyTorch's|out of bounds|wraps|out-of-bounds|not finite"):
        judge(launchers, device)
