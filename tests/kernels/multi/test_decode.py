"""multi_decode against fp64 by the error rule: every mix, any strides and sizes, its counters, its bits."""

import itertools

import pytest
import torch

import lora_kernels as lk
from lora_kernels.kernels.chip import CHIPS
from lora_kernels.kernels.multi import decode as multi_decode
from lora_kernels.kernels.multi import launchers as multi_launchers
from lora_kernels.kernels.multi import workspace as decode_workspace
from lora_kernels.kernels.multi.tiles import multi_decode_config
from lora_kernels.kernels.tiles import SHRINK_K, DecodeConfig, is_valid
from lora_kernels.operands.slots import Slots
from lora_kernels.testing import assert_close, poison
from lora_kernels.testing.multi import (
    DISTRIBUTIONS,
    fuzz_mixes,
    make_multi_problem,
    mix_ids,
    multi_plain,
    multi_truth,
    problem_of,
)
from lora_kernels.testing.rule import Pool

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RANKS = [4, 0, 16, 1, 65]


@pytest.fixture(autouse=True)
def workspaces(monkeypatch):
    """The workspaces that a test made, in memory of NaN; their counters are zero when it ends."""
    made = {}
    monkeypatch.setattr(decode_workspace, "_workspaces", made)
    yield made
    assert made
    assert not any(space.counters.any() for space in made.values())


def small(M, **fields):
    tokens = max(16, 1 << (M - 1).bit_length())
    return DecodeConfig(**{"BLOCK_M": tokens, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2} | fields)


def run(q, config=None, units=3, **changed):
    """Y, in memory that holds NaN until it is written."""
    X, W, slots, ids, bias = (changed.get(name, getattr(q, name)) for name in ("X", "W", "slots", "ids", "bias"))
    with poison():
        return multi_decode.multi_decode(X, W, slots, ids, bias, config or small(X.shape[0], SPLIT=2), units)


def check(q, close=assert_close, **options):
    close(run(q, **options), multi_plain(q).Y, multi_truth(q).Y, what="Y")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_mixes(distribution, dtype, device):
    ids = mix_ids(distribution, 17, len(RANKS), device=device)
    check(make_multi_problem(ids, 70, 90, RANKS, dtype, pool_layout=True, gap=3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 16, 64])
def test_rows_and_shares(M, dtype, device):
    """One share of K and more of them than steps; adapters in float32, packed; a sum over several spans of K."""
    ids = mix_ids("uniform", M, len(RANKS), seed=M, device=device)
    q = make_multi_problem(ids, 40, SHRINK_K + 70, RANKS, dtype, adapter_dtype=torch.float32, bias=M % 2 == 0)
    check(q, config=small(M, SPLIT=1 if M < 16 else 5, BLOCK_K=128, LOW_N=16))


@pytest.mark.parametrize("arch", ["sm_90", "sm_86", "gfx942"])
def test_the_configurations_that_ship(arch, device):
    q = make_multi_problem(mix_ids("half", 20, 3, device=device), 72, 130, [8, 16, 20], torch.bfloat16)
    check(q, config=multi_decode_config(20, 72, 130, q.X.dtype, CHIPS[arch], True), units=5)


def test_same_bits_in_every_run_grid_and_order(device, workspaces):
    q = make_multi_problem(mix_ids("uniform", 16, 5, device=device), 70, 96, RANKS, torch.bfloat16)
    first = run(q)
    for units, order in ((3, 0), (1, 0), (7, 1), (9, 2)):
        if device == "cpu":
            from lora_kernels.testing import interpreter

            interpreter.order(order)
        assert torch.equal(run(q, units=units), first)
    assert len(workspaces) == 1  # made once, used again


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rows_bits_do_not_depend_on_the_others(dtype, device):
    q = make_multi_problem(mix_ids("uniform", 16, 5, device=device), 40, 520, RANKS, dtype)
    whole = run(q)
    ids, X = mix_ids("half", 16, 5, seed=1, device=device), q.X.flip(0).clone()
    ids[5], X[5] = q.ids[5], q.X[5]
    assert torch.equal(run(q, X=X, ids=ids)[5], whole[5])
    alone = run(q, X=q.X[5:6], ids=q.ids[5:6], config=small(16, SPLIT=2))
    assert torch.equal(alone[0], whole[5])


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, which interprets
def test_what_is_not_finite_stays_with_its_rows(device):
    q = make_multi_problem(mix_ids("half", 24, 3, device=device), 40, 80, [8, 16, 20], torch.float16, bias=False)
    right = run(q)
    for name in ("A", "B"):
        T = getattr(q.slots, name).clone()
        (T if name == "A" else T.t())[8:24] = float("nan")
        Y = run(q, slots=q.slots._replace(**{name: T}))
        assert Y[q.ids == 1].isnan().all()
        assert torch.equal(Y[q.ids != 1], right[q.ids != 1])
    X = q.X.clone()
    X[3] = float("inf")
    others = torch.arange(24, device=device) != 3
    assert torch.equal(run(q, X=X)[others], right[others])


def test_ids_that_name_no_slot_and_empty_slots_give_the_base(device):
    q = make_multi_problem(mix_ids("none", 7, 5, device=device), 40, 80, [8, 0, 20, 5, 6], torch.bfloat16)
    base, slots = run(q), q.slots
    starts, ranks, scalings = slots.starts.clone(), slots.ranks.clone(), slots.scalings.clone()
    starts[:2] = torch.tensor([2**31 - 1, -5])
    ranks[3:] = torch.tensor([-4, 0])
    scalings[1], scalings[4] = float("nan"), float("inf")
    ids = torch.tensor([-1, -7, 5, 2**31 - 1, 0, 1, 3], dtype=torch.int32, device=device)
    broken = slots._replace(starts=starts, ranks=ranks, scalings=scalings)
    assert torch.equal(run(q, ids=ids, slots=broken), base)
    nan = slots._replace(A=slots.A * float("nan"), B=slots.B * float("nan"))
    assert torch.equal(run(q, slots=nan), base)


def test_ranks_end_where_the_pool_does(device):
    q = make_multi_problem(mix_ids("identical", 4, 1, device=device), 40, 80, [12], torch.float32)
    cut = q.slots._replace(ranks=torch.tensor([2**31 - 1], dtype=torch.int32, device=device), max_rank=12)
    assert torch.equal(run(q, slots=cut), run(q))


@pytest.mark.parametrize("slots", [[], [0, 0]], ids=["no slots", "empty slots"])
def test_without_ranks(slots, device):
    check(make_multi_problem(mix_ids("none", 3, 2, device=device), 24, 40, slots, torch.float16))


def test_no_rank_is_padded(device, workspaces):
    """The elements of XA's parts that a launch writes: the true rank of each row, once a span of K; none without."""
    q = make_multi_problem(mix_ids("uniform", 9, 5, device=device), 32, SHRINK_K + 40, RANKS, torch.float32)
    for ids in (torch.full_like(q.ids, -1), q.ids):
        run(q, ids=ids)
        (space,) = workspaces.values()
        held = q.slots.ranks[ids.long().clamp(min=0)][ids >= 0]
        assert int((~space.parts.isnan()).sum()) == 2 * int(held.sum())


def test_one_launch_a_call(device, monkeypatch):
    class Counted:
        grids: list = []  # noqa: RUF012

        def __getitem__(self, grid):
            self.grids.append(grid)
            return kernel[grid]

    kernel = multi_decode._multi_decode_kernel
    monkeypatch.setattr(multi_decode, "_multi_decode_kernel", Counted())
    q = make_multi_problem(mix_ids("half", 9, 3, device=device), 70, 80, [8, 16, 20], torch.bfloat16)
    run(q, units=4)
    assert Counted.grids == [(4 + 2 * 2,)]  # adapter programs, then the shares of K of every tile


def test_strides_and_an_output(device):
    q = make_multi_problem(mix_ids("uniform", 18, 5, device=device), 40, 72, RANKS, torch.bfloat16)
    X, W = torch.empty(36, 72, device=device, dtype=q.X.dtype)[::2].copy_(q.X), q.W.t().contiguous().t()
    A, bias = q.slots.A.t().contiguous().t(), q.bias.repeat_interleave(3)[::3]
    out = torch.full((18, 50), 7.0, dtype=X.dtype, device=device)
    multi_decode.multi_decode(X, W, q.slots._replace(A=A), q.ids, bias, small(18), 3, out[:, :40])
    assert_close(out[:, :40], multi_plain(q).Y, multi_truth(q).Y)
    assert (out[:, 40:] == 7).all()


def test_rows_beyond_2_31_elements(device):
    """Rows 2**30 elements apart in memory that is reserved, not touched: a 32-bit offset would wrap and trap."""
    q = make_multi_problem(mix_ids("uniform", 4, 2, device=device), 4, 40, [3, 1], torch.bfloat16)

    def far(T):
        rows, columns = T.shape
        memory = torch.empty((rows - 1) * 2**30 + columns, dtype=T.dtype, device=device)
        return memory.as_strided((rows, columns), (2**30, 1)).copy_(T)

    near, slots = run(q), q.slots
    Y = multi_decode.multi_decode(
        far(q.X), far(q.W), slots._replace(A=far(slots.A), B=far(slots.B)), q.ids, q.bias, small(4, SPLIT=2), 2
    )
    assert torch.equal(Y, near)


def test_too_many_rows_are_refused(device):
    q = make_multi_problem(mix_ids("half", 65, 3, device=device), 24, 40, [8, 16, 20], torch.bfloat16)
    config = multi_decode_config(65, 24, 40, q.X.dtype, CHIPS["sm_90"])
    with pytest.raises(AssertionError, match="65 rows"):
        run(q, config=config)
    run(q, X=q.X[:64], ids=q.ids[:64])


def test_the_plan_by_its_name(device):
    q = make_multi_problem(mix_ids("half", 9, 3, device=device), 40, 80, [8, 16, 20], torch.bfloat16)
    Y, XA = multi_launchers.multi_lora_linear_fwd(q.X, q.W, q.slots, q.ids, q.bias, "decode", CHIPS["sm_90"])
    assert XA is None
    with torch.no_grad():
        assert torch.equal(lk.multi_lora_linear(q.X, q.W, q.slots, q.ids, q.bias, backend="triton:decode"), Y)
    assert_close(Y, multi_plain(q).Y, multi_truth(q).Y)


@pytest.mark.timeout(1200)
def test_fuzz(device):
    pool = Pool()
    for number, case in enumerate(fuzz_mixes(8, seed=7, max_M=64)):
        if device == "cpu":
            from lora_kernels.testing import interpreter

            interpreter.order(number % 3)
        check(problem_of(case), pool.assert_close, units=1 + number % 5, config=small(case.M, SPLIT=1 + number % 3))
    pool.close()


def test_a_swap_in_place_is_seen_by_the_next_call(device):
    """What a captured graph relies on: slots, ids and ranks are read when the launch runs, at the same addresses."""
    q = make_multi_problem(mix_ids("uniform", 8, 3, device=device), 40, 80, [8, 16, 20], torch.bfloat16)
    other = make_multi_problem(mix_ids("skewed", 8, 3, device=device), 40, 80, [20, 8, 16], torch.bfloat16, seed=5)
    run(q)
    for mine, theirs in zip((*q.slots[:5], q.ids), (*other.slots[:5], other.ids), strict=True):
        mine.copy_(theirs)
    assert torch.equal(run(q), run(q, slots=Slots(*other.slots[:5], 20), ids=other.ids))
    check(q)


def test_every_default_is_valid(workspaces):
    sizes = itertools.product(
        (1, 16, 17, 64), (8, 1000, 4096, 14336), (40, 4096), DTYPES, (True, False), CHIPS.values()
    )
    for M, N, K, dtype, wide, chip in sizes:
        config = multi_decode_config(M, N, K, dtype, chip, wide)
        assert is_valid(config, dtype, 64, chip) is None
        assert (config.SPLIT, config.BLOCK_K) == (
            (one := multi_decode_config(1, N, K, dtype, chip, wide)).SPLIT, one.BLOCK_K,
        )  # fmt: skip
    workspaces[None] = decode_workspace.Workspace(*torch.zeros(4, 1))


def test_configurations_that_are_known_to_fail_are_refused(workspaces):
    def why(config, arch="sm_80"):
        return is_valid(config, torch.bfloat16, 16, CHIPS[arch])

    assert why(small(64)) is None
    assert "up to 64" in why(small(128))
    assert "divides 512" in why(small(16, BLOCK_K=1024, BLOCK_N=16, num_stages=1))
    assert "shared memory" in why(small(64, BLOCK_N=128, BLOCK_K=128, num_stages=4))
    workspaces[None] = decode_workspace.Workspace(*torch.zeros(4, 1))
