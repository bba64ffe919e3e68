"""The dry GPU compiles what a launch asks for, reads what it takes, and finds the same again in Triton's cache."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "dry_kernels.py"


def _run_dry(cache: Path) -> dict[str, dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def compiled(cache: Path) -> dict[str, dict]:
    return _run_dry(cache)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("case", "unit"),
    [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_90 few rows", "HMMA"), ("sm_100", "UTCMMA"), ("gfx942", "MFMA")],
)
def test_a_good_kernel_is_clean_and_uses_the_matrix_unit(compiled: dict[str, dict], case: str, unit: str) -> None:
    kernel = compiled[case]
    assert kernel["faults"] == []
    assert kernel["instructions"][unit] > 0
    assert 16 < kernel["registers"] <= 255
    assert kernel["shared"] > 0
    assert kernel["launches"] == 2


def test_spills_are_seen(compiled: dict[str, dict]) -> None:
    kernel = compiled["spills"]
    assert kernel["spills"] > 100
    assert kernel["stack"] > 0
    assert [fault.split(" ", 1)[1] for fault in kernel["faults"]] == ["spill instructions", "bytes of stack"]


def test_what_a_gpu_refuses_is_refused(compiled: dict[str, dict]) -> None:
    assert compiled["too much shared memory"]["error"].startswith("OutOfResources: out of resource: shared memory")
    assert "K >= 16" in compiled["K of 8"]["error"]


def test_a_narrow_offset_is_found(compiled: dict[str, dict]) -> None:
    (fault,) = compiled["narrow offset"]["faults"]
    assert fault.startswith("32-bit offset")
    assert "arith.muli" in fault


def test_a_pipeline_that_atomics_in_the_tile_loop_cost_is_missed(compiled: dict[str, dict]) -> None:
    assert compiled["TMA"]["faults"] == []
    (fault,) = compiled["atomics in a flattened loop"]["faults"]
    assert fault == "pipelining lost: 0 bytes of rings, its loops have 98304 under way"


def test_gluon_kernels_are_compiled_and_judged_alike(compiled: dict[str, dict]) -> None:
    kernel = compiled["Gluon"]
    assert kernel["faults"] == []
    assert kernel["instructions"]["USETMAXREG"] > 0
    assert kernel["instructions"]["UTMALDG"] > 0
    assert kernel["warps"] == 8  # four, and the one that loads, in whole groups of four
    (fault,) = compiled["Gluon, narrow offset"]["faults"]
    assert fault.startswith("32-bit offset")


def test_tuples_of_arguments(compiled: dict[str, dict]) -> None:
    kernel = compiled["tuples"]
    assert kernel["launches"] == 2
    assert len(kernel["faults"]) == 2  # the product with a stride of each


def test_a_second_run_finds_everything_in_the_cache(compiled: dict[str, dict], cache: Path) -> None:
    started = time.monotonic()
    assert _run_dry(cache) == compiled
    assert len(list(cache.rglob("lora_kernels_resources_*.json"))) == 12
    assert not any(path.stat().st_mtime > time.time() - (time.monotonic() - started) for path in cache.rglob("*.cubin"))
