"""Bugs planted into a copy of the kernels for mixed batches; each must turn the checks red, the copy itself stays green."""
# ruff: noqa: E501  (a bug is a line of source)

from dataclasses import replace

import pytest
import torch

from lora_kernels.kernels.chip import CHIPS
from lora_kernels.kernels.tiles import GemmConfig, ShrinkConfig, SplitConfig
from lora_kernels.testing import assert_close, poison
from lora_kernels.testing.multi import make_multi_problem, multi_plain, multi_truth
from lora_kernels.testing.multi_cases import far_apart, misplaced

MODULES = ("multi.launchers", "multi.grads")

# (what, file, text, replacement)
BUGS = [
    ("rows past the last have slot 0", "multi/shrink.py", "mask=mask_m, other=-1)", "mask=mask_m, other=0)"),
    ("a start below zero is used", "multi/shrink.py", "inside = (start >= 0) & (start < R)", "inside = start < R"),
    ("a rank goes on past the buffers", "multi/shrink.py", "tl.minimum(tl.minimum(rank, max_rank), R - start)", "tl.minimum(rank, max_rank)"),
    ("a slot takes the rows of earlier ones", "multi/shrink.py", "mine = ids == slot", "mine = ids <= slot"),
    ("the last rank is skipped", "multi/shrink.py", "mask_r = offs_r < rank", "mask_r = offs_r < rank - 1"),
    ("scaling is forgotten", "multi/shrink.py", "acc * tl.load(scalings_ptr + slot)", "acc"),
    ("every slot has the first one's scaling", "multi/shrink.py", "tl.load(scalings_ptr + slot)", "tl.load(scalings_ptr)"),
    ("every slot has the first rows of A", "multi/shrink.py", "(start + offs_r)[None, :]", "offs_r[None, :]"),
    ("a column too many is read", "multi/shrink.py", "mask_c = offs_c < C - k * BLOCK_K", "mask_c = offs_c <= C - k * BLOCK_K"),
    ("XA is written past the last row", "multi/shrink.py", "mask=mask_m[:, None] & (offs_r < max_rank)[None, :])", "mask=(offs_r < max_rank)[None, :])"),
    ("XA is added, not selected", "multi/shrink.py", "s = tl.where(mine[:, None], acc * tl.load(scalings_ptr + slot), s)", "s += acc * tl.load(scalings_ptr + slot)"),
    ("a 32-bit row of X", "multi/shrink.py", "P_ptr + offs_m[:, None].to(tl.int64) * stride_pm", "P_ptr + offs_m[:, None] * stride_pm"),
    ("every block of ranks is the first", "multi/shrink.py", "first_rank = tl.program_id(1) * BLOCK_R", "first_rank = tl.program_id(1) * 0"),
    ("another slot's rows are not left out", "multi/extend.py", "s = tl.load(s_ptrs, mask=mine[:, None] & (offs_r < max_rank)[None, :]", "s = tl.load(s_ptrs, mask=(offs_m < 10**6)[:, None] & (offs_r < max_rank)[None, :]"),
    ("zeros times NaN reach the others' rows", "multi/extend.py", "tl.where(finite, t, 0.0)", "t"),
    ("what is not finite is lost", "multi/extend.py", "acc = tl.where(mine[:, None] & (lost > 0)[None, :], float(\"nan\"), acc)", "acc = acc"),
    ("ranks beyond a tile are left out", "multi/extend.py", "tl.range(0, rank, BLOCK_R,", "tl.range(0, tl.minimum(rank, BLOCK_R), BLOCK_R,"),
    ("every slot has the first columns of B", "multi/extend.py", "t_rows = (start + offs_r)[:, None]", "t_rows = offs_r[:, None]"),
    ("B is read past a slot's rank", "multi/extend.py", "mask=mask_n[None, :] & (offs_r < rank)[:, None]", "mask=mask_n[None, :]"),
    ("XA is read past max_rank", "multi/extend.py", "mask=mine[:, None] & (offs_r < max_rank)[None, :]", "mask=mine[:, None]"),
    ("only a tile's first slot counts", "multi/extend.py", "slot = next_slot(ids, slot, L)\n    return acc", "slot = L\n    return acc"),
    ("slot 0 is left out", "multi/extend.py", "ranks_ptr, next_slot(ids, -1, L), offs_m", "ranks_ptr, next_slot(ids, 0, L), offs_m"),
    ("rows without an adapter are patched", "multi/extend.py", "mask = ((ids >= 0) & (ids < L))[:, None]", "mask = (ids < L)[:, None]"),
    ("the base is forgotten", "multi/extend.py", "y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32) + acc", "y = acc"),
    ("bias is forgotten", "multi/extend.py", "acc += tl.load(bias_ptr", "acc += 0 * tl.load(bias_ptr"),
    ("rows and columns of tiles are swapped", "multi/extend.py", "pid_m, pid_n = tile_order(", "pid_n, pid_m = tile_order("),
    ("rows of no slot go before the first", "multi/grads.py", "((ids >= 0) & (ids < slot))", "(ids < slot)"),
    ("rows begin one late", "multi/grads.py", "tl.cumsum(one, axis=0) - one", "tl.cumsum(one, axis=0)"),
    ("a later block of ids begins anew", "multi/grads.py", "end += tl.sum(one, axis=0)", "end = begin + tl.sum(one, axis=0)"),
    ("the next slot's first row is summed too", "multi/grads.py", "mask_i = offs_i < last", "mask_i = offs_i <= last"),
    ("a span's columns are read past the end", "multi/grads.py", "mask=mask_i[:, None] & mask_c[None, :]", "mask=mask_i[:, None]"),
    ("every slot has the first rows of dA", "multi/grads.py", "out_rows = (start + offs_r)", "out_rows = (offs_r)"),
    ("a slot writes into its neighbour", "multi/grads.py", "mask=mask_c[:, None] & (offs_r < rank)[None, :]", "mask=mask_c[:, None]"),
    ("spans overlap", "multi/grads.py", "tl.minimum(span * length + length, count)", "count"),
    ("the last span is left out", "multi/grads.py", "for _ in range(0, used):", "for _ in range(0, tl.maximum(used - 1, 1)):"),
    ("spans without a program are summed", "multi/grads.py", "used = tl.cdiv(count, span_length(count, spans, BLOCK_M))", "used = spans"),
    ("dA is put down as its transpose", "multi/grads.py", "(start + offs // C) * stride_or + (offs % C) * stride_oc", "(start + offs // C) * stride_oc + (offs % C) * stride_or"),
    ("dB's last block is left out", "multi/grads.py", "block -= tl.cdiv(K, BLOCK_N)", "block -= tl.cdiv(K, BLOCK_N) + 1"),
    ("a 32-bit row of dY", "multi/grads.py", "other=0)[:, None].to(tl.int64)", "other=0)[:, None]"),
    ("dX forgets the low-rank term", "multi/launchers.py", "multi_extend(dY, W.t(), dYB, slots.A.t()", "multi_extend(dY, W.t(), dYB * 0, slots.A.t()"),
    ("XA and dYB change places", "multi/launchers.py", "XA if need_b else None, dYB if need_a else None", "dYB if need_b else None, XA if need_a else None"),
    ("the forward takes unscaled XA", "multi/launchers.py", "return multi_extend(X, W, XA, slots.B", "return multi_extend(X, W, XA / slots.scalings[0], slots.B"),
]  # fmt: skip


def small(modules):
    """Tiles of which the problems here have several, and rows of ids in several steps."""
    launchers, grads = modules
    launchers.multi_shrink_config = lambda *args: ShrinkConfig(16, 32, num_warps=4, num_stages=2)
    launchers.multi_extend_config = lambda *args: GemmConfig(16, 64, 32, num_warps=4, num_stages=2)
    launchers.multi_expand_config = launchers.multi_extend_config
    launchers.multi_grads_config = lambda *args: SplitConfig(16, 64, 16, num_warps=4, num_stages=1)
    grads.ROWS_BLOCK, grads.SUM_BLOCK = 16, 1024
    return launchers


def run(launchers, p, plan="extend", spans=1, needs=(True,) * 4):
    launchers.multi_spans = lambda *args: spans
    with poison():
        Y, XA = launchers.multi_lora_linear_fwd(p.X, p.W, p.slots, p.ids, p.bias, plan, CHIPS["sm_90"])
        args = p.dY, p.X, p.W, p.slots, p.ids, XA, needs, plan, CHIPS["sm_90"]
        grads = zip(("dX", "dA", "dB", "dbias"), launchers.multi_lora_linear_bwd(*args), strict=True)
    return {"Y": Y} | {name: grad for name, grad in grads if grad is not None}


def compare(got, p):
    plain, truth = multi_plain(p), multi_truth(p)
    for name, value in got.items():
        assert_close(value, getattr(plain, name), getattr(truth, name), what=name, dtype=p.X.dtype)


def judge(modules, device):
    """Slots that point outside; one adapter that is not finite; rows far apart; both plans on a pool."""
    launchers = small(modules)
    # the slot of misplaced that shares rows of A with another is not used: gradients would be one sum
    ids = torch.tensor([0, 1, 2, 3, 4, 5, -1, 7, 4, 7], dtype=torch.int32, device=device)
    p = make_multi_problem(ids, 24, 20, (5, 17, 3), torch.float32)
    given, meant = misplaced(p)
    given, p = replace(p, slots=given), replace(p, slots=meant)
    compare(run(launchers, given), p)
    compare(run(launchers, given, "eager", needs=(False,) * 4), p)

    q = make_multi_problem(ids[:4], 4, 4, (2, 1, 1), torch.float16)
    near, far = (run(launchers, r) for r in (q, replace(q, X=far_apart(q.X), dY=far_apart(q.dY))))
    for name in ("Y", "dX", "dA", "dB"):
        assert torch.equal(near[name], far[name]), f"{name} wraps"

    ids = torch.tensor([2, 0, -1, 2, 2, 4, 2, 2, 1, 2, -7, 3, 2, 2, 0, 2] * 2, dtype=torch.int32, device=device)[:30]
    p = make_multi_problem(ids, 70, 41, (8, 0, 17, 3), torch.float32, pool_layout=True, gap=2)
    compare(run(launchers, p, spans=3), p)

    ids = torch.tensor([0, 1, 2] * 3, dtype=torch.int32, device=device)
    p = make_multi_problem(ids, 16, 24, (3, 4, 2), torch.float32)
    needs = (True, False, False, False)
    sound = run(launchers, p, needs=needs)
    p.slots.B[2, 5] = float("nan")  # XA stays finite
    assert not run(launchers, p, needs=needs)["Y"][ids == 1, 2].isfinite().any(), "NaN is lost: plain PyTorch's is not"
    p.slots.A[3:7] = p.slots.B[:, 3:7] = float("nan")
    broken = run(launchers, p, needs=needs)
    for name in ("Y", "dX"):
        assert broken[name][ids != 1].isfinite().all(), f"{name} is not finite in rows of other adapters"
        assert torch.equal(broken[name][ids != 1], sound[name][ids != 1])


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, which interprets
def test_the_copy_itself_is_right(kernels_with, device):
    judge(kernels_with(MODULES), device)


@pytest.mark.sampled(10)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize(("what", "file", "text", "replacement"), BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_caught(what, file, text, replacement, kernels_with, device):
    modules = kernels_with(MODULES, file, text, replacement)
    with pytest.raises(Exception, match=r"plain PyTorch's|out of bounds|wraps|out-of-bounds|not finite"):
        judge(modules, device)
