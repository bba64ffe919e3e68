"""The emulator of Gluon: what it accepts is right in every order of events, and planted bugs do not get past it."""
# ruff: noqa: E501  (a bug is a line of source)

import dataclasses
import re
import sys

import pytest
import torch

from lora_kernels.kernels.common import Dropout
from lora_kernels.kernels.hopper.gluon_tiles import GluonConfig
from lora_kernels.kernels.persistent import one_launch_flags
from lora_kernels.reference import lora_linear_fwd, pack_keep, philox_keep_mask
from lora_kernels.testing import assert_close, make_problem, plain, poison, truth
from lora_kernels.testing.emulator import EmulatorError, emulate
from lora_kernels.testing.emulator.machine import Machine

SEEDS = range(8)
RING, FORWARD, BACKWARD = "hopper.gluon_ring", "hopper.gluon", "hopper.gluon_bwd"
PUBLISHED = "            gl.store(kept_ptr + rows * BLOCK_R + offs_r, xa)\n"
JOINED = "            block_barrier()  # every thread's part of the block is written before one thread releases it\n"
X_WORDS = "x_words = _keep_words(keep_ptr, stride_keep, row + m + ROWS, col,"

# (what, file, text, replacement); the first occurrence is replaced
BUGS = [
    ("a slot is released one product too early", RING, "acc = warpgroup_mma_wait(1, (acc,))", "acc = warpgroup_mma_wait(2, (acc,))"),
    ("the slot in use is released", RING, "(step + STAGES - 1) % STAGES), count=1, pred=k > 0)", "step % STAGES), count=1)"),
    ("a slot is never released", RING, "    mbarrier.arrive(empty.index(slot), count=1)\n", ""),
    ("a slot is released twice", RING, "    mbarrier.arrive(empty.index(slot), count=1)\n", "    mbarrier.arrive(empty.index(slot), count=2)\n"),
    ("no wait for a slot to be empty", RING, "    mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)\n", ""),
    ("the wrong parity of empty", RING, "((step // STAGES) & 1) ^ 1", "(step // STAGES) & 1"),
    ("no wait for a slot to be full", RING, "    mbarrier.wait(full.index(slot), (step // STAGES) & 1)\n", ""),
    ("the wrong parity of full", RING, "mbarrier.wait(full.index(slot), (step // STAGES) & 1)", "mbarrier.wait(full.index(slot), ((step // STAGES) & 1) ^ 1)"),
    ("the parity of the step, not of the turn", RING, "mbarrier.wait(full.index(slot), (step // STAGES) & 1)", "mbarrier.wait(full.index(slot), step & 1)"),
    ("too few bytes are expected", RING, "P_desc.block_type.nbytes + Q_desc.block_type.nbytes", "P_desc.block_type.nbytes"),
    ("too many bytes are expected", RING, "P_desc.block_type.nbytes + Q_desc", "2 * P_desc.block_type.nbytes + Q_desc"),
    ("a box lands in the next slot", RING, "bar, view(qs.index(slot), Q_desc)", "bar, view(qs.index((slot + 1) % STAGES), Q_desc)"),
    ("a box of the wrong rows", RING, "row, k * STEP, col, k * STEP", "row, k * STEP, row, k * STEP"),
    ("a product's result is used before its wait", RING, "    acc = warpgroup_mma_wait(0, (acc,))\n    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)\n    mbarrier", "    acc = warpgroup_mma_wait(1, (acc,))\n    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)\n    mbarrier"),
    ("XA is read in X's layout", RING, "view(ss.index(slot), S_desc)", "ss.index(slot).slice(0, S_desc.block_type.shape[1], 1)"),
    ("the output buffer is overwritten", RING, "    tma.store_wait(0)\n    out", "    out"),
    ("no fence before the store", RING, "    fence_async_shared()\n", ""),
    ("the halves change places", RING, "row, col + HALF, HAS_BIAS", "row, col, HAS_BIAS"),
    ("bias past the end", RING, "mask=offs_n < N, other", "mask=offs_n < N + HALF_A_TILE, other"),
    ("the kernel ends before its stores", FORWARD, "    tma.store_wait(0)\n", ""),
    ("a tile is left out", FORWARD, "    for tile in range(gl.program_id(0), num_m * num_n,", "    for tile in range(gl.program_id(0), num_m * num_n - 1,"),
    ("the flag goes up before the stores", FORWARD, PUBLISHED + JOINED, JOINED + '            gl.atomic_xchg(ready_ptr + block, 1, sem="release")\n' + PUBLISHED),
    ("the flag goes up before all threads have stored", FORWARD, JOINED, ""),
    ("the flag releases nothing", FORWARD, 'block, 1, sem="release"', 'block, 1, sem="relaxed"'),
    ("the flag acquires nothing", FORWARD, '0, sem="acquire"', '0, sem="relaxed"'),
    ("nobody looks at the flag", FORWARD, '0, sem="acquire") == 0', '0, sem="acquire") == -1'),
    ("the flag of another row block", FORWARD, 'ready_ptr + pid_m, 0, sem="acquire"', 'ready_ptr + (pid_m + 1) % num_m, 0, sem="acquire"'),
    ("one reader too many is counted", FORWARD, "== num_n - 1", "== num_n"),
    ("one reader too few is counted", FORWARD, "== num_n - 1", "== num_n - 2"),
    ("the flag stays up", FORWARD, '            gl.atomic_xchg(ready_ptr + pid_m, 0, sem="relaxed")\n', ""),
    ("XA is waited for before it is made", FORWARD, "    if pid < xa_programs:\n        for block in range(pid, num_m", '    while gl.atomic_add(ready_ptr, 0, sem="acquire") == 0:\n        pass\n    if pid < xa_programs:\n        for block in range(pid, num_m'),
    ("no fence behind XA", FORWARD, "        fence_async_shared()\n", ""),
    ("no barrier behind XA's fence", FORWARD, "        block_barrier()  # every lane's part is there before one lane arrives\n", ""),
    ("XA's barrier stands before its fence", FORWARD, "        fence_async_shared()\n        block_barrier()", "        block_barrier()\n        fence_async_shared()"),
    ("a row block of XA is made twice", FORWARD, "X_desc, A_desc, block * BLOCK_M,", "X_desc, A_desc, block * 0,"),
    ("a piece of XA is not copied", FORWARD, "for m in gl.static_range(0, BLOCK_M, ROWS)", "for m in gl.static_range(0, BLOCK_M - ROWS, ROWS)"),
    ("dX forgets the mask", BACKWARD, "acc = _masked(acc * factor, words, cube)", "acc = acc * factor"),
    ("dX is masked by another tile's bits", BACKWARD, "            words = _keep_words(keep_ptr, stride_keep, pid_m", "            words = _keep_words(keep_ptr, stride_keep, 0 * pid_m"),
    ("dA forgets the mask", BACKWARD, "x.store(_masked(x.load(lines), x_words, x_cube))", "x.store(x.load(lines))"),
    ("dA's second box is masked by the first one's bits", BACKWARD, X_WORDS, X_WORDS.replace("row + m + ROWS", "row")),
    ("no fence behind the masked X", BACKWARD, "                    fence_async_shared()\n", ""),
    ("dA of the wrong rows of dYB", BACKWARD, "fill(rows_desc, X_desc, row + m, 0,", "fill(rows_desc, X_desc, row, 0,"),
    ("dA's parts on top of each other", BACKWARD, "row // BLOCK_M, gl.int64) * r", "row // BLOCK_M * 0, gl.int64) * r"),
    ("X's slot is given back before its product", BACKWARD, "                da = warpgroup_mma_wait(0, (da,))\n                mbarrier.arrive(empty.index(slot), count=1)\n", "                mbarrier.arrive(empty.index(slot), count=1)\n                da = warpgroup_mma_wait(0, (da,))\n"),
    ("dYB's slot is kept", BACKWARD, "            mbarrier.arrive(empty.index(slot), count=1)\n            if DROPOUT", "            if DROPOUT"),
    ("the K loop ends before its last product", RING, "    acc = warpgroup_mma_wait(0, (acc,))\n    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)\n    return", "    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)\n    return"),
]  # fmt: skip


@pytest.fixture
def gluon_with(kernels_with):
    """gluon_extend, gluon_one_launch and gluon_dx of a copy of our kernels, with one text replaced once."""

    def plant(file="", text="", replacement=""):
        replacement = replacement.replace("HALF_A_TILE", "half.shape[1]")
        forward, backward = kernels_with(
            (FORWARD, BACKWARD), f"{file.replace('.', '/')}.py" if file else "", text, replacement, 1
        )
        return forward.gluon_extend, forward.gluon_one_launch, backward.gluon_dx

    return plant


def judge(kernels, only, seed):
    """Forward and backward on a problem of several tiles, steps and programs; ``only`` the one that a bug is in."""
    extend, one_launch, dx = kernels
    M, N, K, p = 136, 120, 136, 0.25
    q = make_problem(M, N, K, 20, torch.bfloat16, dropout_p=p)
    config = GluonConfig(128 if only == BACKWARD else 64, 64, 64, num_warps=4, STAGES=2 + seed % 2)
    undropped = dataclasses.replace(q, p=0.0)
    with poison():
        _, XA = lora_linear_fwd(q.X, q.W, q.A, q.B, None, q.scaling)
        if only != BACKWARD:
            expected, true = plain(undropped).Y, truth(undropped).Y
            flags = one_launch_flags(-(-M // 64), torch.device("cpu"))
            with emulate(seed), pytest.MonkeyPatch.context() as patch:
                assert_close(extend(q.X, q.W, XA, q.B, q.bias, config, 4), expected, true, what="gluon_extend")
                patch.setattr(sys.modules[one_launch.__module__], "one_launch_flags", lambda *_: flags)
                Y, _ = one_launch(q.X, q.W, q.A, q.B, q.bias, q.scaling, config, 4)
                assert_close(Y, expected, true, what="gluon_one_launch")
            assert not flags.any(), "flags not put back"
        if only != FORWARD:
            keep = philox_keep_mask(q.seed, p, M, K)
            dYB = (q.scaling * (q.dY @ q.B)).to(q.X.dtype)
            with emulate(seed):
                dX, dA = dx(q.dY, q.W, dYB, q.A, q.X, Dropout(p, q.seed, pack_keep(keep)), config, 3)
            assert_close(dX, plain(q, keep).dX, truth(q, keep).dX, what="dX")
            assert_close(dA, plain(q, keep).dA, truth(q, keep).dA, what="dA")


def judge_all(kernels, only):
    """In many orders of events: what is not caught in one may be in another."""
    for seed in SEEDS:
        judge(kernels, only, seed)


CAUGHT = (
    r"plain PyTorch's|not finite|deadlock|flags not put back|more arrivals|out of bounds|another one stored|under way"
)


@pytest.mark.timeout(1200)
def test_the_copy_itself_is_right(gluon_with):
    kernels = gluon_with()
    for only in (FORWARD, BACKWARD):
        judge_all(kernels, only)


@pytest.mark.sampled(7)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("what", "file", "text", "replacement"), BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_caught(what, file, text, replacement, gluon_with):
    kernels = gluon_with(file, text, replacement)
    with pytest.raises((AssertionError, EmulatorError), match=CAUGHT):
        judge_all(kernels, file)


def test_a_deadlock_says_who_waits_where(gluon_with):
    kernels = gluon_with(RING, "    mbarrier.arrive(empty.index(slot), count=1)\n", "")
    with pytest.raises(EmulatorError) as caught:
        judge(kernels, FORWARD, 0)
    said = str(caught.value)
    assert re.search(r"_extend_producer of program \d: phase \d of mbarrier .* at .*gluon_ring.py:\d+ claim", said)
    assert re.search(r"program \d: phase \d of mbarrier .* gluon_ring.py:\d+ await_full", said)


def test_a_seed_is_one_order_of_events():
    """What goes wrong with a seed goes wrong again with it."""
    draws = []
    for seed in (5, 5, 6):
        machine = Machine(seed)
        draws.append([machine.eager, machine.sticky, machine.random.random()])
    assert draws[0] == draws[1] != draws[2]
