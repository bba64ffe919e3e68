import torch

from benchmarks.cases import Case
from benchmarks.gemm import plain_gemm
from benchmarks.measure import Bench
from benchmarks.roofline import Ceilings
from benchmarks.timing import RehearsalClock


def test_our_plain_product_is_right_at_no_rank_and_stands_beside_the_librarys(device: str) -> None:
    bench = Bench(torch.device(device), RehearsalClock(), lambda: Ceilings({"bf16": 1.0}, 1.0), rounds=1)
    rows, found = plain_gemm(Case(33, 88, 64, 16), bench)
    assert {check.status for check in found} == {"ok"}
    assert [(row.op, row.r) for row in rows if row.plan == "default"] == [
        ("gemm", 0),
        ("gemm", 1),
        ("gemm_nn", 0),
        ("gemm_nn", 1),
    ]
    assert [row.op for row in rows if row.implementation == "cublas"] == ["gemm", "gemm_nn"]
    assert all(row.ratio_to_frozen == 1 for row in rows)  # by the rehearsal's clock
