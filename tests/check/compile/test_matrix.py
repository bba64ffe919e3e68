"""How rows are made and dealt out, and that a crashing compiler costs one case."""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import torch

from lora_kernels.check.compile import matrix
from lora_kernels.check.compile.cases.case import Case, Layer
from lora_kernels.kernels.chip import CHIPS
from lora_kernels.kernels.tiles import GemmConfig, SplitConfig, TmaConfig
from lora_kernels.planning import cost

BARE = matrix.Row("sm_90", "extend", "r=16", "bfloat16", "128x128x64 w8 s3", 8192, 4096, 4096, 16)
ROW = replace(BARE, registers=115, code="ABCD")


def _process(code: int, *told: tuple[int, matrix.Row | None], stderr: str = "") -> subprocess.CompletedProcess[str]:
    lines = [json.dumps([number, row and asdict(row)]) for number, row in told]
    return subprocess.CompletedProcess([], code, "\n".join(lines), stderr)


def _processes(monkeypatch: pytest.MonkeyPatch, *runs: subprocess.CompletedProcess[str]) -> list[dict]:
    tasks: list[dict] = []
    waiting: Iterator[subprocess.CompletedProcess[str]] = iter(runs)

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        tasks.append(json.loads(command[-1]))
        return next(waiting)

    monkeypatch.setattr(matrix.subprocess, "run", run)
    return tasks


def test_a_crash_of_the_compiler_is_a_fault_of_its_case_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    second = replace(BARE, kernel="shrink")
    tasks = _processes(
        monkeypatch,
        _process(-11, (0, BARE), (1, second), stderr="LLVM ERROR"),
        _process(0, (0, BARE), (2, BARE), (-1, None), (-1, ROW), (-1, replace(ROW, kernel="da"))),
    )
    rows = matrix.compile_matrix(["sm_90"], jobs=1)
    assert [task["skip"] for task in tasks] == [[], [1]]
    assert [row.kernel for row in rows] == ["da", "extend", "shrink"]
    assert [list(row.faults) for row in rows] == [[], [], ["the compiler crashed with -11: LLVM ERROR"]]


def test_a_matrix_that_cannot_start_or_be_read_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    _processes(monkeypatch, _process(1, stderr="No module named 'triton'"))
    with pytest.raises(RuntimeError, match="start:\nNo module named 'triton'"):
        matrix.compile_matrix(["sm_90"], jobs=1)
    _processes(monkeypatch, _process(1, (0, BARE), (-1, None), stderr="nvdisasm failed"))
    with pytest.raises(RuntimeError, match="be read:\nnvdisasm failed"):
        matrix.compile_matrix(["sm_90"], jobs=1)


def test_a_second_kernel_that_several_launches_share_stands_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = [replace(ROW, kernel="reduce", variant=f"of {name} r=16", code="EFGH") for name in ("dx_da", "da")]
    other = replace(shared[0], code="IJKL")
    _processes(monkeypatch, _process(0, *((-1, row) for row in (ROW, *shared, other, replace(ROW, variant="r=64")))))
    rows = matrix.compile_matrix(["sm_90"], jobs=1)
    assert [(row.kernel, row.variant, row.code) for row in rows] == [
        ("extend", "r=16", "ABCD"), ("extend", "r=64", "ABCD"),
        ("reduce", "of da r=16", "EFGH"), ("reduce", "of dx_da r=16", "IJKL"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (GemmConfig(128, 64, 32, num_warps=8, num_stages=3), "128x64x32 w8 s3"),
        (GemmConfig(128, 64, 32, num_warps=8, num_stages=3, GROUP_M=4), "128x64x32 w8 s3 group_m=4"),
        (SplitConfig(64, 128, 512, num_warps=8, num_stages=2), "64x128 w8 s2 span_m=512"),
        (
            TmaConfig(128, 256, 64, num_warps=8, num_stages=3, FLATTEN=True, XA_STAGES=8),
            "128x256x64 w8 s3 flatten xa_stages=8",
        ),
    ],
)
def test_a_configuration_in_short(config: object, text: str) -> None:
    assert matrix.brief(config) == text


def _case(kernel: str, M: int = 8192) -> Case:
    layer = Layer(M, 4096, 4096, 16, "bits", torch.bfloat16)
    return layer.case(kernel, GemmConfig(128, 128, 64, num_warps=8, num_stages=3), lambda: None)


def test_a_launch_meets_the_cost_model_by_its_name_and_sizes() -> None:
    told = matrix.predicted(_case("dx_da"), "dx_da", CHIPS["sm_90"])
    problem = cost.CallShape("bwd", 8192, 4096, 4096, 16, torch.bfloat16, dropout=True, bits=True)
    assert told["flop"] == cost.dx_da(problem).flop
    assert told["moved"] == cost.dx_da(problem).bytes
    assert told["seconds"] == cost.seconds(cost.dx_da(problem), torch.bfloat16, CHIPS["sm_90"])
    assert told["bound"] == "compute"
    assert matrix.predicted(_case("shrink"), "shrink", CHIPS["sm_90"])["bound"] == "memory"
    assert matrix.predicted(_case("shrink", 1), "shrink", CHIPS["sm_90"])["bound"] == "launch"
    assert matrix.predicted(_case("new"), "new", CHIPS["sm_90"]) == {}


def test_stacked_projections_are_costed_together() -> None:
    Ns = (4096, 1024, 1024)
    case = replace(_case("stacked_extend"), N=sum(Ns), Ns=Ns)
    told = matrix.predicted(case, "stacked_extend", CHIPS["sm_90"])
    assert told["flop"] == 2 * 8192 * sum(Ns) * (4096 + 16)
    problem = cost.CallShape("bwd", 8192, sum(Ns), 4096, 3 * 16, torch.bfloat16, dropout=True, bits=True)
    told = matrix.predicted(replace(case, kernel="stacked_dx"), "reduce", CHIPS["sm_90"])
    assert told["moved"] == cost.reduce_da(problem).bytes


def test_kernels_element_by_element_move_their_matrices_once() -> None:
    told = matrix.predicted(_case("swiglu"), "swiglu", CHIPS["sm_90"])
    assert (told["flop"], told["moved"], told["bound"]) == (0, 3 * 2 * 8192 * 4096, "memory")


def test_the_sum_after_a_kernel_is_as_large_as_its_partials() -> None:
    problem = cost.CallShape("bwd", 8192, 4096, 4096, 16, torch.bfloat16, dropout=True, bits=True)
    for kernel, launch in (("dyb_db", cost.reduce(problem)), ("dx_da", cost.reduce_da(problem))):
        assert matrix.predicted(_case(kernel), "reduce", CHIPS["sm_90"])["moved"] == launch.bytes
