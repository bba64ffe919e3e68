import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_round
from benchmarks.phases import Round
from benchmarks.rows import REHEARSAL, Journal
from benchmarks.schedule import PHASES, Phase
from lora_kernels.planning.choose import OPT_IN, PLANS

ROOT = Path(gpu_round.__file__).resolve().parents[1]


def _round(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_round", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_rehearsal_walks_through_every_phase_and_goes_on_where_it_was(tmp_path: Path) -> None:
    done = _round("--rehearse", "--budget", "600", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [(row["phase"], row["status"]) for row in _table(tmp_path / "phases.csv")] == [
        (phase.name, "done") for phase in PHASES
    ], (tmp_path / "round.log").read_text()
    rows, checks = _table(tmp_path / "rows.csv"), _table(tmp_path / "checks.csv")
    assert {row["gpu"] for row in [*rows, *checks]} == {REHEARSAL}
    assert {check["status"] for check in checks} <= {"ok", "refused", "not run"}, done.stdout
    assert {check["check"] for check in checks} == {
        "rule", "rule lora_linear_stacked", "rule lora_mlp", "mask", "determinism", "keep rate", "gemm", "tune",
        "curve", "memcheck", "racecheck", "profile", "model step_bert", "rule multi_lora_linear",
        "launches multi_lora_linear", "replays multi_lora_linear", "memcheck multi_lora_linear",
        "racecheck multi_lora_linear",
    }  # fmt: skip
    assert {row["op"] for row in rows} == {
        "lora_linear", "lora_linear_stacked", "lora_mlp", "gemm", "gemm_nn", "overhead", "train_bert", "step_bert",
        "ceiling", "multi_lora_linear",
    }  # fmt: skip
    assert {row["mode"] for row in rows} >= {"fwd", "fwd_bwd", "fwd_graph", "fwd_bwd_graph"}
    right = {check["implementation"] for check in checks if check["check"] == "rule" and check["status"] == "ok"}
    assert right >= {f"lora_kernels triton:{plan}" for plan in PLANS + OPT_IN}
    assert {row["plan"].partition(" ")[0] for row in rows} >= {*PLANS, *OPT_IN, "auto"}
    assert len(_table(tmp_path / "curves.csv")) > 20
    assert {row["implementation"] for row in rows} >= {
        "peft",
        "peft fp32 adapters",
        "peft torch.compile",
        "addmm chain",
    }
    assert done.stdout.rstrip().endswith("REHEARSAL: every time and ratio above is made up")
    assert len([path for path in tmp_path.iterdir() if path.suffix != ".part"]) <= 8

    kept = (tmp_path / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(kept[:-40])  # cut off within its last unit
    again = _round("--rehearse", "--budget", "600", "--out", str(tmp_path))
    assert again.returncode == 0, again.stderr
    statuses = [row["status"] for row in _table(tmp_path / "phases.csv")]
    assert statuses == ["done before"] * (len(PHASES) - 1) + ["done"]
    assert len(_table(tmp_path / "rows.csv")) == len(rows)

    if not gpu_round.torch.cuda.is_available():
        return
    mixed = _round("--out", str(tmp_path))
    assert mixed.returncode == 2
    assert "holds rows of rehearsal" in mixed.stderr


@pytest.mark.slow
def test_a_phase_that_does_not_fit_the_budget_is_skipped_in_words(tmp_path: Path) -> None:
    done = _round("--rehearse", "--budget", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    phases = _table(tmp_path / "phases.csv")
    assert {row["status"] for row in phases} == {"skipped"}
    assert "needs about 60 s" in phases[0]["detail"]
    assert "[gemm] skipped: 0 of" in done.stdout


@pytest.mark.skipif(gpu_round.torch.cuda.is_available(), reason="it would begin a round")
def test_without_a_gpu_there_is_no_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_round.main(["--out", str(tmp_path / "new")])
    assert "--rehearse" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_rehearsal_does_not_go_into_the_folder_of_a_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Journal(tmp_path).append("a", [{"gpu": "NVIDIA H100"}], [])
    with pytest.raises(SystemExit):
        gpu_round.main(["--rehearse", "--out", str(tmp_path)])
    assert "holds rows of NVIDIA H100" in capsys.readouterr().err


def _conductor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, limit: float, **phase: Any
) -> gpu_round.Outcome:
    """Runs one phase whose processes are ``program`` instead of workers."""
    monkeypatch.setattr(gpu_round, "PHASES", (Phase("gemm", 0, limit, **phase),))
    monkeypatch.setattr(gpu_round, "GRACE", 0.0)
    monkeypatch.setattr(gpu_round.Conductor, "command", lambda *_: [sys.executable, "-c", program])
    with (tmp_path / "round.log").open("a") as log:
        conductor = gpu_round.Conductor(tmp_path, True, Journal(tmp_path), log)
        (outcome,) = conductor.run(budget=1e4, only=["gemm"])
    return outcome


def test_a_hang_costs_its_phase_and_is_blamed_on_the_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = _conductor(tmp_path, monkeypatch, "import time; time.sleep(60)", limit=0.5)
    assert (outcome.status, outcome.done) == ("incomplete", 1)
    assert "cut off" in outcome.detail
    (check,) = Journal(tmp_path).checks()
    assert check["status"] == "failed"
    assert "did not end within" in check["message"]
    assert check["gpu"] == REHEARSAL


def test_a_unit_that_hangs_is_killed_and_the_rest_of_its_plan_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = ["gemm/a x", "gemm/b x", "gemm/a y", "gemm/b y"]
    monkeypatch.setattr(Round, "units", lambda self, phase: dict.fromkeys(units))
    hang = "import time; time.sleep(60)"
    outcome = _conductor(tmp_path, monkeypatch, hang, limit=30, patience=0.3, by_plan=True)
    assert (outcome.status, outcome.done) == ("done", 4)
    found = {check["what"]: (check["status"], check["message"]) for check in Journal(tmp_path).checks()}
    assert {unit: found[unit][0] for unit in units} == {
        "gemm/a x": "failed", "gemm/b x": "failed", "gemm/a y": "not run", "gemm/b y": "not run",
    }  # fmt: skip
    assert found["gemm/a y"][1] == "not begun: gemm/a x hung"


def test_a_phase_with_retries_begins_a_hung_process_anew_without_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Round, "units", lambda self, phase: {"gemm/a": None})
    tries = tmp_path / "tries"
    hang = f"open({str(tries)!r}, 'a').write('.'); import time; time.sleep(60)"
    outcome = _conductor(tmp_path, monkeypatch, hang, limit=30, patience=2, retries=2)
    assert outcome.done == 1
    assert tries.read_text() == "..."
    (check,) = Journal(tmp_path).checks()
    assert "did not end within" in check["message"]


def test_a_crash_is_blamed_on_the_unit_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = _conductor(tmp_path, monkeypatch, "import os; os.kill(os.getpid(), 11)", limit=60)
    assert outcome.status == "done"  # every unit, one crash each
    assert {"signal 11" in check["message"] for check in Journal(tmp_path).checks()} == {True}


def test_a_process_that_cannot_start_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = _conductor(tmp_path, monkeypatch, "raise SystemExit(1)", limit=60)
    assert (outcome.status, outcome.done) == ("incomplete", 0)
    assert "ended with status 1, see round.log" in outcome.detail


def test_unknown_phases_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_round.main(["--rehearse", "--only", "gemm,nothing", "--out", str(tmp_path)])
    assert "unknown phases nothing" in capsys.readouterr().err
