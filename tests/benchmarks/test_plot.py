import dataclasses
from pathlib import Path

import pytest
from matplotlib import image

from benchmarks import plot as plotting
from benchmarks.cases import Case, stacked
from benchmarks.curves import curve_columns
from benchmarks.roofline import Ceilings, ceiling_rows
from benchmarks.rows import REHEARSAL, Machine, Record, Row, columns, record, write_csv

MACHINE = Machine("GPU X", "1", "12.8", "2.11", "3.6", "abc", "2026-01-02T03:04:05")
CONTENDERS = {
    ("frozen linear", ""): 1.0, ("lora_kernels", "auto (eager)"): 1.05, ("lora_kernels", "eager"): 1.2,
    ("lora_kernels", "tma_extend"): 1.1, ("lora_kernels", "a_new_plan"): 1.3, ("peft", ""): 1.5,
}  # fmt: skip


def _rows(case: Case, mode: str, machine: Machine = MACHINE) -> list[Record]:
    return [
        record(Row(case.op, mode, "bf16", "dense", case.M, case.N_shown, case.K, case.r, 1, case.p, plan, name, ratio,
                   0.98 * ratio, 1.03 * ratio, 300.0, 900.0, 50.0, 10 * ratio, ratio, ratio / 1.2, 8 * ratio, 20),
               machine)
        for (name, plan), ratio in CONTENDERS.items()
    ]  # fmt: skip


def _folder(path: Path, machine: Machine = MACHINE) -> Path:
    """Rows of several M and r in both modes, of a block, of training, of the overhead; ceilings; curves."""
    cases = [Case(8192, 4096, 4096, 16), *(Case(M, 4096, 4096, 16) for M in (1, 64)), Case(8192, 4096, 4096, 64)]
    cases.append(stacked(8192, (4096, 1024, 1024), 4096, 16))
    rows = [row for case in cases for mode in ("fwd", "fwd_bwd") for row in _rows(case, mode, machine)]
    rows += [
        row | {"op": "overhead", "mode": mode} for mode in ("fwd_no_grad", "fwd") for row in _rows(cases[0], "fwd")
    ]
    rows += [row | {"op": "train_llama", "mode": "train", "plan": ""} for row in _rows(cases[0], "fwd", machine)]
    steps = [row for row in _rows(cases[0], "fwd_bwd", machine) if row["implementation"] == "peft"]
    steps += [row | {"implementation": "lora_kernels accelerated"} for row in steps]
    rows += [row | {"op": "step_bert", "plan": ""} for row in steps]
    rows += [record(row, machine) for row in ceiling_rows(Ceilings({"bf16": 600.0}, 3000.0), 8192)]
    rows = [row | dataclasses.asdict(machine) for row in rows]
    path.mkdir(exist_ok=True)
    write_csv(path / "rows.csv", columns(Row), rows)
    points = [
        {"model": "llama", "implementation": name, "step": step, "loss": 3 / step, "difference": off, "allowed": 1e-5}
        | dataclasses.asdict(machine)
        for name, off in (("peft", 0.0), ("lora_kernels", 1e-7))
        for step in range(1, 8)
    ]
    write_csv(path / "curves.csv", curve_columns(), points)
    return path


EXPECTED = {f"{kind}_{mode}{tail}" for mode in ("fwd", "fwd_bwd") for kind, tail in
            (("ratio", ""), ("ratio", "_over_M"), ("ratio", "_over_r"), ("roofline", ""))}  # fmt: skip
EXPECTED |= {"memory", "overhead", "waterfall", "training_llama", "whole_steps"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    place = tmp_path_factory.mktemp("figures")
    return plotting.plot([_folder(place / "rows")], place)


@pytest.mark.slow
def test_every_figure_is_drawn_as_png_and_svg_and_none_is_empty(written: dict[str, list[Path]]) -> None:
    assert set(written) == EXPECTED
    for name, (png, svg) in written.items():
        pixels = image.imread(png)[..., :3]
        assert pixels.shape[0] > 300, name
        assert pixels.shape[1] > 600, name
        coloured = (pixels.max(axis=2) - pixels.min(axis=2)) > 0.2
        assert coloured.sum() > 300, f"{name} shows no series"
        assert svg.read_text().count("<path") > 20, name


def test_the_caption_says_where_with_what_and_when(written: dict[str, list[Path]]) -> None:
    drawn = written["ratio_fwd"][1].read_text()  # text is drawn as paths, with the words in comments
    for word in ("GPU X; driver 1; cuda 12.8; torch 2.11; triton 3.6; commit abc;", "2026-01-02"):
        assert word in drawn
    assert "not a measurement" in written["waterfall"][1].read_text()


def test_what_rows_do_not_hold_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(tmp_path / "rows.csv", columns(Row), _rows(Case(64, 64, 64, 8), "fwd_bwd"))
    assert plotting.main([str(tmp_path / "rows.csv"), "--out", str(tmp_path)]) == 0
    names = {line.partition(":")[0] for line in capsys.readouterr().out.splitlines()}
    assert names == {"ratio_fwd_bwd", "roofline_fwd_bwd", "memory", "waterfall"}


def test_a_rehearsal_says_so_and_machines_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rehearsed, made_up = tmp_path / "a", dataclasses.replace(MACHINE, gpu=REHEARSAL)
    rehearsed.mkdir()
    write_csv(rehearsed / "rows.csv", columns(Row), _rows(Case(64, 64, 64, 8), "fwd", made_up))
    assert "every time is made up" in plotting.plot([rehearsed], tmp_path)["ratio_fwd"][1].read_text()
    with pytest.raises(SystemExit):
        plotting.main([str(rehearsed), str(_folder(tmp_path / "b")), "--out", str(tmp_path)])
    assert "rows of GPU X, rehearsal: name rows of one machine" in capsys.readouterr().err


@pytest.mark.slow
def test_committed_rows_can_be_drawn(tmp_path: Path) -> None:
    results = Path(plotting.__file__).parent / "results"
    for folder in sorted(path.parent for path in results.rglob("rows.csv")):
        assert plotting.plot([folder], tmp_path / folder.name), folder
