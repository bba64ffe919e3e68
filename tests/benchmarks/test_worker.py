from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import worker
from benchmarks.measure import DeviceBroken, Found
from benchmarks.phases import Round
from benchmarks.rows import Journal


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The units below launch nothing; torch's threads and Triton stay as they are."""
    from lora_kernels.testing import interpreter

    monkeypatch.setattr(interpreter, "install", lambda: None)
    monkeypatch.setattr(worker.torch, "set_num_threads", lambda _: None)


def _units(monkeypatch: pytest.MonkeyPatch, **results: Exception | None) -> list[str]:
    ran: list[str] = []

    def unit(name: str) -> Found:
        ran.append(name)
        if (error := results[name]) is not None:
            raise error
        return [], []

    def units(self: Round, phase: str) -> dict[str, object]:
        return {name: lambda bench, name=name: unit(name) for name in results}

    monkeypatch.setattr(Round, "units", units)
    monkeypatch.setattr(Round, "bench", lambda self: SimpleNamespace(curves=[]))
    return ran


def _work(out: Path, *more: str) -> int:
    return worker.main(["--phase", "check", "--rehearse", "--out", str(out), *more])


def test_a_unit_that_raises_is_recorded_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = _units(monkeypatch, a=ValueError("no"), b=None)
    assert _work(tmp_path) == worker.CHECKS_FAILED
    assert ran == ["a", "b"]
    journal = Journal(tmp_path)
    assert journal.done() == {"a", "b"}
    assert [(check["what"], check["message"]) for check in journal.checks()] == [("a", "ValueError: no")]


def test_a_broken_device_ends_the_process_after_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = _units(monkeypatch, a=DeviceBroken("gone"), b=None)
    assert _work(tmp_path) == worker.DEVICE_BROKEN
    assert ran == ["a"]
    assert Journal(tmp_path).done() == {"a"}
    assert _work(tmp_path) == 0  # the fresh process goes on behind it
    assert ran == ["a", "b"]


def test_no_unit_begins_without_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = _units(monkeypatch, a=None)
    assert _work(tmp_path, "--seconds", "-1") == 0
    assert ran == []
    assert Journal(tmp_path).done() == set()
