"""The plans for mixed batches, whole, against fp64 by the error rule: default tiles, on a GPU or interpreted."""

from dataclasses import replace

import pytest
import torch

from lora_kernels.kernels.chip import CHIPS
from lora_kernels.kernels.multi import launchers as multi_launchers
from lora_kernels.kernels.multi.launchers import multi_lora_linear_bwd, multi_lora_linear_fwd
from lora_kernels.kernels.tiles import GemmConfig
from lora_kernels.testing import Pool, assert_close, poison
from lora_kernels.testing.multi import MultiResults, fuzz_mixes, make_multi_problem, mix_ids, multi_plain, multi_truth
from lora_kernels.testing.multi import problem_of as problem
from lora_kernels.testing.multi_cases import REGIMES, misplaced

PLANS = ("eager", "extend")
BY_NAME = {regime.name: regime for regime in REGIMES}
WHOLE = ("bf16", "fp32", "half", "rank 150", "one row", "pool", "float32 pool", "strided fp32", "no adapter at all")


def run(p, plan, arch="sm_90", needs=(True,) * 4, **options):
    """In memory that holds NaN until it is written."""
    chip = CHIPS[arch]
    with poison():
        Y, XA = multi_lora_linear_fwd(p.X, p.W, p.slots, p.ids, p.bias, plan, chip, **options)
        return MultiResults(Y, *multi_lora_linear_bwd(p.dY, p.X, p.W, p.slots, p.ids, XA, needs, plan, chip))


def check(p, plan, close=assert_close, got=None, **how):
    got, plain, truth = got or run(p, plan, **how), multi_plain(p), multi_truth(p)
    for name in MultiResults._fields:
        if p.bias is not None or name != "dbias":
            close(getattr(got, name), getattr(plain, name), getattr(truth, name), what=name, dtype=p.X.dtype)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", WHOLE)
def test_regimes(name, plan, device):
    check(BY_NAME[name].problem(device), plan)


@pytest.mark.parametrize("plan", PLANS)
def test_strided_in_16_bit(plan, device):
    p = BY_NAME["strided"].problem(device)
    if plan == "eager" and device == "cpu":  # oneDNN's 16-bit product reads the gap behind a padded row
        p = replace(p, X=p.X.contiguous(), dY=p.dY.contiguous(), W=p.W.contiguous())
    check(p, plan)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("arch", ["sm_86", "gfx942"])
def test_tiles_of_other_chips(arch, plan, device):
    p = make_multi_problem(mix_ids("uniform", 33, 3, device=device), 24, 40, (8, 0, 17), torch.float16)
    check(p, plan, arch=arch)


@pytest.mark.parametrize("plan", PLANS)
def test_a_rank_that_points_outside_reads_nothing_there(plan, device):
    p = make_multi_problem(mix_ids("distinct", 16, 8, device=device), 24, 40, (5, 16, 3), torch.float32)
    p = replace(p, ids=torch.where(p.ids == 6, -1, p.ids))
    given, meant = misplaced(p)
    check(replace(p, slots=meant), plan, got=run(replace(p, slots=given), plan))


@pytest.mark.parametrize("plan", PLANS)
def test_what_is_not_needed_is_not_made(plan, device, monkeypatch):
    p = make_multi_problem(mix_ids("uniform", 17, 3, device=device), 24, 40, (8, 0, 5), torch.float32)
    all_four = run(p, plan)
    for needs in ((True, False, False, False), (False, True, False, True), (False, False, True, False), (False,) * 4):
        got = run(p, plan, needs=needs)
        for name, need in zip(("dX", "dA", "dB", "dbias"), needs, strict=True):
            made = getattr(got, name)
            assert torch.equal(made, getattr(all_four, name)) if need else made is None
    monkeypatch.setattr(multi_launchers, "multi_shrink", lambda *args: pytest.fail("dB alone asks for no dYB"))
    needs = (False, False, True, False)
    multi_lora_linear_bwd(p.dY, p.X, p.W, p.slots, p.ids, p.X.new_zeros(17, 8), needs, plan, CHIPS["sm_90"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("plan", PLANS)
def test_into_what_is_given(plan, bias, device):
    p = make_multi_problem(mix_ids("uniform", 17, 3, device=device), 24, 40, (8, 0, 5), torch.float32, bias=bias)
    rows = torch.full((17, 30), float("nan"), device=device)
    out = rows[:, :24]
    Y = run(p, plan, out=out).Y
    assert Y is out
    torch.testing.assert_close(Y, run(p, plan).Y)
    assert rows[:, 24:].isnan().all()


def test_tiles_are_taken(device, monkeypatch):
    p, taken = BY_NAME["one row"].problem(device), []
    monkeypatch.setattr(multi_launchers, "multi_extend", lambda *args: taken.append(args[7]))
    tiles = GemmConfig(16, 32, 32, num_warps=4, num_stages=1)
    multi_lora_linear_fwd(p.X, p.W, p.slots, p.ids, p.bias, "extend", CHIPS["sm_90"], tiles)
    assert taken == [tiles]


def test_ids_of_any_stride(device):
    p = make_multi_problem(mix_ids("uniform", 17, 3, device=device), 24, 40, (8, 0, 5), torch.float32)
    for plan in PLANS:
        spaced = replace(p, ids=p.ids.repeat_interleave(2)[::2])
        assert all(torch.equal(a, b) for a, b in zip(run(spaced, plan), run(p, plan), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_fuzz(plan, device):
    pool = Pool()
    for case in fuzz_mixes(100, seed=24):
        check(problem(case), plan, pool.assert_close)
    pool.close()
