"""Bugs planted into a copy of multi_decode; each must turn the checks red. The copy without a bug stays green."""
# ruff: noqa: E501  (a bug is a line of source)

import pytest
import torch

from lora_kernels.testing import assert_close, interpreter, poison
from lora_kernels.testing.multi import make_multi_problem, multi_plain, multi_truth

MODULES = ("multi.decode", "multi.workspace", "tiles")

# (what, text, replacement), all in multi_decode.py
BUGS = [
    ("the low-rank term is dropped", "if count >= LOW:", "if count < 0:"),
    ("scaling is forgotten", "xa = (s * scales[:, None])", "xa = (s * 1.0)"),
    ("a share of K is left out", "tl.static_range(SPLIT):", "tl.static_range(SPLIT - 1):"),
    ("shares of K overlap", "steps * (share + 1) // SPLIT", "steps * (share + 2) // SPLIT"),
    ("spans of K overlap", "tl.minimum((span + 1) * SHRINK_K, K)", "tl.minimum((span + 2) * SHRINK_K, K)"),
    ("a span of K is left out", "for _ in range(0, spans):", "for _ in range(0, 1):"),
    ("parts of XA overlap", "part_step = tl.cast(stride_sm, tl.int64) * BLOCK_M", "part_step = tl.cast(stride_sm, tl.int64) * (BLOCK_M // 16)"),
    ("planes of tiles overlap", "tl.cast(tile, tl.int64) * (SPLIT + 1)", "tl.cast(tile, tl.int64) * SPLIT"),
    ("bias is added twice", "y += bias.to(tl.float32)[None, :]", "y += bias.to(tl.float32)[None, :] * 2"),
    ("the last rank is not made", "mask_s = mine[:, None] & (offs_r < rank)[None, :]", "mask_s = mine[:, None] & (offs_r < rank - 1)[None, :]"),
    ("the last rank is skipped", "mask_r = offs_r < rank\n", "mask_r = offs_r < rank - 1\n"),
    ("ranks of the next slot are read", "mask_r = offs_r < rank\n", "mask_r = offs_r < BLOCK_R\n"),
    ("only the first block of ranks", "rank - first_rank, first_rank", "rank - first_rank, 0 * first_rank"),
    ("every slot starts at the first row", "start + first_rank, rank", "first_rank, rank"),
    ("rows take what is not finite from another slot", "low = tl.where(mine[:, None], low_rank_dot(", "low = tl.where(mask_m[:, None], low_rank_dot("),
    ("a row without an adapter takes the first slot's", "ranks = tl.where(known, tl.maximum(ranks, 0), 0)", "ranks = tl.maximum(ranks, 0)"),
    ("an id that names no slot is looked up", "slots = tl.where(known, ids, 0)", "slots = ids"),
    ("a tile's last column is not written", "mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]", "mask = (offs_m < M)[:, None] & (offs_n < N - 1)[None, :]"),
    ("rows are written past the end", "mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]", "mask = (offs_m < M + 1)[:, None] & (offs_n < N)[None, :]"),
    ("one K step short", "for k in range(first, last, BLOCK_K):", "for k in range(first, last - BLOCK_K, BLOCK_K):"),
    ("K is read past the end", "mask=mask_n[None, :] & mask_k[:, None], other=0.0)", "mask=mask_n[None, :], other=0.0)"),
    ("the accumulator is not carried", "acc = low_rank_dot(p, q, acc, PRECISION)", "acc = low_rank_dot(p, q, acc * 0, PRECISION)"),
    ("the accumulator is bf16", "acc, PRECISION)\n        p_ptrs", "acc, PRECISION).to(tl.bfloat16).to(tl.float32)\n        p_ptrs"),
    ("a 32-bit row offset", "offs_m[:, None].to(tl.int64) * stride_pm", "offs_m[:, None] * stride_pm"),
    ("a low-rank plane is not written", "if blocks > 0:", "if blocks > 99:"),
    ("Y is made before the low-rank term is there", "expected = SPLIT + LOWS * (adapter_programs > 0).to(tl.int32)", "expected = SPLIT"),
    ("a tile's count stays", "tl.atomic_xchg(count_ptr + tile, 0, sem=\"relaxed\")", "pass"),
    ("a block's count stays", "tl.atomic_xchg(block_counts + block, 0, sem=\"relaxed\")", "pass"),
    ("the count of tasks stays", "tl.atomic_xchg(counters_ptr, 0, sem=\"relaxed\")", "pass"),
    ("nobody is the last adapter program", "== adapter_programs - 1:", "== adapter_programs:"),
]  # fmt: skip


def judge(modules, device):
    """Two problems, one of them with far-apart rows and a slot that is not finite; twice each, for what a launch leaves, in two orders."""
    decode, workspace, tuning = modules
    config = tuning.DecodeConfig(16, 64, 128, num_warps=4, num_stages=2, SPLIT=2)
    for M, dtype, far in ((7, torch.float32, False), (5, torch.bfloat16, True)):
        ids = torch.tensor([2, 2, 0, -1, 3, 0, 9][:M], dtype=torch.int32, device=device)
        q = make_multi_problem(ids, 70, tuning.SHRINK_K + 40, [5, 0, 20, 4], dtype, pool_layout=True, gap=2)
        expected, true, X, slots, judged = multi_plain(q).Y, multi_truth(q).Y, q.X, q.slots, torch.ones_like(ids) > 0
        if far:
            memory = torch.empty((M - 1) * 2**30 + X.shape[1], dtype=dtype, device=device)
            X = memory.as_strided(X.shape, (2**30, 1)).copy_(X)
            slots = slots._replace(B=slots.B.clone())
            slots.B[:, int(slots.starts[3])] = float("nan")
            judged = ids != 3
        for order in (0, 5):
            if device == "cpu":
                interpreter.order(order)
            with poison():
                Y = decode.multi_decode(X, q.W, slots, ids, q.bias, config, 3)
            assert_close(Y[judged], expected[judged], true[judged], what="Y")
            assert not any(w.counters.any() for w in workspace._workspaces.values()), "counters are left"


def test_the_copy_itself_is_right(kernels_with, device):
    judge(kernels_with(MODULES), device)


@pytest.mark.sampled(10)
@pytest.mark.parametrize(("what", "text", "replacement"), BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_caught(what, text, replacement, kernels_with, device):
    modules = kernels_with(MODULES, "multi/decode.py", text, replacement)
    with pytest.raises(
        Exception, match=r"plain PyTorch's|out of bounds|wraps|out-of-bounds|not finite|counters are left"
    ):
        judge(modules, device)
