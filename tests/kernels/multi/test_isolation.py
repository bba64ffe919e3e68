"""Row isolation: whatever one adapter, one request or a free buffer row holds, every other row has its usual result.

Every plan and every order of the reference is judged by the error rule, on the rows whose own adapter, X and dY are
finite, and on the gradients of the adapters whose own rows are. csrc/ has the same property in tests/csrc/.
"""

import functools
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import lora_kernels as lk
from lora_kernels.kernels import csrc
from lora_kernels.kernels.multi import launchers as multi_launchers
from lora_kernels.reference import multi_infer
from lora_kernels.testing import assert_close
from lora_kernels.testing.multi import MultiProblem, MultiResults, make_multi_problem, multi_plain, multi_truth

RANKS = (8, 3, 0, 17, 16, 4)
BAD = 1  # the slot that is poisoned
UNUSED = 5  # a slot that no row has, poisoned always
IDS = [3, 1, -1, 0, 0, 1, 4, 4, -1, 2, 3, 1, 1, 0, 3, 4] * 2
ROW = 5  # the row of X or of dY that is poisoned, of slot BAD
INF, NAN = float("inf"), float("nan")
ORDERS = ("masked", "runs", "sorted", "groups")
PLANS = (
    *(f"reference, {order}" for order in ORDERS), "reference, training", "triton:eager", "triton:extend",
    "triton:eager, training", "triton:extend, training", "triton:decode", "cpp",
)  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Poison(NamedTuple):
    """What is not finite, or so large that products with it are not."""

    where: str
    value: float

    def __str__(self) -> str:
        return f"{self.where} {self.value}"

    def into(self, p: MultiProblem) -> MultiProblem:
        """A copy of ``p`` that holds it."""
        slots, X, dY = p.slots, p.X.clone(), p.dY.clone()
        A, B, scalings = slots.A.clone(), slots.B.clone(memory_format=torch.preserve_format), slots.scalings.clone()
        for slot, value in ((UNUSED, NAN), (BAD, self.value)):
            own = slice(int(slots.starts[slot]), int(slots.starts[slot]) + RANKS[slot])
            if slot == UNUSED or "A" in self.where:
                A[own] = value
            if slot == UNUSED or "B" in self.where:
                B[:, own] = value
            if slot == UNUSED or self.where == "scaling":
                scalings[slot] = value
        if self.where == "one number of b":
            B[3, int(slots.starts[BAD]) + 1] = self.value
        if self.where == "row of X":
            X[ROW] = self.value
        if self.where == "row of dY":
            dY[ROW] = self.value
        if self.where == "first row":
            X[0] = dY[0] = self.value
        return replace(p, X=X, dY=dY, slots=slots._replace(A=A, B=B, scalings=scalings))


POISONS = [
    *(Poison(where, value) for where, value in product(("A", "B", "A and B"), (1e38, -INF, NAN))),
    *(Poison("one number of b", value) for value in (INF, NAN)),
    *(Poison("scaling", value) for value in (1e38, INF, NAN)),
    *(Poison(where, value) for where in ("row of X", "row of dY", "first row") for value in (INF, NAN)),
]


@functools.cache
def problem(dtype: torch.dtype, adapters: torch.dtype) -> tuple[MultiProblem, MultiResults, MultiResults]:
    """One problem, plain PyTorch's results and the true ones. Buffer rows between the slots are NaN, as an evicted
    adapter may leave them."""
    ids = torch.tensor(IDS, dtype=torch.int32)
    p = make_multi_problem(ids, 40, 48, RANKS, dtype, adapter_dtype=adapters, pool_layout=True, gap=3)
    return p, multi_plain(p), multi_truth(p)


def results(p: MultiProblem, plan: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Y; with gradients those of X, A and B as well."""
    name, _, how = plan.partition(", ")
    if how in ORDERS:
        monkeypatch.setattr(multi_infer, "order_for", lambda *args: how)
    if how != "training":
        with torch.no_grad():
            return {"Y": lk.multi_lora_linear(p.X, p.W, p.slots, p.ids, p.bias, backend=name)}
    monkeypatch.setattr(multi_launchers, "multi_spans", lambda *args: 2)
    X, A, B = (T.detach().clone().requires_grad_() for T in (p.X, p.slots.A, p.slots.B))
    Y = lk.multi_lora_linear(X, p.W, p.slots._replace(A=A, B=B), p.ids, p.bias, backend=name)
    Y.backward(p.dY)
    found: dict[str, Any] = {"Y": Y.detach(), "dX": X.grad, "dA": A.grad, "dB": B.grad}
    return found


def check(
    plan: str, dtype: torch.dtype, adapters: torch.dtype, poison: Poison, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, plain, truth = problem(dtype, adapters)
    bad_row = {"row of X": ROW, "row of dY": ROW, "first row": 0}.get(poison.where)
    rows = sound.ids != BAD if bad_row is None else torch.arange(len(IDS)) != bad_row
    slots = set(IDS) - {-1, BAD if bad_row is None else IDS[bad_row]}
    own = [int(sound.slots.starts[slot]) + j for slot in sorted(slots) for j in range(RANKS[slot])]
    for name, got in results(poison.into(sound), plan, monkeypatch).items():
        kept = {"dA": lambda T: T[own], "dB": lambda T: T[:, own]}.get(name, lambda T: T[rows])
        assert_close(kept(got), kept(getattr(plain, name)), kept(getattr(truth, name)), what=name, dtype=dtype)


QUICK = ("A 1e+38", "B nan", "row of X inf")  # of Triton's plans, in 16 bit
CASES = [
    pytest.param(plan, dtype, poison, marks=pytest.mark.slow if slow else ())
    for plan, dtype, poison in product([plan for plan in PLANS if plan != "cpp"], DTYPES, POISONS)
    for slow in ["triton" in plan and (str(poison) not in QUICK or dtype.itemsize > 2)]
]


@pytest.mark.sampled(4)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, which interprets
@pytest.mark.parametrize(("plan", "dtype", "poison"), CASES, ids=str)
def test_what_one_slot_or_row_holds_reaches_no_other(plan, dtype, poison, monkeypatch):
    check(plan, dtype, dtype, poison, monkeypatch)


@pytest.mark.sampled(4)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("poison", [Poison("A", 1e38), Poison("B", 3.4e38), Poison("A and B", NAN)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan != "cpp"])
def test_the_same_of_float32_adapters(plan, dtype, poison, monkeypatch):
    check(plan, dtype, torch.float32, poison, monkeypatch)


@pytest.mark.skipif(csrc.update_missing() is not None, reason="the extension is not built")
@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("dtype", csrc.UPDATE_DTYPES, ids=str)
def test_the_same_of_the_operator_in_cpp(dtype, poison, monkeypatch):
    check("cpp", dtype, dtype, poison, monkeypatch)
