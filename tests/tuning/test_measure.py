"""A problem on trial: which candidates there are, who passes the error rule, and how time is taken."""

import dataclasses

import pytest
import torch

from lora_kernels.kernels.chip import CHIPS
from lora_kernels.kernels.tiles import GemmConfig, TmaConfig
from lora_kernels.planning import choose as plan
from lora_kernels.planning.cost import CallShape
from lora_kernels.planning.plans import BY_NAME
from lora_kernels.tuning import measure as trial
from lora_kernels.tuning.measure import TuningRun

H100 = CHIPS["sm_90"]
LAYER = CallShape("fwd", 8192, 4096, 4096, 16, torch.bfloat16)
TINY = CallShape("fwd", 33, 80, 64, 8, torch.bfloat16, bias=True)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("op", ["fwd", "bwd"])
def test_candidates_can_all_run_and_are_all_different(op, arch):
    q, chip = dataclasses.replace(LAYER, op=op), CHIPS[arch]
    found = trial.candidates(q, chip)
    assert found[0] == ("eager", None)
    assert len(set(found)) == len(found)
    assert {name for name, _ in found} == {p.name for p in plan.candidates(q, chip) if not p.refused}
    for name, tiles in found:
        direction = BY_NAME[name].fwd if op == "fwd" else BY_NAME[name].bwd
        assert direction.refused(q, chip, tiles) is None
    assert 5 <= len(found) <= 45


def test_plans_with_the_same_launches_are_tried_once():
    names = [name for name, _ in trial.candidates(dataclasses.replace(LAYER, op="bwd", need_dx=False), H100)]
    assert names == ["eager", "shrink_extend"]


def test_variations_are_near():
    wide = trial.variations(TmaConfig(128, 256, 64, num_warps=8, num_stages=3))
    assert TmaConfig(128, 128, 64, num_warps=8, num_stages=5) in wide
    assert TmaConfig(64, 256, 64, num_warps=4, num_stages=3) in wide
    assert TmaConfig(128, 256, 64, num_warps=8, num_stages=3, GROUP_M=16) in wide
    assert len(trial.variations(GemmConfig(16, 32, 64, num_warps=4, num_stages=3))) == 3
    assert trial.candidate_label("extend", GemmConfig(16, 32, 64, 4, 3)).startswith("extend M16 N32 K64 num_warps4")


@pytest.fixture(scope="module")
def trials(device):
    """A trial for each direction and mask, made once."""
    made = {}
    for op, dropout, bits in (("fwd", False, True), ("fwd", True, True), ("bwd", True, True), ("bwd", True, False)):
        q = dataclasses.replace(TINY, op=op, dropout=dropout, bits=bits)
        made[op, dropout, bits] = TuningRun(q, torch.device(device), H100)
    return made


def test_right_candidates_pass(trials):
    for each in trials.values():
        for name in ("eager", "shrink_extend"):
            assert each.fault(each.call(name, None)) is None
    tiles = GemmConfig(32, 32, 32, num_warps=4, num_stages=2)
    fwd = trials["fwd", True, True]
    assert fwd.fault(fwd.call("shrink_extend", tiles)) is None
    fwd.forget_truth()
    assert fwd.fault(fwd.call("one_pass", None)) is None


@pytest.mark.parametrize("key", [("fwd", True, True), ("bwd", True, True)])
def test_wrong_ones_do_not(trials, key):
    each = trials[key]
    call = each.call("eager", None)
    assert "error is" in each.fault(lambda: tuple(1.02 * t for t in call()))
    assert "not finite" in each.fault(lambda: tuple(torch.where(t > 0, t, torch.nan) for t in call()))

    def broken():
        raise ValueError("out of registers")

    assert each.fault(broken) == "ValueError: out of registers"


def test_the_lora_term_is_as_large_as_the_base_term(trials):
    """Else a plan that leaves it out would pass."""
    given = trials["fwd", False, True]._given
    base, update = given.X @ given.W.T, given.X.float() @ given.A.T @ given.B.T * given.scaling
    assert 0.5 < float(update.square().mean() / base.float().square().mean()) < 2
    assert given.A.dtype == torch.float32


def test_calls_take_turns():
    taken = []
    calls = {name: lambda name=name: taken.append(name) for name in "ABC"}
    times = trial.timed(calls, torch.device("cpu"), rounds=4)
    assert "".join(taken) == "ABCBCACABABC"
    assert all(t.us > 0 for t in times.values())
    assert trial.timed({}, torch.device("cpu"), 2) == {}


class Event:
    """A stand-in for torch.cuda.Event: notes when it was recorded."""

    def __init__(self, log):
        self._log = log

    def record(self):
        self.at = len(self._log)
        self._log.append("event")

    def elapsed_time(self, end):
        return float(end.at - self.at)


def test_on_a_gpu_a_call_lies_between_its_events_and_the_host_runs_ahead(monkeypatch):
    log, slept = [], []
    for name, stand_in in {
        "synchronize": lambda: log.append("sync"),
        "_sleep": slept.append,
        "Event": lambda enable_timing: Event(log),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    calls = {"a": lambda: log.append("a"), "b": lambda: (log.append("b"), log.append("b"))}
    times = trial._cuda_round(calls, ["b", "a"], torch.ones(1), queueing=1e-3)
    assert log == ["sync", "event", "b", "b", "event", "event", "a", "event", "sync"]
    assert slept == [3_000_000]  # cycles: half as long again as the host took last time, at 2 GHz
    assert {name: t.us for name, t in times.items()} == {"a": 2000.0, "b": 3000.0}  # events count in milliseconds
    assert all(0 < t.host_us < 1e5 for t in times.values())
    trial._cuda_round(calls, ["a"], torch.ones(1), queueing=10.0)
    assert slept[-1] == 100_000_000  # never longer than 50 ms


def test_spread():
    assert trial.spread([3.0]) == (3.0, 3.0, 3.0)
    assert trial.spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == pytest.approx((3.5, 2.0, 5.0))


def test_a_capture_on_a_cpu_makes_every_call():
    made = []
    trial.captured([lambda: made.append(1), lambda: made.append(2)], torch.device("cpu"))()
    assert made == [1, 2]
