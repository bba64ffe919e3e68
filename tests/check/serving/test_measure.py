from dataclasses import replace

import pytest
import torch

from lora_kernels.check.serving import measure as trial
from lora_kernels.check.serving.cases import ServingCase
from lora_kernels.check.serving.rivals import ALL_SLOTS, FROZEN, SWAP, Contender, ours
from lora_kernels.errors import BackendUnavailableError

CPU = torch.device("cpu")
CASE = ServingCase(24, 80, 64, (4, 9), "uniform", dtype=torch.float32, bias=True)
REFERENCE = ours("reference")


def told(calls, rounds):
    """One millisecond for the first contender, two for the second, and so on."""
    for call in calls.values():
        call()
    return {name: [1.0 + number] * rounds for number, name in enumerate(calls)}


def test_the_right_ones_are_timed_and_compared():
    timings, judgements = trial.measure(CASE, [FROZEN, REFERENCE, ALL_SLOTS], CPU, timer=told)
    assert [(each.contender, each.status) for each in judgements] == [(REFERENCE, "ok"), (ALL_SLOTS, "ok")]
    assert judgements[0].max_ratio is not None
    assert [(each.ms_p50, each.ratio_to_frozen, each.ratio_to_best_rival) for each in timings] == [
        (1.0, 1.0, 1 / 3), (2.0, 2.0, 2 / 3), (3.0, 3.0, 1.0),
    ]  # fmt: skip
    assert [each.plan for each in timings] == ["", "reference", ""]
    assert timings[1].tokens_per_s == 12_000


def broken(what):
    """The reference's answer with something wrong in it."""

    def build(case, problem):
        right = REFERENCE.build(case, problem)

        def call():
            Y = right().clone()
            if what == "a row":
                Y[-1] = Y[0]
            elif what == "no adapters":
                return FROZEN.build(case, problem)()
            elif what == "unwritten":
                return torch.empty_like(Y)
            return Y

        return call

    return build


@pytest.mark.parametrize("what", ["a row", "no adapters", "unwritten"])
def test_what_is_wrong_gets_no_time(what):
    wrong = replace(REFERENCE, build=broken(what))
    timings, (judgement,) = trial.measure(CASE, [FROZEN, wrong], CPU, timer=told)
    assert (judgement.status, [each.contender for each in timings]) == ("failed", [FROZEN])
    assert judgement.message
    rival = Contender("rival", broken(what))
    assert trial.measure(CASE, [FROZEN, rival], CPU, timer=told).judgements[0].status == "failed" or what == "unwritten"


def test_what_one_throws_does_not_take_the_others_along():
    def throw(case, problem):
        raise RuntimeError("out of\nwhatever")

    timings, judgements = trial.measure(CASE, [FROZEN, replace(REFERENCE, build=throw), ALL_SLOTS], CPU, timer=told)
    assert [(each.status, each.message) for each in judgements] == [
        ("failed", "RuntimeError: out of whatever"), ("ok", ""),
    ]  # fmt: skip
    assert len(timings) == 2


def test_who_refuses_or_is_not_there_is_told():
    def refuse(case, problem):
        raise BackendUnavailableError("it takes up to 64 rows")

    found = trial.measure(
        CASE,
        [FROZEN, replace(REFERENCE, build=refuse), replace(ALL_SLOTS, needs="no_such_library")],
        CPU,
        timer=told,
    ).judgements
    assert [(each.status, each.message) for each in found] == [
        ("refused", "it takes up to 64 rows"), ("not run", "no_such_library is not installed"),
    ]  # fmt: skip


def test_a_graph_walks_over_copies_with_the_same_strides(monkeypatch):
    calls = []
    timings = trial.measure(
        CASE, [FROZEN, REFERENCE, replace(SWAP, graph=False)], CPU, graph=True, copies=3,
        timer=lambda given, rounds: calls.append(given) or {name: [6.0] for name in given},
    ).timings  # fmt: skip
    assert [each.contender for each in timings] == [FROZEN, REFERENCE], "what no graph can hold is left out"
    assert timings[0].ms_p50 == 2.0, "a third of three calls"
    results = calls[0][REFERENCE.label]()
    assert len(results) == 3
    assert all(torch.equal(Y, results[0]) for Y in results)
    copies = trial._copies(trial.oracle_of(CASE, CPU).problem, 3)
    assert len({copy.W.data_ptr() for copy in copies}) == len({copy.slots.A.data_ptr() for copy in copies}) == 3
    assert {copy.slots.B.stride() for copy in copies} == {copies[0].slots.B.stride()}


def test_turns_and_their_end(monkeypatch):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = trial.in_turns(calls, 3, CPU)
    assert "".join(order) == "abcbcacababc"
    assert [len(times) for times in samples.values()] == [3, 3, 3]
    assert len(trial.in_turns(calls, 100, CPU, seconds=0.0)["a"]) == 4
