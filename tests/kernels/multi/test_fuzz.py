"""Mixed batches while adapters come and go, against every token run alone with its own adapter.

The oracle keeps the adapters it was given and never reads the slots; what is free in the slots' buffers is NaN.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lora_kernels as lk
from lora_kernels.operands.slots import Slots
from lora_kernels.reference import multi_infer
from lora_kernels.testing import Pool
from lora_kernels.testing.multi import DISTRIBUTIONS, mix_ids

EDGES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65)
RANKS = (0, 1, 2, 3, 5, 8, 8, 11, 16, 16, 17, 24, 33, 70, 150)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PER_BOARD = 10


def size(rng: random.Random, limit: int = 80) -> int:
    return min(limit, rng.choice(EDGES) if rng.random() < 0.6 else rng.randint(1, limit))


@dataclass
class Adapter:
    A: Tensor
    B: Tensor
    scaling: float


@dataclass
class Board:
    """A layer and its slots as a server keeps them: buffers that stay, adapters that are put in and taken out."""

    rng: random.Random
    device: str
    held: dict[int, tuple[Adapter, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = self.rng
        self.N, self.K, self.L = size(rng), size(rng), rng.randint(1, 9)
        self.dtype, self.R, self.max_rank = rng.choice(DTYPES), rng.randint(1, 200), rng.choice((1, 8, 17, 33, 160))
        self.max_rank = min(self.max_rank, self.R)
        self.adapter_dtype = rng.choice((self.dtype, torch.float32))
        self.W, bias = self.normal(self.N, self.K, std=self.K**-0.5), self.normal(self.N)
        self.bias = bias if rng.random() < 0.5 else None
        B = self.free(self.R, self.N).t() if rng.random() < 0.7 else self.free(self.N, self.R)
        integers = {"dtype": torch.int32, "device": self.device}
        self.slots = Slots(
            self.free(self.R, self.K), B, torch.zeros(self.L, **integers), torch.zeros(self.L, **integers),
            torch.ones(self.L, dtype=torch.float32, device=self.device), self.max_rank,
        )  # fmt: skip

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(self.rng.randrange(2**31))
        return (torch.randn(*shape, generator=generator) * std).to(self.device, dtype or self.dtype)

    def free(self, *shape: int) -> Tensor:
        return torch.full(shape, float("nan"), dtype=self.adapter_dtype, device=self.device)

    def rows(self, slot: int) -> range:
        """Of A, that the slot's adapter has."""
        adapter, first = self.held[slot]
        return range(first, first + adapter.A.shape[0])

    def load(self, slot: int) -> None:
        """Another adapter for ``slot``, wherever there is room; none if there is not."""
        self.evict(slot)
        r = min(self.rng.choice(RANKS), self.max_rank)
        taken = {row for other in self.held for row in self.rows(other)}
        room = [first for first in range(self.R - r + 1) if not taken & set(range(first, first + r))]
        if not room:
            return
        first, scaling = self.rng.choice(room), self.rng.choice((0.3, 1.0, 1.7, -0.9))
        A = self.normal(r, self.K, std=self.K**-0.5, dtype=self.adapter_dtype)
        B = self.normal(self.N, r, std=1 / (abs(scaling) * max(r, 1) ** 0.5), dtype=self.adapter_dtype)
        self.slots.A[first : first + r], self.slots.B[:, first : first + r] = A, B
        self.slots.starts[slot], self.slots.ranks[slot], self.slots.scalings[slot] = first, r, scaling
        self.held[slot] = Adapter(A, B, scaling), first

    def evict(self, slot: int) -> None:
        if slot in self.held:
            own = list(self.rows(slot))
            self.slots.A[own], self.slots.B[:, own] = float("nan"), float("nan")
            del self.held[slot]
        self.slots.ranks[slot] = 0
        self.slots.starts[slot] = self.rng.choice((0, self.R - 1, 2**31 - 1, -5))  # nobody may look at it
        self.slots.scalings[slot] = float("nan")

    def churn(self) -> None:
        for _ in range(self.rng.randint(0, 3)):
            slot = self.rng.randrange(self.L)
            self.load(slot) if self.rng.random() < 0.7 else self.evict(slot)

    def alone(self, X: Tensor, dY: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Y, dX, dA, dB, dbias in float64 from one call a token."""
        return self.calls(X, dY, torch.float64, [(slot, [m]) for m, slot in enumerate(ids.tolist())])

    def plain(self, X: Tensor, dY: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """The same in the layer's dtype, from one call for all tokens of an adapter: the least that is rounded."""
        rows: dict[int, list[int]] = {}
        for m, slot in enumerate(ids.tolist()):
            rows.setdefault(slot, []).append(m)
        return self.calls(X, dY, self.dtype, list(rows.items()))

    def calls(self, X: Tensor, dY: Tensor, dtype: torch.dtype, calls: list[tuple[int, list[int]]]) -> dict[str, Tensor]:
        """By plain autograd from one call for each (slot, its rows)."""

        def leaf(values: Tensor, dtype: torch.dtype) -> Tensor:
            return values.to(dtype, copy=True).requires_grad_()

        wide = torch.float64 if dtype == torch.float64 else self.adapter_dtype
        X, bias, W = leaf(X, dtype), None if self.bias is None else leaf(self.bias, dtype), self.W.to(dtype)
        own = {slot: (leaf(a.A, wide), leaf(a.B, wide), a.scaling) for slot, (a, _) in self.held.items()}
        base, parts, order = F.linear(X, W, bias), [], []
        for slot, rows in calls:
            y = base[rows]
            if slot in own:
                A, B, scaling = own[slot]
                y = y + scaling * F.linear(F.linear(X[rows], A.to(dtype)), B.to(dtype))
            parts.append(y)
            order += rows
        Y = torch.cat(parts)[torch.tensor(order, device=X.device).argsort()]
        Y.backward(dY.to(dtype))
        dA, dB = (torch.zeros_like(T, dtype=wide) for T in (self.slots.A, self.slots.B))
        for slot, (A, B, _) in own.items():
            if A.grad is not None and B.grad is not None:
                dA[list(self.rows(slot))], dB[:, list(self.rows(slot))] = A.grad, B.grad
        found = {"Y": Y.detach(), "dX": X.grad, "dA": dA, "dB": dB, "dbias": None if bias is None else bias.grad}
        return {name: T for name, T in found.items() if T is not None}


def mixed(board: Board, X: Tensor, dY: Tensor, ids: Tensor, backend: str, gradients: bool) -> dict[str, Tensor]:
    """The same from one call for all tokens; Y alone without ``gradients``."""
    W, slots, bias = board.W, board.slots, board.bias
    if not gradients:
        with torch.no_grad():
            return {"Y": lk.multi_lora_linear(X, W, slots, ids, bias, backend=backend)}
    X, A, B = (T.clone().requires_grad_() for T in (X, slots.A, slots.B))
    bias = None if bias is None else bias.clone().requires_grad_()
    Y = lk.multi_lora_linear(X, W, slots._replace(A=A, B=B), ids, bias, backend=backend)
    Y.backward(dY)
    found: dict[str, Any] = {"Y": Y.detach(), "dX": X.grad, "dA": A.grad, "dB": B.grad}
    return found if bias is None else {**found, "dbias": bias.grad}


def play(
    mixes: int,
    seed: int,
    device: str,
    backend: str = "auto",
    max_M: int = 80,
    gradients_of: int = 3,
    orders: dict[str, tuple[int, ...]] = {},  # noqa: B006
) -> int:
    """``mixes`` mixed batches on ``mixes / PER_BOARD`` layers, judged by the error rule; every n-th with gradients.

    orders: names in reference/multi_infer.py and what each may be set to, mix by mix.
    """
    rng, pool, tokens = random.Random(seed), Pool(), 0
    board, ids = Board(rng, device), torch.empty(0)
    for number in range(mixes):
        if number % PER_BOARD == 0:
            board = Board(rng, device)
            for slot in range(board.L):
                board.load(slot)
        board.churn()
        again = number % PER_BOARD and rng.random() < 0.3  # the same tensor with other ids, as a server keeps one
        M = len(ids) if again else size(rng, max_M)
        mix = mix_ids(rng.choice(DISTRIBUTIONS), M, board.L, run=rng.choice((1, 1, 2, 5, 16)), seed=number)
        order = torch.randperm(M, generator=torch.Generator().manual_seed(number)) if number % 2 else torch.arange(M)
        ids = ids.copy_(mix[order]) if again else mix[order].to(device)
        for name, values in orders.items():
            setattr(multi_infer, name, rng.choice(values))
        X, dY = board.normal(M, board.K), board.normal(M, board.N)
        gradients = bool(gradients_of) and number % gradients_of == 0
        got = mixed(board, X, dY, ids, backend, gradients)
        truth, plain = board.alone(X, dY, ids), board.plain(X, dY, ids)
        if gradients:
            assert got.keys() == truth.keys()
            used = [r for slot in set(ids.tolist()) & board.held.keys() for r in board.rows(slot)]
            for name, T in (("dA", got["dA"]), ("dB", got["dB"].t())):
                nobodys = torch.ones(board.R, dtype=torch.bool, device=device)
                nobodys[used] = False
                assert not T[nobodys].any(), f"{name} of mix {number} of seed {seed} is not zero where no token is"
            for results in (got, truth, plain):  # what is zero by right makes no result larger
                results |= {"dA": results["dA"][used], "dB": results["dB"][:, used]}
        for name, T in got.items():
            parts = [(T, plain[name], truth[name])]
            if name in ("dA", "dB"):  # errors of the few roundings of dYB or XA of an adapter's tokens: judged together
                parts = list(zip(*(t.flatten().split(Pool.SMALL - 1) for t in parts[0]), strict=True))
            try:
                for part in parts:
                    if part[0].numel():
                        pool.assert_close(*part, what=name, dtype=board.dtype)
            except AssertionError as error:
                error.add_note(f"mix {number} of seed {seed}: {ids.tolist()} of ranks {board.slots.ranks.tolist()}")
                raise
        tokens += M
    pool.close()
    return tokens


def shards(count: int) -> list[Any]:
    return [0, *(pytest.param(shard, marks=pytest.mark.slow) for shard in range(1, count))]


# From which size each of the reference's orders is taken: at these the small layers here take all of them.
ORDERS = {"MASKED_PRODUCTS": (0, 4_000_000), "MASKED_ROWS": (0, 256), "RUN_ROWS": (1, 64), "SORTED_ROWS": (0, 512)}


@pytest.mark.parametrize("shard", shards(10))
def test_mixes(shard, device, monkeypatch):
    """2,000 mixes in all, as the planner runs them here."""
    for name in ORDERS:
        monkeypatch.setattr(multi_infer, name, getattr(multi_infer, name))
    assert play(200, shard, device, orders=ORDERS) > 4000


@pytest.mark.sampled(2)
@pytest.mark.parametrize("plan", ["eager", "extend"])
@pytest.mark.parametrize("shard", shards(5))
def test_mixes_of_triton_kernels(shard, plan, device, poisoned):
    """510 mixes of each plan; memory that nobody wrote is NaN. The decode kernels take 64 rows and no gradients."""
    limits = {"max_M": 64, "gradients_of": 0} if plan == "decode" else {}
    assert play(120 if shard else 30, shard, device, f"triton:{plan}", **limits) > 500


BROKEN = [(backend, value) for backend in ("triton:eager", "triton:extend") for value in (float("inf"), float("nan"))]


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("backend", "value"), [("auto", 3e4), ("triton:eager", 3e4), ("triton:extend", 3e4), *BROKEN])
@pytest.mark.parametrize("M", [6, 70])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, which interprets
def test_an_adapter_that_overflows_harms_no_other_row(M, value, backend, device, poisoned):
    """Of one tenant's broken adapter the others' rows show nothing, not even NaN; nor do the others' gradients.

    3e4 is a number of float16's, whose products are none.
    """
    rng = random.Random(M)
    board = Board(rng, device)
    while board.L < 3 or board.max_rank < 3 or board.R < 40 or board.dtype != torch.float16:
        board = Board(rng, device)
    for slot in range(3):
        while slot not in board.held or not len(board.rows(slot)):
            board.load(slot)
    X, dY = board.normal(M, board.K), board.normal(M, board.N)
    ids = mix_ids("uniform", M, 3, seed=1).to(device)
    sound = mixed(board, X, dY, ids, backend, True), mixed(board, X, dY, ids, backend, False)
    board.slots.A[list(board.rows(1))] = board.slots.B[:, list(board.rows(1))] = value
    broken = mixed(board, X, dY, ids, backend, True), mixed(board, X, dY, ids, backend, False)
    others, own = ids != 1, list(board.rows(1))
    assert not broken[0]["Y"][~others].isfinite().all()
    for before, after in zip(sound, broken, strict=True):
        assert after["Y"][others].isfinite().all()
        assert torch.allclose(after["Y"][others], before["Y"][others], atol=0.02)
    rest = [row for row in range(board.R) if row not in own]
    assert torch.equal(broken[0]["dX"][others], sound[0]["dX"][others])
    assert torch.equal(broken[0]["dA"][rest], sound[0]["dA"][rest])
    assert torch.equal(broken[0]["dB"][:, rest], sound[0]["dB"][:, rest])


def test_the_batch_of_another_thread_is_never_taken_for_ones_own():
    """What is remembered of ids is replaced by another thread just while it is looked at."""
    mine, others = torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([2, 2, 2], dtype=torch.int32)
    rows = multi_infer.rows_of(mine)
    theirs = lambda: others, others._version, multi_infer.Rows(others)

    def replaced_meanwhile() -> Tensor:
        multi_infer._last = theirs
        return mine

    multi_infer._last = replaced_meanwhile, mine._version, rows
    assert multi_infer.rows_of(mine).in_order == [(0, 0, 1), (1, 1, 3)]
