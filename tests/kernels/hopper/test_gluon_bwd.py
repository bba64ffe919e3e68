"""The Gluon backward's source, run by the emulator, against fp64 by the error rule: dX, dA, masks from bits."""

import dataclasses

import pytest
import torch

from lora_kernels import ops
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.kernels.chip import CHIPS
from lora_kernels.kernels.common import Dropout
from lora_kernels.kernels.hopper.gluon import gluon_extend
from lora_kernels.kernels.hopper.gluon_bwd import gluon_dx
from lora_kernels.kernels.hopper.gluon_tiles import GluonConfig, gluon_config
from lora_kernels.reference import GradMask, pack_keep, philox_keep_mask
from lora_kernels.testing import assert_close, make_problem, plain, poison, truth
from lora_kernels.testing.emulator import emulate

SMALL = GluonConfig(64, 64, 64, num_warps=4, STAGES=3)  # several tiles, steps and turns of the ring
TALL = GluonConfig(128, 64, 64, num_warps=4, STAGES=4)  # two boxes of X a tile
SIZES = [(130, 96, 128), (200, 160, 192), (64, 64, 64), (1, 8, 8), (65, 72, 200)]


def run(q, config=SMALL, units=3, seed=0, **options):
    """dX and dA in memory that holds NaN until it is written."""
    (M, _, K, _), drop = q.shape, None
    if q.p:
        drop = Dropout(q.p, q.seed, pack_keep(philox_keep_mask(q.seed, q.p, M, K)))
    dYB = (q.scaling * (q.dY @ q.B.to(q.dY.dtype))).to(q.dY.dtype)
    with poison(), emulate(seed):
        return gluon_dx(q.dY, q.W, dYB, q.A, q.X, drop, config, units, **options)


def check(q, dX, dA):
    M, _, K, _ = q.shape
    keep = philox_keep_mask(q.seed, q.p, M, K) if q.p else None
    for name, got in (("dX", dX), ("dA", dA)):
        assert_close(got, getattr(plain(q, keep), name), getattr(truth(q, keep), name), what=name)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(("M", "N", "K"), SIZES)
def test_sizes(M, N, K, p):
    q = make_problem(M, N, K, 8, torch.bfloat16, dropout_p=p)
    check(q, *run(q, TALL if M > 128 else SMALL))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("adapters", [torch.float32, None], ids=["float32", "same"])
@pytest.mark.parametrize("r", [1, 16, 17, 33, 64])
def test_ranks(r, adapters):
    q = make_problem(130, 96, 128, r, torch.bfloat16, dropout_p=0.25 * (r % 2), adapter_dtype=adapters)
    check(q, *run(q))


@pytest.mark.timeout(1200)
def test_the_configurations_that_ship():
    q = make_problem(140, 136, 272, 16, torch.bfloat16, dropout_p=0.25)
    for M in (40, 140, 8192):
        check(q, *run(q, gluon_config(M, 4096, 16, q.X.dtype, CHIPS["sm_90"])))


@pytest.mark.sampled(2)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_same_bits_in_every_order_of_events(p):
    q = make_problem(200, 160, 192, 16, torch.bfloat16, dropout_p=p)
    first = run(q, TALL, units=1)
    for seed in range(8):
        config = dataclasses.replace(TALL, STAGES=2 + seed % 3)
        again = run(q, config, units=(1, 2, 7, 100)[seed % 4], seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True)), seed


@pytest.mark.timeout(1200)
def test_dx_alone():
    q = make_problem(130, 96, 128, 16, torch.bfloat16, dropout_p=0.25)
    dX, dA = run(q, make_da=False)
    assert dA is None
    assert torch.equal(dX, run(q)[0])


@pytest.mark.timeout(1200)
def test_no_ranks_are_the_plain_products():
    """What benchmarks hold against the library's."""
    q = make_problem(130, 96, 128, 16, torch.bfloat16)
    none = {"XA": q.X.new_zeros(130, 0), "B": q.X.new_zeros(96, 0), "A": q.X.new_zeros(0, 128)}
    with poison(), emulate() as launched:
        Y = gluon_extend(q.X, q.W, none["XA"], none["B"], None, SMALL, 3)
        dX, dA = gluon_dx(q.dY, q.W, none["XA"], none["A"], q.X, None, SMALL, 3)
    assert launched == ["_gluon_extend_kernel", "_gluon_dx_kernel"]
    assert dA is None
    assert_close(Y, q.X @ q.W.mT, q.X.double() @ q.W.double().mT, what="Y")
    assert_close(dX, q.dY @ q.W, q.dY.double() @ q.W.double(), what="dX")


def test_dropout_needs_bits():
    q = make_problem(16, 16, 16, 4, torch.bfloat16, dropout_p=0.5)
    dYB = torch.zeros(16, 4, dtype=torch.bfloat16)
    with pytest.raises(BackendUnavailableError, match="keep the bits"):
        gluon_dx(q.dY, q.W, dYB, q.A, q.X, Dropout(0.5, q.seed), SMALL, 1)
    with pytest.raises(BackendUnavailableError, match="stride 2"):
        gluon_dx(q.dY[:, ::2], q.W, dYB, q.A, q.X, None, SMALL, 1)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("plan", "p", "kernels"),
    [
        ("gluon_extend", 0.0, ["_gluon_extend_kernel", "_gluon_dx_kernel"]),
        ("gluon_extend", 0.25, ["_gluon_extend_kernel", "_gluon_dx_kernel"]),
        ("gluon_one_launch", 0.0, ["_gluon_one_launch_kernel", "_gluon_dx_kernel"]),
    ],
)
def test_through_the_operator(plan, p, kernels):
    """Bits that the shrink pass makes are the ones that dX and dA read."""
    M, N, K, r = 70, 96, 128, 8
    q = make_problem(M, N, K, r, torch.bfloat16, dropout_p=p)
    seed, keep = (q.seed, philox_keep_mask(q.seed, p, M, K)) if p else (None, None)
    operands, how = (q.X, q.W, q.A, q.B), (q.scaling, p, seed)
    with emulate() as launched:
        Y, XA, bits = ops.lora_linear_fwd(*operands, q.bias, *how, f"triton:{plan}", True)
        grads = ops.lora_linear_bwd(q.dY, *operands, XA, *how, bits if p else None, GradMask(), f"triton:{plan}")
    assert launched == kernels
    for name, got in zip(("Y", "dX", "dA", "dB"), (Y, *grads[:3]), strict=True):
        assert_close(got, getattr(plain(q, keep), name), getattr(truth(q, keep), name), what=name)
