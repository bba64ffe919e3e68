import torch

from benchmarks.overhead import CALLS, MODES, overhead, table
from benchmarks.rows import Machine, record

MACHINE = Machine("GPU X", "1", "2", "3", "4", "5", "6")


def test_every_mode_of_every_layer_has_a_row_and_a_line_in_microseconds() -> None:
    rows = overhead(torch.device("cpu"), torch.float32, (0.0, 0.1), rounds=1)
    assert [row.implementation for row in rows[:4]] == ["frozen linear", "lora_kernels", "peft", "addmm chain"]
    assert [(row.mode, row.dropout) for row in rows[::4]] == [(mode, p) for p in (0.0, 0.1) for mode in MODES]
    assert {row.op for row in rows} == {"overhead"}
    assert all(0 < row.ms_p50 < 50 for row in rows), f"a call, not {CALLS} of them"
    lines = table([record(row, MACHINE) for row in rows])
    assert len(lines) == len(rows)
    assert lines[0].endswith("+0.0 us over F.linear")
    assert f"{1e3 * rows[1].ms_p50:.1f} us" in lines[1]
