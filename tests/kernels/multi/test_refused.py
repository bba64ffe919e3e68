"""What mixed batches refuse, each with its class and a message that says what was given and what is accepted; and what
only a device can see, which gives the base alone and reads nothing that is not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import lora_kernels as lk
from lora_kernels import ops
from lora_kernels.errors import BackendUnavailableError, ConfigError, FrozenWeightError, ShapeError
from lora_kernels.operands.slots import Slots
from lora_kernels.reference import GradMask

M, N, K, RANKS = 6, 5, 8, [3, 0, 4]
R, L = sum(RANKS), len(RANKS)


def good() -> dict[str, Any]:
    """Operands that fit; a case replaces some of them."""
    generator = torch.Generator().manual_seed(0)
    X, W, A, B, bias = (torch.randn(*s, generator=generator) for s in ((M, K), (N, K), (R, K), (N, R), (N,)))
    ids = torch.tensor([0, 2, -1, 1, 0, 2], dtype=torch.int32)
    return {"X": X, "W": W, "A": A, "B": B, "ranks": RANKS, "scalings": [1.0, 1.0, 0.5], "ids": ids, "bias": bias}


def call(backend: str = "auto", adapters: Any = None, slots: dict[str, Any] | None = None, **given: Any) -> Tensor:
    """The operator on the good operands with ``given`` in their place; ``slots``: fields of Slots to replace."""
    o = {**good(), **given}
    packed: Any = (o["A"], o["B"], o["ranks"], o["scalings"])
    if slots is not None:
        packed = Slots.of(*packed)._replace(**slots)
    adapters = packed if adapters is None else adapters
    return lk.multi_lora_linear(o["X"], o["W"], adapters, o["ids"], o["bias"], backend=backend)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def each(*shapes: tuple[int, ...], **options: Any) -> list[Tensor]:
    return [torch.zeros(shape, **options) for shape in shapes]


TWO = {"A": each((3, K), (4, K)), "B": each((N, 3), (N, 4)), "ranks": None, "scalings": 1.0}
IDS = r"adapter_ids go from {} to {}; accepted are -1 \(no adapter\) and 0 to 2"
SHAPE = r"adapter_ids have shape {}, X {}; expected one id a token"

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "id-one-too-large": ({"ids": ints(0, 3, 0, 0, 0, 0)}, ShapeError, IDS.format(0, 3)),
    "id-far-too-large": ({"ids": ints(0, 2**31 - 1, 0, 0, 0, 0)}, ShapeError, IDS.format(0, 2**31 - 1)),
    "id-beyond-32-bits": ({"ids": ints(0, 2**32, 0, 0, 0, 0, dtype=torch.int64)}, ShapeError, IDS.format(0, 2**32)),
    "id-minus-two": ({"ids": ints(0, 0, -2, 0, 0, 0)}, ShapeError, IDS.format(-2, 0)),
    "id-smallest": ({"ids": ints(0, 0, -(2**31), 0, 0, 0)}, ShapeError, IDS.format(-(2**31), 0)),
    "ids-too-few": ({"ids": ints(0, 1)}, ShapeError, SHAPE.format(r"\(2,\)", r"\(6, 8\)")),
    "ids-too-many": ({"ids": ints(*[0] * 7)}, ShapeError, SHAPE.format(r"\(7,\)", r"\(6, 8\)")),
    "ids-none-at-all": ({"ids": ints()}, ShapeError, SHAPE.format(r"\(0,\)", r"\(6, 8\)")),
    "ids-with-a-column": ({"ids": ints(*[0] * 6)[:, None]}, ShapeError, SHAPE.format(r"\(6, 1\)", r"\(6, 8\)")),
    "ids-scalar": ({"ids": torch.tensor(0)}, ShapeError, SHAPE.format(r"\(\)", r"\(6, 8\)")),
    "ids-other-leading-shape": (
        {"X": torch.zeros(2, 3, K), "ids": torch.zeros(3, 2, dtype=torch.int32)},
        ShapeError, SHAPE.format(r"\(3, 2\)", r"\(2, 3, 8\)") + r", \(2, 3\), or one a sequence, \(2,\)",
    ),
    "ids-flat-over-sequences": ({"X": torch.zeros(2, 3, K)}, ShapeError, r"or one a sequence, \(2,\)"),
    "ids-float": ({"ids": torch.zeros(M)}, ShapeError, "adapter_ids are torch.float32; expected int32"),
    "ids-bool": ({"ids": torch.zeros(M, dtype=torch.bool)}, ShapeError, "adapter_ids are torch.bool; expected int32"),
    "ids-uint8": ({"ids": torch.zeros(M, dtype=torch.uint8)}, ShapeError, "are torch.uint8; expected int32"),
    "ids-elsewhere": (
        {"ids": ints(*[0] * M).to("meta")},
        ShapeError, "adapter_ids are on meta, X on cpu; .*one device",
    ),
    "ranks-below-zero": ({"ranks": [8, -1, 0]}, ConfigError, r"ranks are \[8, -1, 0\]; accepted are 0"),
    "ranks-too-large": ({"ranks": [3, 1, 4]}, ShapeError, r"A \(7, 8\), B \(5, 7\) and ranks of 8 .* A \(8, K\)"),
    "ranks-too-small": ({"ranks": [3, 0]}, ShapeError, r"ranks of 3 in all do not fit: expected A \(3, K\)"),
    "ranks-none-beside-one-A": ({"ranks": None}, ShapeError, "ranks is None .*; expected the rank of each adapter"),
    "ranks-other-than-the-adapters'": (
        TWO | {"ranks": [4, 3]}, ShapeError, r"ranks are \[4, 3\], but the adapters have \[3, 4\]; pass ranks=None",
    ),
    "scalings-too-few": (
        {"scalings": [1.0]},
        ShapeError, "1 scalings for 3 adapters; expected one each, or one number",
    ),
    "scalings-too-many": ({"scalings": [1.0] * 4}, ShapeError, "4 scalings for 3 adapters"),
    "scaling-NaN": ({"scalings": [1.0, float("nan"), 1.0]}, ConfigError, r"nan, 1.0\]; expected finite numbers"),
    "scaling-infinite": ({"scalings": float("inf")}, ConfigError, "scalings are .*inf.*; expected finite numbers"),
    "adapters-of-unequal-number": (
        TWO | {"B": TWO["B"][:1]}, ShapeError, "A is 2 tensors, B 1 tensors; expected both packed, or one tensor an",
    ),
    "adapters-half-packed": (TWO | {"B": torch.zeros(N, 7)}, ShapeError, "A is 2 tensors, B one tensor; expected both"),
    "no-adapters": (TWO | {"A": [], "B": []}, ShapeError, "A is 0 tensors, B 0 tensors"),
    "adapter-of-another-K": (
        TWO | {"A": each((3, K), (4, K + 1))}, ShapeError,
        r"adapter 1: A \(4, 9\) and B \(5, 4\) do not fit: expected A \(r, 8\)",
    ),
    "adapter-of-another-N": (TWO | {"B": each((N, 3), (6, 4))}, ShapeError, r"adapter 1: .* and B \(5, r\)"),
    "adapter-of-two-ranks": (TWO | {"B": each((N, 2), (N, 4))}, ShapeError, r"adapter 0: A \(3, 8\) and B \(5, 2\)"),
    "adapter-of-another-dtype": (
        TWO | {"A": [torch.zeros(3, K), torch.zeros(4, K, dtype=torch.float16)]}, ShapeError,
        "adapter 1: A torch.float16 on cpu.*; the first has torch.float32.* all must share them",
    ),
    "adapter-elsewhere": (
        TWO | {"A": [torch.zeros(3, K), torch.zeros(4, K, device="meta")]}, ShapeError, "adapter 1: A .* on meta",
    ),
    "A-of-another-K": ({"A": torch.zeros(R, K + 1)}, ShapeError, r"A \(7, 9\), B \(5, 7\) beside W \(5, 8\) do not"),
    "B-of-another-N": (
        {"B": torch.zeros(N + 1, R)},
        ShapeError, r"B \(6, 7\) beside W .* expected A \(R, 8\) and B \(5",
    ),
    "B-not-transposed": ({"B": torch.zeros(R, N)}, ShapeError, r"B \(7, 5\) and ranks of 7 .* B \(N, 7\)"),
    "A-of-three-dimensions": ({"A": torch.zeros(1, R, K)}, ShapeError, r"A \(1, 7, 8\)"),
    "A-of-integers": ({"A": torch.zeros(R, K, dtype=torch.int8)}, ShapeError, "A torch.int8, B .*: expected floating"),
    "A-elsewhere": ({"A": torch.zeros(R, K, device="meta"), "slots": {}}, ShapeError, "A is on meta, X on cpu"),
    "B-elsewhere": ({"B": torch.zeros(N, R, device="meta")}, ShapeError, "B is on meta, X on cpu; expected one device"),
    "slots-starts-too-few": (
        {"slots": {"starts": ints(0)}},
        ShapeError, r"ranks is torch.int32 \(3,\); expected .* \(L,",
    ),
    "slots-ranks-too-few": ({"slots": {"ranks": ints(3)}}, ShapeError, r"ranks is torch.int32 \(1,\); expected"),
    "slots-ranks-of-64-bits": (
        {"slots": {"ranks": ints(3, 0, 4, dtype=torch.int64)}},
        ShapeError, "ranks is torch.int64 .*; expected torch.int32",
    ),
    "slots-scalings-of-16-bits": (
        {"slots": {"scalings": torch.ones(L, dtype=torch.float16)}},
        ShapeError, "torch.float16 .*; expected torch.float32",
    ),
    "slots-starts-spaced": (
        {"slots": {"starts": ints(0, 9, 3, 9, 3, 9)[::2]}},
        ShapeError, r"starts has stride 2; .* starts.contiguous\(\)",
    ),
    "slots-starts-elsewhere": (
        {"slots": {"starts": ints(0, 0, 3).to("meta")}},
        ShapeError, "starts is on meta, X on cpu",
    ),
    "slots-max_rank-below-zero": (
        {"slots": {"max_rank": -1}},
        ShapeError, "max_rank=-1 with A of 7 rows; expected 0 to 7",
    ),
    "slots-max_rank-too-large": (
        {"slots": {"max_rank": 8}},
        ShapeError, "max_rank=8 with A of 7 rows; expected 0 to 7",
    ),
    "X-of-another-K": (
        {"X": torch.zeros(M, K + 1)},
        ShapeError, r"X \(6, 9\) and W \(5, 8\) do not fit: expected X \(",
    ),
    "X-a-number": ({"X": torch.tensor(1.0)}, ShapeError, r"X \(\) and W"),
    "X-of-integers": (
        {"X": torch.zeros(M, K, dtype=torch.int32)},
        ShapeError, "X is torch.int32, W torch.float32.*Cast X",
    ),
    "X-of-another-dtype": (
        {"X": torch.zeros(M, K).half()},
        ShapeError, "X is torch.float16, W torch.float32.*autocast",
    ),
    "W-elsewhere": ({"W": torch.zeros(N, K, device="meta")}, ShapeError, "X is on cpu, W on meta; expected one device"),
    "W-requires-grad": ({"W": torch.zeros(N, K).requires_grad_()}, FrozenWeightError, r"W.detach\(\)"),
    "bias-of-another-shape": (
        {"bias": torch.zeros(N + 1)},
        ShapeError, r"bias has shape \(6,\); expected \(5,\) or None",
    ),
    "bias-of-another-dtype": ({"bias": torch.zeros(N).half()}, ShapeError, "bias torch.float16; they must share one"),
    "bias-elsewhere": ({"bias": torch.zeros(N, device="meta")}, ShapeError, "expected one device for X, W and bias"),
    "backend-unknown": ({"backend": "cutlass"}, ConfigError, "cutlass"),
    "plan-unknown": ({"backend": "triton:fastest"}, ConfigError, "'triton:fastest' is unknown; accepted are .*extend"),
    "plan-of-another-operator": (
        {"backend": "triton:one_pass"}, BackendUnavailableError,
        r"plan 'one_pass' cannot run here: it is none of multi_lora_linear's \(eager, extend",
    ),
    "plan-for-few-rows": (
        {"backend": "triton:decode", "X": torch.zeros(65, K), "ids": ints(*[0] * 65)}, BackendUnavailableError,
        "plan 'decode' cannot run here: .*(65 rows.*64|no_grad)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    given, error, message = REFUSED[name]
    with pytest.raises(error, match=f"(?s){message}") as caught:
        call(**given)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 400


def test_the_good_operands_are_good():
    o = good()
    Y = call()
    for m, slot in enumerate(o["ids"].tolist()):
        first, r = ([0, 3, 3][slot], RANKS[slot]) if slot >= 0 else (0, 0)
        own = slice(first, first + r)
        update = o["scalings"][slot] * (o["X"][m] @ o["A"][own].T) @ o["B"][:, own].T if r else 0
        assert torch.allclose(Y[m], linear(o["X"][m], o["W"], o["bias"]) + update, atol=1e-5)


HOSTILE: dict[str, dict[str, Tensor]] = {
    "ids-beyond": {"ids": ints(0, 3, 4, 2**31 - 1, 65536, 2)},
    "ids-below": {"ids": ints(0, -2, -3, -(2**31), -65536, 2)},
    "ranks-beyond-max_rank": {"ranks": ints(5, 6, 4)},
    "ranks-beyond-A": {"starts": ints(4, 6, 5), "ranks": ints(4, 4, 4)},
    "ranks-huge": {"ranks": ints(2**31 - 1, 2**31 - 1, 2**30)},
    "ranks-below-zero": {"ranks": ints(-1, -(2**31), 4)},
    "starts-beyond-A": {"starts": ints(7, 8, 2**31 - 1)},
    "starts-below-zero": {"starts": ints(-1, -4, -(2**31))},
    "starts-and-ranks-huge": {"starts": ints(2**31 - 1, 2**31 - 3, -(2**31)), "ranks": ints(2**31 - 1, 4, 2**31 - 1)},
    "everything": {"ids": ints(0, 1, 2, 3, -9, 2), "starts": ints(-1, 99, 5), "ranks": ints(4, 4, 99)},
}
PLANS = ("reference", "triton:eager", "triton:extend")


def surrounded(values: Tensor) -> Tensor:
    """The same values amid memory that is not a number: who reads too far, and uses it, is seen."""
    buffer = torch.full((values.shape[0] + 64, values.shape[1]), float("nan"), device=values.device)
    buffer[32:-32] = values
    return buffer[32:-32]


def defined(o: dict[str, Any], slots: Slots) -> list[int]:
    """The rank that each row may use: none of a slot that is not there or lies outside A; else what is within both
    max_rank and A."""
    ranks = []
    for slot in o["ids"].tolist():
        known = 0 <= slot < L
        first, r = (int(slots.starts[slot]), int(slots.ranks[slot])) if known else (0, 0)
        ranks.append(max(0, min(r, slots.max_rank, R - first)) if 0 <= first < R else 0)
    return ranks


@pytest.mark.parametrize("backend", PLANS)
@pytest.mark.parametrize("name", HOSTILE)
def test_what_only_the_device_sees_has_a_defined_result(name, backend, device, poisoned):
    """The operators beneath the front end, which looks at ids on a CPU alone; and the gradients."""
    given = dict(HOSTILE[name])
    o = good() | ({"ids": given.pop("ids")} if "ids" in given else {})
    o = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in o.items()}
    A, Bt = surrounded(o["A"]), surrounded(o["B"].t())
    slots = Slots.of(A, Bt.t(), o["ranks"], o["scalings"])
    slots = slots._replace(**{key: value.to(device) for key, value in given.items()})
    forward = Y, XA = ops.multi_lora_linear_fwd(o["X"], o["W"], slots, o["ids"], o["bias"], True, backend)
    dY = torch.ones_like(Y)
    grads = ops.multi_lora_linear_bwd(dY, o["X"], o["W"], slots, o["ids"], XA, GradMask(bias=True), backend)
    dA, dB, dX = torch.zeros_like(A), torch.zeros_like(Bt.t()), dY @ o["W"]
    expected = linear(o["X"], o["W"], o["bias"])
    for m, r in enumerate(defined(o, slots)):
        if r:
            slot, x = int(o["ids"][m]), o["X"][m]
            own, s = slice(int(slots.starts[slot]), int(slots.starts[slot]) + r), float(slots.scalings[slot])
            expected[m] += s * (x @ A[own].T) @ Bt[own]
            dX[m] += s * (dY[m] @ Bt[own].T) @ A[own]
            dA[own] += s * torch.outer(dY[m] @ Bt[own].T, x)
            dB[:, own] += s * torch.outer(dY[m], x @ A[own].T)
    assert all(T.isfinite().all() for T in (*forward, *grads))
    shared = "ranks" in given and bool((slots.ranks > torch.tensor(RANKS, device=device)).any())
    for what, got, wanted in zip(("Y", "dX", "dA", "dB"), (Y, *grads), (expected, dX, dA, dB), strict=False):
        if not (shared and what in ("dA", "dB")):  # a row of A that two slots have has no gradient of its own
            assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4), what
