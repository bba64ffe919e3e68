import dataclasses
from typing import Any

import pytest
import torch

from benchmarks import serving_round
from benchmarks.measure import Bench
from benchmarks.phases import Round
from benchmarks.roofline import Ceilings
from benchmarks.serving_cases import REPLAYED, tiny
from benchmarks.timing import RehearsalClock

CPU = torch.device("cpu")
BENCH = Bench(CPU, RehearsalClock(), lambda: Ceilings({"bf16": 1.0}, 1.0), rounds=1, warmup=0, copies=2)
CASE = dataclasses.replace(tiny(REPLAYED), dtype=torch.float32)


def test_a_round_has_every_plan_and_both_tables(tmp_path: Any) -> None:
    names = list(Round(tmp_path).units("serving"))
    assert all(name.startswith("serving/") for name in names)
    kinds = {" ".join(name.removeprefix("serving/").split()[:2]) for name in names}
    plans = ("eager", "extend", "decode", "cuda")
    assert kinds >= {f"{plan} {kind}" for plan in plans for kind in ("rule", "launches", "replays")}
    assert kinds >= {"auto fwd_graph", "decode fwd_graph", "cuda fwd_graph", "auto fwd", "extend fwd"}
    assert {"tools/serving memcheck", "tools/serving racecheck"} < set(Round(tmp_path).units("tools"))
    assert not [name for name in names if name.startswith("serving/decode rule M300")], "it takes up to 64 rows"
    assert len(names) == len(set(names))
    assert len(list(Round(tmp_path, rehearse=True).units("serving"))) < 30
    assert len(list(Round(tmp_path).units("serving_sanitized"))) == 4


def test_the_planned_launches_are_told_and_one_is_asked_of_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    for plan, count in (("eager", 3), ("extend", 2), ("decode", 1)):
        _, (check,) = serving_round.launches(CASE, plan, BENCH)
        assert (check.status, check.message) == ("ok", f"{count} launches planned")
    monkeypatch.setattr(serving_round, "planned_launches", lambda *_: 2)
    _, (check,) = serving_round.launches(CASE, "decode", BENCH)
    assert check.status == "failed"
    assert serving_round.launches(CASE, "extend", BENCH)[1][0].status == "ok"


def test_mixes_differ_in_all_that_is_data() -> None:
    problem = CASE.problem()
    mixes = [serving_round.Mix(CASE, problem, number) for number in range(12)]
    assert len({tuple(mix.ids.tolist()) for mix in mixes}) > 6
    assert any((mix.ranks == 0).any() for mix in mixes)
    assert len({tuple(mix.scalings.tolist()) for mix in mixes}) > 3
    mixes[3].enter(problem)
    assert torch.equal(problem.ids, mixes[3].ids)
    assert torch.equal(problem.slots.ranks, mixes[3].ranks)


def test_replays_that_read_a_stale_mix_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    _, checks = serving_round.replays(CASE, "eager", 8, 6, BENCH)
    assert [check.status for check in checks] == ["ok"] * 7
    assert checks[-1].message == "8 replays"

    real = serving_round.captured

    def stale(calls: Any, device: torch.device) -> Any:
        call, kept = real(calls, device), []
        return lambda: kept or kept.append(call())  # the first mix's answer for all

    monkeypatch.setattr(serving_round, "captured", stale)
    _, checks = serving_round.replays(CASE, "eager", 8, 6, BENCH)
    assert checks[-1].status == "failed"
    assert "of 8 replays differ" in checks[-1].message


def test_a_plan_that_is_wrong_is_found_before_it_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = serving_round.multi_lora_linear
    monkeypatch.setattr(serving_round, "multi_lora_linear", lambda *args, **kwargs: 1.01 * real(*args, **kwargs))
    _, checks = serving_round.replays(CASE, "eager", 2, 6, BENCH)
    assert [check.status for check in checks[:-1]] == ["failed"] * 6


def test_what_is_refused_or_throws_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (check,) = serving_round.replays(dataclasses.replace(CASE, M=65), "decode", 2, 6, BENCH)
    assert (check.status, "up to 64" in check.message) == ("refused", True)

    def throw(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(serving_round, "multi_lora_linear", throw)
    _, (check,) = serving_round.replays(CASE, "eager", 2, 6, BENCH)
    assert (check.status, check.message) == ("failed", "RuntimeError: no such thing")
