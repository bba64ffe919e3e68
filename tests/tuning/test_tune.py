"""Tuning end to end in the interpreter: the table, going on after an interruption, a budget, candidates that fail."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from lora_kernels.errors import BackendUnavailableError
from lora_kernels.kernels.tiles import GemmConfig
from lora_kernels.planning import tuned
from lora_kernels.planning.cost import CallShape
from lora_kernels.tuning import tune as tuner
from lora_kernels.tuning.measure import TuningRun
from lora_kernels.tuning.tune import Outcome, Progress, tune

FWD = CallShape("fwd", 33, 80, 64, 8, torch.bfloat16)
TWO = (FWD, dataclasses.replace(FWD, op="bwd"))
TILES = GemmConfig(32, 32, 32, num_warps=4, num_stages=2)


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch):
    monkeypatch.setattr(tuner, "candidates", lambda q, chip: [("eager", None), ("shrink_extend", TILES)])


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "table.json"


@pytest.fixture
def rehearse(device, out):
    def run(problems=TWO, **options) -> tuple[Outcome, list[Progress]]:
        told: list[Progress] = []
        options = {"out": out, "on_progress": told.append, "rounds": 1} | options
        return tune(problems, torch.device(device), rehearse=True, **options), told

    return run


def test_a_rehearsal_from_end_to_end(rehearse, out):
    outcome, told = rehearse()
    assert [(e.op, len(e.measured)) for e in outcome.entries] == [("fwd", 2), ("bwd", 2)]
    assert outcome.entries[0].measured[1].tiles == TILES
    assert not outcome.left
    assert not outcome.faults
    assert [p.text for p in told if p.done == 0] == [
        "begun", "eager", "shrink_extend M32 N32 K32 num_warps4 num_stages2 GROUP_M8", "timing 2 candidates"
    ]  # fmt: skip
    assert {p.total for p in told} == {2}
    assert tuned.loads(out.read_text(), "rehearsal", rehearsal=True) == outcome.entries
    with pytest.warns(UserWarning, match="rehearsal"):
        assert tuned.read(out, "rehearsal") == []
    assert not list(out.parent.glob("*.attempts"))


def test_interrupted_it_goes_on(rehearse, out):
    def interrupt(progress: Progress) -> None:
        if progress.done == 1 and progress.text == "eager":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rehearse(on_progress=interrupt)
    kept = tuned.loads(out.read_text(), "rehearsal", rehearsal=True)
    assert [entry.op for entry in kept] == ["fwd"]
    outcome, told = rehearse()
    assert [p.text for p in told if p.done == 0] == ["measured before"]
    assert outcome.entries[0] == kept[0]
    assert [entry.op for entry in outcome.entries] == ["fwd", "bwd"]
    assert not outcome.faults
    _, told = rehearse(again=True)
    assert told[0].text == "begun"


def test_a_candidate_that_took_the_process_with_it_is_passed_over(rehearse, monkeypatch):
    fault = TuningRun.fault

    def die(self: TuningRun, call: object) -> str | None:
        if self.dying and call is self.last:
            raise SystemExit
        return fault(self, call)

    def call(self: TuningRun, plan: str, tiles: object, made=TuningRun.call) -> object:
        self.last = made(self, plan, tiles)
        self.dying = plan == "shrink_extend"
        return self.last

    with monkeypatch.context() as patch:
        patch.setattr(TuningRun, "fault", die)
        patch.setattr(TuningRun, "call", call)
        with pytest.raises(SystemExit):
            rehearse(TWO[:1])
    outcome, _ = rehearse(TWO[:1])
    assert [m.plan for m in outcome.entries[0].measured] == ["eager"]
    ((problem, label, why),) = outcome.faults
    assert (problem, label.split()[0]) == (FWD, "shrink_extend")
    assert "the last run ended in it" in why
    outcome, _ = rehearse(TWO[:1], again=True)
    assert not outcome.faults


def test_the_budget_leaves_the_rest(rehearse, out):
    outcome, _ = rehearse(budget=0)
    assert (outcome.entries, outcome.left) == ([], list(TWO))
    assert not out.exists()
    outcome, _ = rehearse(TWO[:1])
    outcome, _ = rehearse(budget=0)
    assert [e.op for e in outcome.entries] == ["fwd"]  # what is there costs nothing
    assert outcome.left == [TWO[1]]


def test_a_failing_candidate_is_told_and_left_out(rehearse, monkeypatch):
    wrong = lambda q, chip: [("eager", None), ("shrink_extend", GemmConfig(24, 32, 32, num_warps=4, num_stages=2))]  # noqa: E731
    monkeypatch.setattr(tuner, "candidates", wrong)
    outcome, _ = rehearse(TWO[:1])
    ((_, label, why),) = outcome.faults
    assert label.startswith("shrink_extend M24")
    assert "24" in why or "power of 2" in why
    assert [m.plan for m in outcome.entries[0].measured] == ["eager"]


def test_without_eager_there_is_nothing_to_compare_with(rehearse, monkeypatch):
    monkeypatch.setattr(TuningRun, "fault", lambda self, call: "wrong")
    with pytest.raises(BackendUnavailableError, match="eager fails"):
        rehearse(TWO[:1])


def test_operands_that_do_not_fit_the_memory(rehearse, monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tuner, "TuningRun", full)
    outcome, _ = rehearse(TWO[:1])
    assert outcome.left == [FWD]
    assert outcome.faults[0][1:] == ("its operands", "CUDA out of memory")


def test_another_version_is_measured_again(rehearse, out):
    rehearse(TWO[:1])
    found = json.loads(out.read_text())
    found["entries"][0]["triton"] = "3.0"
    out.write_text(json.dumps(found))
    _, told = rehearse(TWO[:1])
    assert told[0].text == "begun"


def test_a_broken_table_is_written_anew(rehearse, out):
    out.write_text("{")
    outcome, _ = rehearse(TWO[:1])
    assert tuned.loads(out.read_text(), "rehearsal", rehearsal=True) == outcome.entries


def test_without_a_gpu_it_says_so():
    with pytest.raises(BackendUnavailableError, match="cannot measure on mps"):
        tune(TWO, torch.device("mps"))
    with pytest.raises(BackendUnavailableError, match="measure"):
        tune(TWO, torch.device("cpu"))
