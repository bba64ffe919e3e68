import dataclasses

from benchmarks.rows import REHEARSAL, Check, Machine, Record, Row, record
from benchmarks.summary import summary

MACHINE = Machine("GPU X", "1", "2", "3", "4", "5", "6")


def _row(implementation: str, plan: str, ratio: float, rival: float | None = None, mode: str = "fwd") -> Record:
    row = Row(
        "lora_linear", mode, "bf16", "dense", 8192, 4096, 4096, 16, 1, 0.0, plan, implementation, 0.4 * ratio, 0.4, 0.5,
        1.0, 2.0, 3.0, None, ratio, rival,
    )  # fmt: skip
    return record(row, MACHINE)


ROWS = [_row("frozen linear", "", 1.0), _row("peft", "", 1.4, 1.0), _row("lora_kernels", "auto (eager)", 1.05, 0.75)]


def test_a_case_is_one_line_with_the_fastest_first() -> None:
    assert "fwd M8192 N4096 K4096 r16 p0 bf16: frozen 0.4 ms; x auto 1.050, peft 1.400" in summary(ROWS, []).split("\n")


def test_targets_are_judged() -> None:
    assert "1.050, must 1.08, aim 1.03: met" in summary(ROWS, [])
    assert "1.020, must 1.08, aim 1.03: aim met" in summary([_row("lora_kernels", "auto (eager)", 1.02)], [])
    assert "1.300, must 1.08, aim 1.03: MISSED" in summary([_row("lora_kernels", "auto (eager)", 1.3)], [])


def test_a_loss_to_a_rival_is_printed() -> None:
    assert "slower on 0 of 1 cases, worst 0.750" in summary(ROWS, [])
    assert "slower on 1 of 1 cases, worst 1.200" in summary([_row("lora_kernels", "auto (eager)", 1.5, 1.2)], [])


def test_whole_steps_are_in_units_of_pefts() -> None:
    kinds = {"peft": (1.0, 200.0), "lora_kernels accelerated": (0.9, 150.0)}
    rows = [
        _row(name, "", ratio, ratio, "fwd_bwd") | {"op": "step_bert", "saved_mib": saved}
        for name, (ratio, saved) in kinds.items()
    ]
    line = "lora_kernels accelerated 0.900 of PEFT's time, 0.750 of what it saves for the backward"
    assert line in summary(rows, [])


def test_failures_are_printed() -> None:
    check = Check("rule", "bf16", 1, 2, 3, 4, 0.0, "triton:eager", "dA", "failed", message="off by a term")
    text = summary(ROWS, [record(check, MACHINE)] * 10)
    assert "checks: 0 ok, 10 failed, 0 refused, 0 not run" in text
    assert "FAILED rule triton:eager M1 N2 K3 r4 p0 bf16 dA: off by a term" in text
    assert "and 2 more, in checks.csv" in text


def test_a_skipped_phase_is_printed() -> None:
    phase = {"phase": "grid", "status": "skipped", "done": 0, "units": 4, "seconds": 0.0, "detail": "no time"}
    assert "phase grid skipped: 0 of 4 units. no time" in summary(ROWS, [], [phase])


def test_a_rehearsal_cannot_be_mistaken() -> None:
    machine = dataclasses.asdict(dataclasses.replace(MACHINE, gpu=REHEARSAL))
    assert "REHEARSAL: every time and ratio above is made up" in summary([row | machine for row in ROWS], [])


def test_nothing() -> None:
    assert summary([], []) == "nothing was measured"
