"""ptr_one_launch against fp64 by the error rule: any strides and sizes, its flags, its configurations."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from lora_kernels.kernels.chip import CHIPS
from lora_kernels.kernels.linear import one_launch
from lora_kernels.kernels.linear.one_launch import ptr_one_launch
from lora_kernels.kernels.persistent import one_launch_flags
from lora_kernels.kernels.tiles import PtrConfig, is_valid, ptr_one_launch_config, rank_block
from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.testing import MAGNITUDES, REGIMES, assert_close, fuzz_problems, make_problem, plain, poison, truth
from lora_kernels.testing.rule import Pool

SMALL = PtrConfig(32, 64, 32, num_warps=4, num_stages=2, XA_STAGES=2, RANK_STEP=16)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


@pytest.fixture
def flags(monkeypatch):
    """Every pair of flags that launches took."""
    taken = []

    def spy(num_m, device):
        taken.append(one_launch_flags(num_m, device))
        return taken[-1]

    monkeypatch.setattr(one_launch, "one_launch_flags", spy)
    return taken


def run(q, config=SMALL, units=3):
    """Y and XA in memory that holds NaN until it is written."""
    with poison():
        return ptr_one_launch(q.X, q.W, q.A, q.B, q.bias, q.scaling, config, units)


def check(q, close=assert_close, **options):
    Y, XA = run(q, **options)
    close(Y, plain(q).Y, truth(q).Y, what="Y")
    exact = q.scaling * (q.X.double() @ q.A.double().mT)
    low = low_rank_dtype(q.X.dtype)
    product = F.linear(q.X.contiguous().to(low), q.A.to(low).contiguous())
    assert XA.is_contiguous()
    close(XA, (q.scaling * product).to(low), exact, what="XA")


@pytest.mark.sampled(4)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", [r for r in REGIMES if r.M], ids=lambda regime: regime.name)
def test_regimes(regime, dtype, device, flags):
    r = min(regime.r, rank_block(dtype))
    check(make_problem(regime.M, regime.N, regime.K, r, dtype, device, strided=regime.strided))
    assert not any(taken.any() for taken in flags)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sizes", MAGNITUDES, ids=lambda sizes: sizes.name)
def test_sizes_beyond_float16_intermediates(sizes, device):
    check(make_problem(65, 72, 200, 16, torch.float16, device, adapter_dtype=torch.float32, magnitudes=sizes))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("adapters", [torch.float32, None], ids=["float32", "same"])
@pytest.mark.parametrize("r", [1, 16, 33, 64])
def test_ranks(r, adapters, device):
    check(make_problem(70, 72, 80, r, torch.bfloat16, device, bias=r % 2 == 0, adapter_dtype=adapters))


@pytest.mark.sampled(6)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_configurations_that_ship(arch, device):
    chip = CHIPS[arch]
    q = make_problem(136, 272, 72, 16, torch.float16, device)
    for M, wide in ((8192, True), (136, True), (136, False)):
        check(q, config=ptr_one_launch_config(M, 4096, 16, q.X.dtype, chip, wide), units=chip.units)


@pytest.mark.timeout(1200)
def test_same_bits_for_any_number_of_programs_and_again(device, flags):
    q = make_problem(150, 160, 72, 16, torch.bfloat16, device)
    first = run(q, units=1)
    for units in (2, 7, 100, 100):
        assert all(torch.equal(a, b) for a, b in zip(run(q, units=units), first, strict=True))
    assert len(flags) == 5
    assert not any(taken.any() for taken in flags)


@pytest.mark.timeout(1200)
def test_rows_beyond_2_31_elements(device):
    """Rows 2**30 elements apart in memory that is reserved, not touched: a 32-bit offset would wrap and trap."""
    q = make_problem(4, 4, 40, 3, torch.bfloat16, device)
    far = torch.empty(3 * 2**30 + 40, dtype=q.X.dtype, device=device).as_strided((4, 40), (2**30, 1))
    near, _ = run(q)
    Y, _ = ptr_one_launch(far.copy_(q.X), q.W, q.A, q.B, q.bias, q.scaling, SMALL, 2)
    assert torch.equal(Y, near)


@pytest.mark.timeout(1200)
def test_fuzz(device):
    pool = Pool()
    for i, case in enumerate(fuzz_problems(60, seed=11)):
        if case.M:
            q = make_problem(
                case.M, case.N, case.K, min(case.r, rank_block(case.dtype)), case.dtype, device,
                bias=case.bias, strided=case.strided, seed=i,
            )  # fmt: skip
            check(q, pool.assert_close, units=1 + i % 5)
    pool.close()


@pytest.mark.parametrize("arch", ARCHS)
def test_every_default_is_valid(arch):
    chip = CHIPS[arch]
    sizes = itertools.product((1, 64, 65, 1000, 8192), (8, 256, 4096), (1, 16, 17, 48, 57, 64), DTYPES, (True, False))
    for M, N, r, dtype, wide in sizes:
        r = min(r, rank_block(dtype))
        refusal = is_valid(ptr_one_launch_config(M, N, r, dtype, chip, wide), dtype, r, chip)
        if arch == "sm_100" and dtype == torch.float16:
            assert "tensor memory" in refusal
        else:
            assert refusal is None


def test_configurations_that_are_known_to_fail_are_refused():
    def why(config, r=16, dtype=torch.bfloat16, arch="sm_80"):
        return is_valid(config, dtype, r, CHIPS[arch])

    large = PtrConfig(128, 256, 32, num_warps=8, num_stages=4)
    assert why(large) is None
    assert "128x256" in why(large, dtype=torch.float16)
    assert "above 16" in why(large, 17, torch.float16)
    assert "spill" in why(large, 57)
    assert "spill" in why(large, dtype=torch.float32)
    assert why(large, 64, arch="sm_90") is None
    assert "spill" in why(large, 57, arch="sm_90")
    assert "shared memory" in why(PtrConfig(128, 256, 32, num_warps=8, num_stages=5), arch="sm_86")
    assert "above 64" in why(large, 65)
    assert "above 16" in why(SMALL, 17, torch.float32)
    assert "cp.async" in why(SMALL, arch="gfx942")
