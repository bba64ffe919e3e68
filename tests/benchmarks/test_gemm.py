import dataclasses

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.gemm import plain_gemm, rungs
from benchmarks.measure import Bench
from benchmarks.roofline import Ceilings
from benchmarks.timing import RehearsalClock
from lora_kernels.planning.choose import triton_kernels

BENCH = Bench(torch.device("cpu"), RehearsalClock(), lambda: Ceilings({"bf16": 1.0}, 1.0), rounds=1)


@pytest.mark.parametrize("rung", [rung for rung in rungs() if not rung.startswith("gluon")])
def test_a_rungs_plain_product_is_right_at_no_rank_and_stands_beside_the_librarys(rung: str, device: str) -> None:
    bench = dataclasses.replace(BENCH, device=torch.device(device))
    rows, found = plain_gemm(Case(33, 88, 64, 16), rung, bench)
    assert {check.status for check in found} == {"ok"}, found
    ours = [(row.op, row.r) for row in rows if row.plan == "default"]
    assert ours == [("gemm", 0), ("gemm", 1), ("gemm_nn", 0), ("gemm_nn", 1)]
    assert [row.op for row in rows if row.implementation == "cublas"] == ["gemm", "gemm_nn"]
    assert all(row.ratio_to_frozen == 1 for row in rows)  # by the rehearsal's clock


def test_a_rung_that_cannot_run_says_so() -> None:
    rows, (check,) = plain_gemm(Case(33, 81, 64, 16), "tma_extend", BENCH)
    assert rows == []
    assert (check.check, check.status) == ("gemm", "refused")
    assert "tma_extend" in check.message


def test_every_rung_of_the_launchers_is_climbed() -> None:
    assert rungs()[0] == "shrink_extend"
    assert set(rungs()[1:]) == set(triton_kernels().EXTEND)
