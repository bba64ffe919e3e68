import itertools
import shutil
from pathlib import Path

import pytest

from benchmarks.phases import INNER, PHASES, Round
from benchmarks.worker import share


@pytest.mark.parametrize("rehearse", [True, False])
def test_every_phase_has_units_of_its_own(tmp_path: Path, rehearse: bool) -> None:
    this, names = Round(tmp_path, rehearse), [phase.name for phase in PHASES]
    units = [unit for name in [*names, INNER] for unit in this.units(name)]
    assert len(units) == len(set(units))
    assert names[:3] == ["check", "gemm", "target"]
    assert all(phase.estimate <= phase.limit for phase in PHASES)
    assert all(phase.shards == 1 for phase in PHASES if phase.name != "check")  # nothing else runs while it times


def test_a_rehearsal_knows_every_kind_of_unit(tmp_path: Path) -> None:
    kinds = [{name.split(" M")[0] for p in PHASES for name in Round(tmp_path, r).units(p.name)} for r in (True, False)]
    assert kinds[0] == kinds[1]


def test_shards_share_all_units_once(tmp_path: Path) -> None:
    units = Round(tmp_path).units("check")
    shares = [list(share(units, f"{number}/5")) for number in range(5)]
    assert sorted(itertools.chain(*shares)) == sorted(units)
    assert shares[0][0] == next(iter(units))


def test_without_the_sanitizer_memcheck_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    check = Round(tmp_path)._memcheck()
    assert check.status == "not run"
    assert "compute-sanitizer is not on this machine" in check.message
