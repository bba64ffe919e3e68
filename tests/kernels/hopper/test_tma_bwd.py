"""tma_dx against fp64 by the error rule: dX and dA, masks from bits, any number of programs, and its configurations."""

import dataclasses
import itertools

import pytest
import torch

from lora_kernels import ops
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.kernels.chip import CHIPS
from lora_kernels.kernels.common import Dropout
from lora_kernels.kernels.hopper.tma_bwd import tma_dx
from lora_kernels.kernels.tiles import TmaDxConfig, is_valid, tma_dx_config
from lora_kernels.reference import GradMask, pack_keep, philox_keep_mask
from lora_kernels.testing import assert_close, make_problem, plain, poison, truth

H100 = CHIPS["sm_90"]
SMALL = TmaDxConfig(64, 128, 64, num_warps=4, num_stages=2, RANK_STEP=16, DA_ROWS=2)  # several of everything
DTYPES = (torch.bfloat16,)  # float16 is refused: its low-rank operands are float32
SIZES = [(130, 96, 128), (64, 64, 64), (1, 8, 8), (65, 72, 200), (200, 160, 136)]


def run(q, config=SMALL, units=3, make_da=True):
    """dX, dA and the keep mask, in memory that holds NaN until it is written."""
    M, _, K, _ = q.shape
    keep = philox_keep_mask(q.seed, q.p, M, K) if q.p else None
    drop = None if keep is None else Dropout(q.p, q.seed, pack_keep(keep))
    dYB = (q.scaling * (q.dY.double() @ q.B.double())).to(q.X.dtype)
    with poison():
        return *tma_dx(q.dY, q.W, dYB, q.A, q.X, drop, config, units, make_da=make_da), keep


def check(q, dense=None, **options):
    """``dense``: the same problem in memory that PyTorch's own products can take (oneDNN reads gaps)."""
    dX, dA, keep = run(q, **options)
    expected, true = plain(dense or q, keep), truth(dense or q, keep)
    assert dX.is_contiguous()
    assert dA.dtype == q.A.dtype
    assert_close(dX, expected.dX, true.dX, what="dX")
    assert_close(dA, expected.dA, true.dA, what="dA", dtype=q.X.dtype)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "K"), SIZES)
def test_sizes(M, N, K, dtype, p, device):
    check(make_problem(M, N, K, 16 if M == 1 else 8, dtype, device, dropout_p=p))


@pytest.mark.sampled(4)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("adapters", [torch.float32, None], ids=["float32", "same"])
@pytest.mark.parametrize("r", [1, 8, 16, 17, 64])
def test_ranks(r, adapters, device):
    p = 0.25 if r % 2 else 0.0
    check(make_problem(130, 96, 136, r, torch.bfloat16, device, dropout_p=p, adapter_dtype=adapters))


@pytest.mark.sampled(4)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
def test_the_configurations_that_ship(arch, device):
    for M, r in ((16384, 16), (8192, 16), (140, 64), (140, 20), (64, 8)):
        q = make_problem(140, 136, 264, r, torch.bfloat16, device, dropout_p=0.1)
        check(q, config=tma_dx_config(M, 4096, r, q.X.dtype, CHIPS[arch]), units=H100.units)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_strided_operands(p, device):
    """Rows of dY, W and X with gaps of NaN, A transposed."""

    def gapped(t):
        return t.new_full((t.shape[0], t.shape[1] + 24), float("nan")).narrow(1, 8, t.shape[1]).copy_(t)

    q = make_problem(70, 80, 72, 5, torch.bfloat16, device, dropout_p=p)
    turned = q.A.mT.contiguous().mT
    check(dataclasses.replace(q, X=gapped(q.X), W=gapped(q.W), dY=gapped(q.dY), A=turned), dense=q)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_without_da_and_same_bits_for_any_number_of_programs(device):
    q = make_problem(200, 160, 264, 16, torch.bfloat16, device, dropout_p=0.25)
    first, dA, _ = run(q, units=1)
    for units in (2, 7, 100, 100):
        again, dA_again, _ = run(q, units=units)
        assert torch.equal(first, again)
        assert torch.equal(dA, dA_again)
    other, dA_other, _ = run(q, config=dataclasses.replace(SMALL, DA_ROWS=1))
    assert torch.equal(other, first)
    torch.testing.assert_close(dA_other, dA, rtol=2e-2, atol=2e-2)  # the same sums in another order
    alone, nothing, _ = run(q, make_da=False)
    assert nothing is None
    assert torch.equal(alone, first)


@pytest.mark.timeout(1200)
def test_the_mask_is_read_bit_for_bit(device):
    """W = 0 and dYB A = 1 make dX the mask; X = 1 makes dA its column sums."""
    M, K, p = 70, 136, 0.5
    keep = philox_keep_mask(torch.tensor([7, 9], device=device), p, M, K)
    one = torch.ones(M, 1, dtype=torch.float16, device=device)
    dY, W = torch.zeros(M, 8, dtype=one.dtype, device=device), torch.zeros(8, K, dtype=one.dtype, device=device)
    drop = Dropout(p, torch.tensor([7, 9], device=device), pack_keep(keep))
    with poison():
        dX, dA = tma_dx(dY, W, one, torch.ones(1, K, device=device), one.expand(M, K).contiguous(), drop, SMALL, 2)
    assert torch.equal(dX, 2 * keep.to(dX.dtype))
    assert torch.equal(dA, 2 * keep.sum(0, keepdim=True).to(dA.dtype))


@pytest.mark.sampled(2)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_through_the_operators(p, device):
    """The forward keeps the bits that the backward reads."""
    q = make_problem(140, 136, 200, 20, torch.bfloat16, device, dropout_p=p)
    seed, keep = (q.seed, philox_keep_mask(q.seed, p, 140, 200)) if p else (None, None)
    X, W, A, B, backend = q.X, q.W, q.A, q.B, "triton:tma_extend"
    with poison():
        Y, XA, bits = ops.lora_linear_fwd(X, W, A, B, q.bias, q.scaling, p, seed, backend, bool(p))
        kept, needs = bits if p else None, GradMask(True, True, True, True)
        grads = ops.lora_linear_bwd(q.dY, X, W, A, B, XA, q.scaling, p, seed, kept, needs, backend)
    for name, got in zip(("Y", "dX", "dA", "dB", "dbias"), (Y, *grads), strict=True):
        assert_close(got, getattr(plain(q, keep), name), getattr(truth(q, keep), name), what=name)


def test_what_it_cannot_take(device):
    q = make_problem(16, 16, 16, 4, torch.bfloat16, device)
    dYB, wide = q.X[:, :4].contiguous(), torch.zeros(16, 40, dtype=torch.bfloat16, device=device)
    with pytest.raises(BackendUnavailableError, match="X has stride 2"):
        tma_dx(q.dY, q.W, dYB, q.A, wide[:, :32:2], None, SMALL, 1)
    with pytest.raises(BackendUnavailableError, match="dY starts at an address"):
        tma_dx(wide[:, 1:17], q.W, dYB, q.A, q.X, None, SMALL, 1)
    with pytest.raises(BackendUnavailableError, match="as bits, given is a seed"):
        tma_dx(q.dY, q.W, dYB, q.A, q.X, Dropout(0.1, q.seed), SMALL, 1)


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
def test_every_default_is_valid(arch):
    sizes = itertools.product((1, 128, 1000, 8192), (8, 264, 4096), (1, 16, 17, 32, 48, 57, 64), DTYPES)
    for M, K, r, dtype in sizes:
        assert is_valid(tma_dx_config(M, K, r, dtype, CHIPS[arch]), dtype, r, CHIPS[arch]) is None


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
def test_fewer_partials_cost_no_tile(arch):
    chip = CHIPS[arch]
    assert tma_dx_config(8192, 4096, 16, torch.bfloat16, H100).DA_ROWS == 8
    for M, K, r in itertools.product((1, 200, 1000, 4096, 8192, 20_000), (200, 1024, 4096, 14_336), (16, 57)):
        tiles = tma_dx_config(M, K, r, torch.bfloat16, chip)
        num_m, num_k = -(-M // tiles.BLOCK_M), -(-K // tiles.BLOCK_N)
        walked = -(-(-(-num_m // tiles.DA_ROWS) * num_k) // chip.units) * tiles.DA_ROWS
        assert walked <= -(-num_m * num_k // chip.units)


def test_configurations_that_are_known_to_fail_are_refused():
    def why(config, r=16, dtype=torch.bfloat16, arch="sm_90"):
        return is_valid(config, dtype, r, CHIPS[arch])

    wide = TmaDxConfig(128, 256, 64, num_warps=8, num_stages=3)
    assert why(wide) is None
    assert why(wide, 64) is None
    assert "spill" in why(wide, 57)
    assert "tensor memory" in why(wide, arch="sm_100")
    assert "shared memory" in why(dataclasses.replace(wide, num_stages=4, RANK_STEP=64), 64)
    assert "spill" in why(TmaDxConfig(128, 128, 32, num_warps=8, num_stages=5), 64, arch="sm_120")
    assert "above 64" in why(wide, 65)
    assert "no TMA" in why(wide, arch="sm_80")
    assert "16-bit" in why(wide, dtype=torch.float32)
    assert "float32 XA and dYB" in why(wide, dtype=torch.float16)
