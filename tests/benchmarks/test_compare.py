import dataclasses
from pathlib import Path

import pytest

from benchmarks import compare as comparing
from benchmarks.compare import compare, lines
from benchmarks.rows import REHEARSAL, Machine, Record, Row, columns, record, write_csv

MACHINE = Machine("GPU X", "1", "12.8", "2.11", "3.6", "abc", "today")


def _row(name: str, ms: float, noise: float = 0.01, plan: str = "", machine: Machine = MACHINE, N: int = 8) -> Record:
    row = Row(
        "lora_linear", "fwd", "bf16", "dense", 4, N, 16, 2, 1, 0.1, plan, name, ms, ms * (1 - noise), ms * (1 + noise),
        1.0, 2.0, 3.0, None, 1.0, None,
    )  # fmt: skip
    return record(row, machine)


def _old() -> list[Record]:
    return [_row("frozen linear", 1.0), _row("lora_kernels", 1.1, plan="auto (eager)"), _row("peft", 1.5)]


def _written(folder: Path, name: str, rows: list[Record]) -> str:
    write_csv(folder / name, columns(Row), rows)
    return str(folder / name)


def _main(tmp_path: Path, new: list[Record], *options: str) -> int:
    return comparing.main([_written(tmp_path, "old.csv", _old()), _written(tmp_path, "new.csv", new), *options])


def test_the_same_rows_are_no_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(tmp_path, _old()) == 0
    assert (
        "3 rows matched: 0 slower beyond noise (0 of them ours), 0 faster; 0 missing, 0 new" in capsys.readouterr().out
    )


def test_a_regression_beyond_noise_is_named_and_ends_with_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = [_row("frozen linear", 1.0), _row("lora_kernels", 1.3, plan="auto (one_pass)"), _row("peft", 1.5)]
    assert _main(tmp_path, new) == 1
    assert "SLOWER  1.182" in (printed := capsys.readouterr().out)
    assert "lora_linear fwd M4 N8 K16 r2 p0.1 bf16: lora_kernels auto" in printed  # whatever auto chose


@pytest.mark.parametrize(("ms", "noise"), [(1.12, 0.001), (1.3, 0.2)], ids=["below the threshold", "within noise"])
def test_what_may_be_chance_is_no_regression(tmp_path: Path, ms: float, noise: float) -> None:
    new = [_row("frozen linear", 1.0), _row("lora_kernels", ms, noise, "auto (eager)"), _row("peft", 1.5)]
    assert _main(tmp_path, new) == 0


def test_a_slower_rival_is_told_and_is_no_regression_of_ours() -> None:
    found = compare(_old(), [_row("frozen linear", 1.0), _row("peft", 3.0), _row("lora_kernels", 1.0, plan="auto")])
    text = "\n".join(lines(found, 0.02, "time"))
    assert "slower  2.000" in text
    assert "faster  0.909" in text
    assert not found.regressions(0.02)


def test_rows_of_one_side_are_listed() -> None:
    found = compare(_old(), [*_old()[:2], _row("lora_kernels", 1.0, plan="auto", N=9)])
    text = "\n".join(lines(found, 0.02, "time"))
    assert "missing  lora_linear fwd M4 N8 K16 r2 p0.1 bf16: peft" in text
    assert "new      lora_linear fwd M4 N9 K16" in text


def test_drift_of_the_machine_is_told_and_can_be_divided_out() -> None:
    new = [_row("frozen linear", 1.2), _row("lora_kernels", 1.32, plan="auto"), _row("peft", 1.8)]
    assert "takes 1.200 times" in "\n".join(lines(compare(_old(), new), 0.02, "time"))
    assert compare(_old(), new).regressions(0.02)
    assert not compare(_old(), new, unit="frozen").regressions(0.02)


def test_versions_that_differ_are_printed_and_machines_must_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = dataclasses.replace(MACHINE, torch="2.13", commit="def")
    assert _main(tmp_path, [row | {"torch": "2.13", "commit": newer.commit} for row in _old()]) == 0
    assert "differs  torch: 2.11 -> 2.13" in capsys.readouterr().out
    elsewhere = [row | {"gpu": "GPU Y"} for row in _old()]
    with pytest.raises(SystemExit) as ended:
        _main(tmp_path, elsewhere)
    assert ended.value.code == 2
    assert "OLD is of GPU X, NEW of GPU Y" in capsys.readouterr().err
    assert _main(tmp_path, elsewhere, "--any-machine") == 0


def test_made_up_times_and_strangers_are_refused() -> None:
    rehearsed = [row | {"gpu": REHEARSAL} for row in _old()]
    with pytest.raises(ValueError, match="made up"):
        compare(rehearsed, rehearsed)
    with pytest.raises(ValueError, match="no row in common"):
        compare(_old(), [_row("lora_kernels", 1.0, N=77)])


def test_markdown_has_a_line_for_every_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = [_row("frozen linear", 1.0), _row("lora_kernels", 1.3, plan="auto"), _row("peft", 1.5)]
    assert _main(tmp_path, new, "--markdown") == 1
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| lora_linear")]
    assert len(table) == 3
    assert table[0].endswith("| 1.182 | **slower** |")


def test_a_folder_holds_its_rows_and_anything_else_is_refused(tmp_path: Path) -> None:
    _written(tmp_path, "rows.csv", _old())
    assert comparing.main([str(tmp_path), str(tmp_path / "rows.csv")]) == 0
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for place in (tmp_path / "other.csv", tmp_path / "nowhere"):
        with pytest.raises(SystemExit):
            comparing.main([str(place), str(tmp_path)])
