"""Bugs planted into a copy of the persistent kernels; each must turn the checks red. The copy without one stays green."""
# ruff: noqa: E501  (a bug is a line of source)

import pytest
import torch

from lora_kernels.kernels.tiles import PtrConfig, TmaConfig, TmaDxConfig
from lora_kernels.reference import pack_keep, philox_keep_mask
from lora_kernels.testing import assert_close, make_problem, plain, poison, truth

MODULES = ("common", "persistent", "linear.one_launch", "hopper.tma", "hopper.tma_bwd")
DX = TmaDxConfig(64, 128, 64, num_warps=4, num_stages=2, RANK_STEP=16, DA_ROWS=2)
TMA = TmaConfig(64, 64, 64, num_warps=4, num_stages=2, RANK_STEP=16)
PTR = PtrConfig(64, 64, 32, num_warps=4, num_stages=2, RANK_STEP=16)

# (what, file, text, replacement)
BUGS = [
    ("the opening forgets the mask", "hopper/tma_bwd.py", "acc = tl.where(keep, acc * factor, 0.0)", "acc = acc * factor"),
    ("the opening forgets 1/(1-p)", "hopper/tma_bwd.py", "tl.where(keep, acc * factor, 0.0)", "tl.where(keep, acc, 0.0)"),
    ("dA forgets the mask", "hopper/tma_bwd.py", "x = tl.where(keep, x, 0.0)", "x = x * 1.0"),
    ("dA forgets 1/(1-p)", "hopper/tma_bwd.py", "Partial(part_da, A.dtype, inv_keep(drop))", "Partial(part_da, A.dtype)"),
    ("dA's mask is that of other columns", "hopper/tma_bwd.py", "offs_m < M, col + c, K, threshold", "offs_m < M, col, K, threshold"),
    ("the right half opens with the left one's columns", "hopper/tma_bwd.py", "offs_m, col + HALF, M, K", "offs_m, col, M, K"),
    ("the halves are swapped", "hopper/tma_bwd.py", "tl.join(left, right)", "tl.join(right, left)"),
    ("the halves are interleaved", "hopper/tma_bwd.py", "tl.permute(tl.join(left, right), (0, 2, 1))", "tl.join(left, right)"),
    ("the right half of dX is not written", "hopper/tma_bwd.py", "        dX_desc.store([row, col + HALF], right.to(dX_desc.dtype))\n", ""),
    ("one step of N short", "hopper/tma_bwd.py", "tl.range(0, tl.cdiv(N, BLOCK_K))", "tl.range(0, N // BLOCK_K)"),
    ("dA's spans overwrite each other", "hopper/tma_bwd.py", "(span.to(tl.int64) * r", "(span.to(tl.int64) * 0"),
    ("a span keeps its last row block only", "hopper/tma_bwd.py", "(step % DA_ROWS > 0)", "(step % DA_ROWS > 9)"),
    ("a span begins with what was there", "hopper/tma_bwd.py", "mask & (step % DA_ROWS > 0)", "mask"),
    ("dA is written past its columns", "hopper/tma_bwd.py", "mask = (offs_k < K)[:, None] & (offs_r < r)[None, :]", "mask = (offs_k < 2 * K)[:, None] & (offs_r < r)[None, :]"),
    ("dA is made of the left columns only", "hopper/tma_bwd.py", "X_desc.load([row, col + c])", "X_desc.load([row, col])"),
    ("the last tile has no program", "hopper/tma_bwd.py", "num_spans * num_k - tl.program_id(0)", "num_spans * num_k - 1 - tl.program_id(0)"),
    ("the last rank is skipped", "persistent.py", "(offs_r < r)[None, :]", "(offs_r < r - 1)[None, :]"),
    ("ranks are read past the end", "persistent.py", "mask=mask[:, None] & (offs_r < r)[None, :]", "mask=mask[:, None]"),
    ("the second step of ranks repeats the first", "persistent.py", "offs_r = r0 + tl.arange(0, STEP)", "offs_r = tl.arange(0, STEP)"),
    ("the closing product drops the accumulator", "persistent.py", "t.to(s.dtype).T, acc,", "t.to(s.dtype).T, acc * 0,"),
    ("a flag is never put back", "persistent.py", "tl.atomic_xchg(ready_ptr + block, 0,", "tl.atomic_xchg(ready_ptr + block, 1,"),
    ("a count is never put back", "persistent.py", "        tl.atomic_xchg(readers_ptr + block, 0,", "        tl.atomic_xchg(readers_ptr + block, 2,"),
    ("the programs that made XA repeat a tile", "persistent.py", "first += tl.num_programs(0)", "first += tl.num_programs(0) - 1"),
    ("XA is not scaled", "linear/one_launch.py", "(xa * scaling)", "(xa * 1)"),
    ("XA of TMA is not scaled", "hopper/tma.py", "(xa * scaling)", "(xa * 1)"),
    ("A is read past K", "linear/one_launch.py", "mask=mask_r & mask_k[:, None]", "mask=mask_r"),
    ("XA is written past its ranks", "linear/one_launch.py", "mask=mask_m & mask_r)\n\n", "mask=mask_m)\n\n"),
    ("the right half of Y has the left one's bias", "linear/one_launch.py", "_store_columns(right, Y_ptr, bias_ptr, offs_m, col + HALF", "_store_columns(right, Y_ptr, bias_ptr - HALF * stride_bias, offs_m, col + HALF"),
    ("the last column of Y is not written", "linear/one_launch.py", "mask_n = offs_n < N\n", "mask_n = offs_n < N - 1\n"),
    ("rows of XA are taken for columns", "linear/one_launch.py", "offs_m, offs_n, M, N, r, stride_sm, stride_bn, stride_br", "offs_m, offs_n, M, N, r, stride_sm, stride_br, stride_bn"),
]  # fmt: skip


def judge(kernels, device, monkeypatch):
    """Forward by pointers and by descriptors, and dX and dA with a mask, on an odd problem; flags are zero after it."""
    taken = []

    def spy(num_m, device):
        taken.append(kernels["persistent"].one_launch_flags(num_m, device))
        return taken[-1]

    for module in ("linear.one_launch", "hopper.tma"):
        monkeypatch.setattr(kernels[module], "one_launch_flags", spy)
    M, N, K, p = 150, 72, 200, 0.25
    q = make_problem(M, N, K, 20, torch.bfloat16, device, dropout_p=p)
    keep = philox_keep_mask(q.seed, p, M, K)
    drop = kernels["common"].Dropout(p, q.seed, pack_keep(keep))
    dYB = (q.scaling * (q.dY.double() @ q.B.double())).to(q.X.dtype)
    masked, true_masked, bare, true = plain(q, keep), truth(q, keep), plain(q), truth(q)
    with poison():
        dX, dA = kernels["hopper.tma_bwd"].tma_dx(q.dY, q.W, dYB, q.A, q.X, drop, DX, 2)
        results = [("dX", dX, masked.dX, true_masked.dX), ("dA", dA, masked.dA, true_masked.dA)]
        for forward, config in (
            (kernels["linear.one_launch"].ptr_one_launch, PTR),
            (kernels["hopper.tma"].one_launch, TMA),
        ):
            Y, XA = forward(q.X, q.W, q.A, q.B, q.bias, q.scaling, config, 2)
            exact = q.scaling * (q.X.double() @ q.A.double().mT)
            results += [("Y", Y, bare.Y, true.Y), ("XA", XA, exact.to(Y.dtype), exact)]
    for what, got, expected, exact in results:
        assert_close(got, expected, exact, what=what)
    assert not any(flags.any() for flags in taken), "not finite: flags are left behind"


@pytest.mark.timeout(1200)
def test_the_copy_itself_is_right(kernels_with, device, monkeypatch):
    judge(dict(zip(MODULES, kernels_with(MODULES), strict=True)), device, monkeypatch)


@pytest.mark.sampled(10)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("what", "file", "text", "replacement"), BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_caught(what, file, text, replacement, kernels_with, device, monkeypatch):
    kernels = dict(zip(MODULES, kernels_with(MODULES, file, text, replacement), strict=True))
    with pytest.raises(Exception, match=r"plain PyTorch's|out of bounds|wraps|out-of-bounds|not finite"):
        judge(kernels, device, monkeypatch)
