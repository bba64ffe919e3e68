"""The TMA kernels against fp64 by the error rule, their flags, and what the planner says of them."""

import dataclasses
import itertools

import pytest
import torch

from lora_kernels import ops
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.kernels.chip import CHIPS
from lora_kernels.kernels.hopper import tma as sm90_linear
from lora_kernels.kernels.hopper.tma import one_launch, tma_extend
from lora_kernels.kernels.persistent import one_launch_flags
from lora_kernels.kernels.tiles import TmaConfig, is_valid, tma_config
from lora_kernels.planning import choose as plan
from lora_kernels.planning import plans as variants
from lora_kernels.planning.cost import CallShape
from lora_kernels.reference import lora_linear_fwd, philox_keep_mask
from lora_kernels.testing import assert_close, make_problem, plain, poison, truth

H100 = CHIPS["sm_90"]
SMALL = TmaConfig(64, 64, 64, num_warps=4, num_stages=2, RANK_STEP=32)  # several tiles, steps and steps of ranks
DTYPES = (torch.bfloat16,)  # float16 is refused: its low-rank operands are float32
SIZES = [(130, 96, 128), (200, 160, 192), (64, 64, 64), (1, 8, 8), (65, 72, 200), (257, 200, 40)]


@pytest.fixture
def flags(monkeypatch):
    """Every pair of flags that launches took."""
    taken = []

    def spy(num_m, device):
        taken.append(one_launch_flags(num_m, device))
        return taken[-1]

    monkeypatch.setattr(sm90_linear, "one_launch_flags", spy)
    return taken


def run(kernel, q, config=SMALL, units=3):
    """Y and XA in memory that holds NaN until it is written."""
    with poison():
        if kernel == "one_launch":
            return one_launch(q.X, q.W, q.A, q.B, q.bias, q.scaling, config, units)
        _, XA = lora_linear_fwd(q.X, q.W, q.A, q.B, None, q.scaling)
        return tma_extend(q.X, q.W, XA, q.B, q.bias, config, units), XA


def check(Y, XA, q):
    assert_close(Y, plain(q).Y, truth(q).Y, what="Y")
    exact = q.scaling * (q.X.double() @ q.A.double().mT)
    assert XA.shape == exact.shape
    assert XA.is_contiguous()
    assert_close(XA, (q.scaling * (q.X @ q.A.to(q.X.dtype).mT)).to(q.X.dtype), exact, what="XA")


@pytest.mark.sampled(4)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kernel", ["tma_extend", "one_launch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "K"), SIZES)
def test_sizes(M, N, K, dtype, kernel, device, flags):
    q = make_problem(M, N, K, 8, dtype, device)
    check(*run(kernel, q), q)
    assert not any(taken.any() for taken in flags)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kernel", ["tma_extend", "one_launch"])
@pytest.mark.parametrize("adapters", [torch.float32, None], ids=["float32", "same"])
@pytest.mark.parametrize("r", [1, 8, 16, 17, 64])
def test_ranks(r, adapters, kernel, device):
    q = make_problem(130, 96, 128, r, torch.bfloat16, device, bias=r % 2 == 0, adapter_dtype=adapters)
    check(*run(kernel, q), q)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kernel", ["tma_extend", "one_launch"])
def test_the_configuration_that_ships(kernel, device):
    q = make_problem(140, 272, 136, 16, torch.bfloat16, device)
    for M, N in ((140, 272), (8192, 4096), (64, 272)):
        config = tma_config(M, N, 16, q.X.dtype, H100)
        check(*run(kernel, q, config, H100.units), q)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kernel", ["tma_extend", "one_launch"])
def test_strided_operands(kernel, device):
    """Rows of X and W with gaps of NaN, A and B transposed, every second element of a bias."""

    def gapped(t):
        return t.new_full((t.shape[0], t.shape[1] + 24), float("nan")).narrow(1, 8, t.shape[1]).copy_(t)

    q = make_problem(70, 80, 72, 5, torch.bfloat16, device)
    bias = torch.stack([q.bias, torch.full_like(q.bias, float("nan"))], 1)[:, 0]
    turned = {"A": q.A.mT.contiguous().mT, "B": q.B.mT.contiguous().mT}
    check(*run(kernel, dataclasses.replace(q, X=gapped(q.X), W=gapped(q.W), bias=bias, **turned)), q)


@pytest.mark.sampled(5)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("units", [1, 2, 7, 100])
def test_same_bits_for_any_number_of_programs_and_again(units, device, flags):
    q = make_problem(200, 160, 192, 16, torch.bfloat16, device)
    first = run("one_launch", q, units=1)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(run("one_launch", q, units=units), first, strict=True))
    assert not any(taken.any() for taken in flags)


@pytest.mark.timeout(1200)
def test_both_plans_agree_to_the_bit(device):
    """The same products in the same order; only who makes XA differs."""
    q = make_problem(130, 96, 128, 16, torch.bfloat16, device)
    Y, XA = run("one_launch", q)
    assert torch.equal(tma_extend(q.X, q.W, XA, q.B, q.bias, SMALL, 3), Y)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_through_the_operator(p, device):
    q = make_problem(70, 96, 128, 8, torch.bfloat16, device, dropout_p=p)
    seed = q.seed if p else None
    keep = philox_keep_mask(q.seed, p, 70, 128) if p else None
    for name in ("tma_extend", "one_launch")[: 1 if p else 2]:
        Y, *_ = ops.lora_linear_fwd(q.X, q.W, q.A, q.B, q.bias, q.scaling, p, seed, f"triton:{name}")
        assert_close(Y, plain(q, keep).Y, truth(q, keep).Y, what=name)


def test_what_descriptors_cannot_take(device):
    q = make_problem(16, 16, 16, 4, torch.bfloat16, device)
    wide = torch.zeros(16, 40, dtype=torch.bfloat16, device=device)
    for X, why in (
        (wide[:, :32:2], "stride 2"),
        (wide[:, :36].reshape(-1)[: 16 * 20].view(16, 20)[:, :16], "40 bytes apart"),
        (wide[:, 1:17], "not a multiple of 16"),
    ):
        with pytest.raises(BackendUnavailableError, match=why):
            one_launch(X, q.W, q.A, q.B, q.bias, 1.0, SMALL, 1)
    assert tma_extend(wide[:1, 8:24], q.W, wide[:1, :4], q.B, q.bias, SMALL, 1).shape == (1, 16)


LAYER = CallShape("fwd", 8192, 4096, 4096, 16, torch.bfloat16)
TMA_PLANS = ("tma_extend", "one_launch")


def refusal(name, chip=H100, **changes):
    problem = dataclasses.replace(LAYER, **changes)
    return next(p for p in plan.candidates(problem, chip) if p.name == name).refused


@pytest.mark.parametrize("name", TMA_PLANS)
def test_refusals_say_why(name):
    assert refusal(name) is None
    assert "no TMA" in refusal(name, CHIPS["sm_80"])
    assert "no TMA" in refusal(name, CHIPS["gfx942"])
    assert "16-bit" in refusal(name, dtype=torch.float32)
    assert "above 64" in refusal(name, r=65)
    assert "K=4097" in refusal(name, K=4097)
    assert "N=4100" in refusal(name, N=4100)
    assert ("forward" in (refusal(name, op="bwd") or "")) == (name == "one_launch")
    assert (refusal(name, dropout=True) is None) == (name == "tma_extend")


def test_never_chosen_unless_named():
    """Predicted the fastest for many a shape, and still not taken: no GPU has run them."""
    fastest = 0
    for M, N, r, op in itertools.product((1, 64, 2048, 8192), (1024, 14336), (8, 64), ("fwd", "bwd")):
        problem = dataclasses.replace(LAYER, M=M, N=N, r=r, op=op)
        chosen = plan.choose(problem, H100)
        assert chosen.name in plan.PLANS
        fastest += min(plan.candidates(problem, H100), key=lambda p: p.seconds).opt_in
    assert fastest
    for name in TMA_PLANS:
        named = plan.choose(LAYER, H100, name)
        assert named.name == name
        assert "never chosen unless named" in str(named)
        assert plan.choose(dataclasses.replace(LAYER, op="bwd"), H100, name).name == "tma_extend"
        assert plan.split_name(f"triton:{name}") == ("triton", name)


def test_launches_and_arithmetic():
    M, N, K, r = LAYER.M, LAYER.N, LAYER.K, LAYER.r
    for name, kernels in (("tma_extend", ["shrink", "tma_extend"]), ("one_launch", ["one_launch"])):
        launches = variants.launches(name, LAYER)
        assert [launch.kernel for launch in launches] == kernels
        assert sum(launch.flop for launch in launches) == 2 * M * N * (K + r) + 2 * M * K * r


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
def test_every_default_is_valid(arch):
    for M, N, r, dtype in itertools.product((1, 128, 1000, 8192), (8, 256, 4096), (1, 16, 17, 32, 33, 64), DTYPES):
        config = tma_config(M, N, r, dtype, CHIPS[arch])
        assert is_valid(config, dtype, r, CHIPS[arch]) is None


def test_configurations_that_are_known_to_fail_are_refused():
    deep = TmaConfig(128, 256, 64, num_warps=8, num_stages=4, FLATTEN=True)
    assert "shared memory" in is_valid(deep, torch.bfloat16, 16, H100)
    flat = dataclasses.replace(deep, num_stages=3)
    assert is_valid(flat, torch.bfloat16, 16, H100) is None
    assert "shared memory" in is_valid(flat, torch.bfloat16, 64, H100)
    assert "flattened" in is_valid(flat, torch.bfloat16, 16, CHIPS["sm_100"])
    assert "float32 XA and dYB" in is_valid(flat, torch.float16, 16, H100)
