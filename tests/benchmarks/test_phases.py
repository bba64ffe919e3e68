import itertools
from pathlib import Path

import pytest

from benchmarks.phases import Round, plan_of
from benchmarks.rivals import OPT_IN_BACKENDS
from benchmarks.schedule import PHASES
from benchmarks.serving_round import PLANS as SERVING_PLANS
from benchmarks.tools import PROFILED_PHASE, SANITIZED_PHASE
from benchmarks.worker import share


@pytest.mark.parametrize("rehearse", [True, False])
def test_every_phase_has_units_of_its_own(tmp_path: Path, rehearse: bool) -> None:
    this, names = Round(tmp_path, rehearse), [phase.name for phase in PHASES]
    units = [unit for name in [*names, SANITIZED_PHASE, PROFILED_PHASE] for unit in this.units(name)]
    assert len(units) == len(set(units))
    assert names[:3] == ["gemm", "check", "target"]
    assert all(phase.estimate <= phase.limit for phase in PHASES)
    assert all(phase.shards == 1 for phase in PHASES if "check" not in phase.name)  # nothing else runs while it times


def test_a_rehearsal_knows_every_kind_of_unit(tmp_path: Path) -> None:
    """Of a mode on few rows or many there is one; of training, one model's speed and steps."""

    def kinds(rehearse: bool) -> set[str]:
        return {name.split(" M")[0] for phase in PHASES for name in Round(tmp_path, rehearse).units(phase.name)}

    left_out = {"step/speed llama", "blocks/fwd lora_linear_stacked", "blocks/fwd lora_mlp"}
    left_out |= {f"accelerate/step_{model}" for model in ("llama", "bert_attention", "llama_attention")}
    assert kinds(False) - kinds(True) == left_out
    assert kinds(True) <= kinds(False)


def test_plans_that_no_gpu_has_run_have_units_of_their_own(tmp_path: Path) -> None:
    plans = {plan_of(backend) for backend in OPT_IN_BACKENDS}
    for phase in (phase for phase in PHASES if phase.by_plan):
        assert phase.patience <= 60
        first_words = {unit.partition("/")[2].split()[0] for unit in Round(tmp_path).units(phase.name)}
        if phase.name == "serving":
            assert first_words == {"auto", *SERVING_PLANS}
        elif phase.name != "gemm":
            assert first_words == plans


def test_shards_share_all_units_once(tmp_path: Path) -> None:
    units = Round(tmp_path).units("check")
    shares = [list(share(units, f"{number}/5")) for number in range(5)]
    assert sorted(itertools.chain(*shares)) == sorted(units)
    assert shares[0][0] == next(iter(units))
