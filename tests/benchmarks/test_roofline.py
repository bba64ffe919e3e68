import pytest
import torch

from benchmarks.cases import Case
from benchmarks.roofline import (
    Ceilings,
    Work,
    backward_work,
    ceiling_rows,
    ceilings_of,
    forward_work,
    measure_ceilings,
    passes,
)
from benchmarks.timing import RehearsalClock

CASE = Case(M=8192, N=4096, K=4096, r=16)


def test_work_of_the_frozen_layer() -> None:
    base = 2 * 8192 * 4096 * 4096
    assert forward_work(CASE, lora=False) == Work(base, 2 * (8192 * 4096 + 4096 * 4096 + 8192 * 4096))
    assert backward_work(CASE, lora=False).flop == base


def test_lora_adds_a_hundredth_of_the_arithmetic() -> None:
    frozen, lora = forward_work(CASE, lora=False), forward_work(CASE)
    assert lora.flop / frozen.flop == pytest.approx(1 + 16 / 4096 + 16 / 4096)
    assert backward_work(CASE).flop - backward_work(CASE, lora=False).flop == 4 * 8192 * 16 * 8192
    assert backward_work(CASE).bytes > backward_work(CASE, lora=False).bytes + 2 * 8192 * 4096  # X is read again


def test_the_bound_is_the_larger_of_arithmetic_and_traffic() -> None:
    ceilings = Ceilings({"bf16": 500.0, "fp32": 50.0}, gbps=3000.0)
    assert ceilings.milliseconds(Work(flop=10**12, bytes=1), torch.bfloat16) == pytest.approx(2.0)
    assert ceilings.milliseconds(Work(flop=10**12, bytes=1), torch.float32) == pytest.approx(20.0)
    assert ceilings.milliseconds(Work(flop=1, bytes=3 * 10**9), torch.bfloat16) == pytest.approx(1.0)


def test_a_graph_does_the_work_of_its_mode() -> None:
    assert passes(CASE, "fwd_graph") == passes(CASE, "fwd") == (forward_work(CASE),)
    assert passes(CASE, "fwd_bwd_graph") == (forward_work(CASE), backward_work(CASE))


def test_ceilings_follow_from_the_clock() -> None:
    ceilings = measure_ceilings(RehearsalClock(), torch.device("cpu"), (torch.float32,), side=100, copy_bytes=4000)
    assert ceilings.tflops == {"fp32": pytest.approx(2 * 100**3 / 1e9)}  # in a millisecond
    assert ceilings.gbps == pytest.approx(2 * 4000 / 1e6)


def test_ceilings_are_kept_as_rows() -> None:
    ceilings = Ceilings({"bf16": 500.0, "fp32": 50.0}, gbps=3000.0)
    rows = [vars(row) for row in ceiling_rows(ceilings, side=1000)]
    assert [row["mode"] for row in rows] == ["matmul", "matmul", "copy"]
    assert rows[0]["ms_p50"] == pytest.approx(2e9 / 500e12 * 1e3)
    assert ceilings_of(rows) == ceilings
    assert ceilings_of(rows[:2]) is None
