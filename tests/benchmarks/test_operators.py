import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from benchmarks import compare
from lora_kernels.planning.multi_plan import cpp_missing

ROOT = Path(compare.__file__).resolve().parents[1]


def _benchmarks(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    quick = ["--benchmark-max-time=0.01", "--benchmark-min-rounds=1", f"--benchmark-json={tmp_path / 'out.json'}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*command, *quick, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_same_cases_run_as_pytest_benchmarks_one_group_a_case(tmp_path: Path) -> None:
    chosen = ["-k", "not peft"]
    done = _benchmarks(tmp_path, "--shapes", "16,32,24,4", "--modes", "fwd,fwd_bwd", "--dropout", "0,0.1", *chosen)
    assert done.returncode == 0, done.stdout
    measured = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    groups = {each["group"] for each in measured}
    cases = {f"{mode} M16 N32 K24 r4 p{p} fp32" for mode in ("fwd", "fwd_bwd") for p in ("0", "0.1")}
    assert cases == {group for group in groups if "overhead" not in group}
    assert len(groups - cases) == 3
    names = {each["name"] for each in measured if each["group"] == "fwd_bwd M16 N32 K24 r4 p0 fp32"}
    assert names == {"frozen linear", "lora_kernels reference", "addmm chain", "in-flight merge"}
    assert {each["extra_info"]["torch"] for each in measured} == {measured[0]["extra_info"]["torch"]}
    assert measured[0]["extra_info"]["commit"]


def test_mixed_batches_are_a_group_each(tmp_path: Path) -> None:
    done = _benchmarks(tmp_path, "-k", "test_mixed_batch and M64 and not M1024 and not peft and not bmm and not swap")
    assert done.returncode == 0, done.stdout
    measured = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert {each["group"] for each in measured} == {"M64 N768 K768 L8 r8-64 uniform float32"}
    built = cpp_missing() is None
    mine = {"lora_kernels reference", *(["lora_kernels auto"] if built else [])}
    assert {each["name"] for each in measured} == {"frozen linear", "all slots + mask", *mine}
    assert {each["extra_info"]["plan"] for each in measured} == {"", "reference", *(["auto (cpp)"] if built else [])}


def test_make_test_does_not_run_them() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["pytest"]["ini_options"]["testpaths"] == ["tests"]
