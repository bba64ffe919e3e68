import csv
import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks.rows import (
    _LATER,
    REHEARSAL,
    Check,
    Journal,
    Machine,
    Row,
    columns,
    read_rows,
    record,
    this_machine,
    write_csv,
)

MACHINE = Machine("GPU", "1", "2", "3", "4", "5", "6")
ROW = Row(
    "lora_linear", "fwd", "bf16", "dense", 1, 2, 3, 4, 1, 0.1, "eager", "lora_kernels", 1 / 3, 0.25, 0.5, 1.0, 2.0,
    3.0, None, 1.0, None,
)  # fmt: skip


def test_a_row_has_the_columns_that_results_are_published_with() -> None:
    expected = (
        "op mode dtype format M N K r L dropout plan implementation ms_p50 ms_p20 ms_p80 tflops gbps pct_of_bound "
        "peak_mib ratio_to_frozen ratio_to_best_rival saved_mib operators ranks distribution sequence "
        "gpu driver cuda torch triton commit date"
    )
    assert columns(Row) == expected.split()


def test_a_record_is_flat_and_rounded() -> None:
    flat = record(ROW, MACHINE)
    assert list(flat) == columns(Row)
    assert flat["ms_p50"] == 0.333333
    assert flat["peak_mib"] is None
    assert flat["gpu"] == "GPU"


def test_the_journal_gives_back_what_was_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    check = record(Check("rule", "bf16", 1, 2, 3, 4, 0.0, "x", "Y", "ok"), MACHINE)
    journal.append("a", [record(ROW, MACHINE)], [])
    journal.append("b", [], [check])
    assert journal.done() == {"a", "b"}
    assert journal.rows() == [record(ROW, MACHINE)]
    assert journal.checks() == [check]


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_line_that_was_cut_off_is_a_unit_not_done(tmp_path: Path, cut: int) -> None:
    journal = Journal(tmp_path)
    journal.append("a", [record(ROW, MACHINE)], [])
    whole = journal.path.read_bytes()
    journal.append("b", [record(ROW, MACHINE)], [])
    journal.path.write_bytes(journal.path.read_bytes()[: len(whole) + cut])
    assert journal.done() == {"a"}
    journal.append("c", [], [])
    assert journal.done() == {"a", "c"}


def test_tables_are_csv_with_empty_cells_for_what_was_not_measured(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("a", [record(ROW, MACHINE)], [])
    journal.write_tables()
    with (tmp_path / "rows.csv").open(newline="") as file:
        (read,) = csv.DictReader(file)
    assert list(read) == columns(Row)
    assert read["peak_mib"] == ""
    assert read_rows(tmp_path) == journal.rows()
    assert (tmp_path / "checks.csv").read_text().strip() == ",".join(columns(Check))


def test_a_table_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_csv(path, ["a"], [{"a": 1}, {"a": 2}])
    write_csv(path, ["a"], [{"a": None}])
    assert path.read_text().split() == ["a", '""']
    assert list(tmp_path.iterdir()) == [path]


def test_this_machine_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_COMMIT", "abc")
    machine = this_machine()
    assert machine.torch == torch.__version__
    assert machine.commit == "abc"
    assert machine.gpu.startswith("cpu: ") or torch.cuda.is_available()
    assert this_machine(rehearse=True).gpu == REHEARSAL
    assert dataclasses.asdict(machine)["date"].endswith("+00:00")


def test_a_table_from_before_a_column_was_added_is_read(tmp_path: Path) -> None:
    older = [name for name in columns(Row) if name not in _LATER]
    kept = {name: value for name, value in record(ROW, MACHINE).items() if name in older}
    write_csv(tmp_path / "rows.csv", older, [kept])
    assert read_rows(tmp_path / "rows.csv") == [record(ROW, MACHINE)]
    write_csv(tmp_path / "rows.csv", older[1:], [])
    with pytest.raises(ValueError, match="not a table of rows"):
        read_rows(tmp_path)


def test_a_sum_of_projections_is_read_back(tmp_path: Path) -> None:
    row = record(dataclasses.replace(ROW, N="8+4+4", operators=7), MACHINE)
    write_csv(tmp_path / "rows.csv", columns(Row), [row])
    assert read_rows(tmp_path) == [row]
