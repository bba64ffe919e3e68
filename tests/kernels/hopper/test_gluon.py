"""The source of the Gluon kernels, run by the emulator, against fp64 by the error rule; bits, flags, orders."""

import dataclasses

import pytest
import torch

from lora_kernels.errors import BackendUnavailableError
from lora_kernels.kernels.chip import CHIPS
from lora_kernels.kernels.hopper import gluon as sm90_gluon
from lora_kernels.kernels.hopper.gluon import gluon_extend, gluon_one_launch
from lora_kernels.kernels.hopper.gluon_tiles import GluonConfig, gluon_config
from lora_kernels.kernels.persistent import one_launch_flags
from lora_kernels.reference import lora_linear_fwd
from lora_kernels.testing import assert_close, make_problem, plain, poison, truth
from lora_kernels.testing.emulator import emulate

SMALL = GluonConfig(64, 64, 64, num_warps=4, STAGES=3)  # several tiles, steps and turns of the ring
SIZES = [(130, 96, 128), (200, 160, 192), (64, 64, 64), (1, 8, 8), (65, 72, 200)]
KERNELS = ("gluon_extend", "gluon_one_launch")


@pytest.fixture
def flags(monkeypatch):
    """Every pair of flags that launches took."""
    taken = []

    def spy(num_m, device):
        taken.append(one_launch_flags(num_m, device))
        return taken[-1]

    monkeypatch.setattr(sm90_gluon, "one_launch_flags", spy)
    return taken


def run(kernel, q, config=SMALL, units=3, seed=0):
    """Y and XA in memory that holds NaN until it is written."""
    with poison(), emulate(seed):
        if kernel == "gluon_one_launch":
            return gluon_one_launch(q.X, q.W, q.A, q.B, q.bias, q.scaling, config, units)
        _, XA = lora_linear_fwd(q.X, q.W, q.A, q.B, None, q.scaling)
        return gluon_extend(q.X, q.W, XA, q.B, q.bias, config, units), XA


def check(Y, XA, q):
    assert_close(Y, plain(q).Y, truth(q).Y, what="Y")
    exact = q.scaling * (q.X.double() @ q.A.double().mT)
    assert XA.shape == exact.shape
    assert XA.is_contiguous()
    assert_close(XA, (q.scaling * (q.X @ q.A.to(q.X.dtype).mT)).to(q.X.dtype), exact, what="XA")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("M", "N", "K"), SIZES)
def test_sizes(M, N, K, kernel, flags):
    q = make_problem(M, N, K, 8, torch.bfloat16)
    check(*run(kernel, q), q)
    assert not any(taken.any() for taken in flags)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("adapters", [torch.float32, None], ids=["float32", "same"])
@pytest.mark.parametrize("r", [1, 16, 17, 33, 64])
def test_ranks(r, adapters, kernel):
    q = make_problem(130, 96, 128, r, torch.bfloat16, bias=r % 2 == 0, adapter_dtype=adapters)
    check(*run(kernel, q), q)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_configurations_that_ship(kernel):
    q = make_problem(140, 272, 136, 16, torch.bfloat16)
    for M in (40, 140, 8192):
        check(*run(kernel, q, gluon_config(M, 4096, 16, q.X.dtype, CHIPS["sm_90"])), q)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kernel", KERNELS)
def test_strided_operands(kernel):
    """Rows of X and W with gaps of NaN, A and B transposed, every second element of a bias."""

    def gapped(t):
        return t.new_full((t.shape[0], t.shape[1] + 24), float("nan")).narrow(1, 8, t.shape[1]).copy_(t)

    q = make_problem(70, 80, 72, 5, torch.bfloat16)
    bias = torch.stack([q.bias, torch.full_like(q.bias, float("nan"))], 1)[:, 0]
    turned = {"A": q.A.mT.contiguous().mT, "B": q.B.mT.contiguous().mT}
    check(*run(kernel, dataclasses.replace(q, X=gapped(q.X), W=gapped(q.W), bias=bias, **turned)), q)


@pytest.mark.sampled(4)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kernel", KERNELS)
def test_same_bits_in_every_order_of_events(kernel, flags):
    q = make_problem(200, 160, 192, 16, torch.bfloat16)
    first = run(kernel, q, units=1)
    for seed in range(12):
        config = dataclasses.replace(SMALL, STAGES=2 + seed % 3)
        again = run(kernel, q, config, units=(1, 2, 7, 100)[seed % 4], seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True)), seed
    assert not any(taken.any() for taken in flags)


@pytest.mark.timeout(1200)
def test_both_plans_agree_to_the_bit():
    """The same products in the same order; only who makes XA differs."""
    q = make_problem(130, 96, 128, 16, torch.bfloat16)
    Y, XA = run("gluon_one_launch", q)
    with emulate():
        assert torch.equal(gluon_extend(q.X, q.W, XA, q.B, q.bias, SMALL, 3), Y)


def test_what_descriptors_cannot_take():
    q = make_problem(16, 16, 16, 4, torch.bfloat16)
    wide = torch.zeros(16, 40, dtype=torch.bfloat16)
    for X, why in ((wide[:, :32:2], "stride 2"), (wide[:, 1:17], "not a multiple of 16")):
        with pytest.raises(BackendUnavailableError, match=why):
            gluon_one_launch(X, q.W, q.A, q.B, q.bias, 1.0, SMALL, 1)


def test_outside_of_the_emulator_the_interpreter_has_no_gluon(device):
    if device == "cpu":
        q = make_problem(16, 16, 16, 8, torch.bfloat16)
        with pytest.raises(BackendUnavailableError, match="interpreter has no Gluon"):
            gluon_one_launch(q.X, q.W, q.A, q.B, q.bias, 1.0, SMALL, 1)
