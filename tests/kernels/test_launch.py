"""kernels/launch.py: which device is current at a launch, and that no other file launches a kernel."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch

from lora_kernels.kernels import launch as module
from lora_kernels.kernels.launch import launch

ROOT = Path(module.__file__).parent
CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")


class FakeKernel:
    """Record the grid, the arguments and the fake current device of each launch."""

    def __init__(self):
        self.current, self.calls = 0, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.calls.append((self.current, grid, args, options))

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, device.index
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def kernel(monkeypatch):
    made = FakeKernel()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: made.current)
    monkeypatch.setattr(torch.cuda, "device", made.device)
    return made


def test_another_device_is_current_only_during_the_launch(kernel):
    launch(kernel, (2, 3), SECOND, "X", num_warps=4)
    assert kernel.calls == [(1, (2, 3), ("X",), {"num_warps": 4})]
    assert kernel.current == 0


def test_the_current_device_is_not_entered_again(kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", None)
    launch(kernel, (1,), FIRST, "X")
    assert kernel.calls == [(0, (1,), ("X",), {})]


def test_a_cpu_launch_makes_no_cuda_call(kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", None)
    monkeypatch.setattr(torch.cuda, "current_device", None)
    launch(kernel, (1,), CPU, "X", kernel="a kernel's own argument", grid=1, device=2)
    assert kernel.calls == [(0, (1,), ("X",), {"kernel": "a kernel's own argument", "grid": 1, "device": 2})]


def test_the_device_is_restored_after_an_error(kernel, monkeypatch):
    monkeypatch.setattr(FakeKernel, "__getitem__", lambda self, grid: lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        launch(kernel, (1,), SECOND)
    assert kernel.current == 0


@pytest.mark.parametrize(("interpret", "options"), [(False, {"launch_cooperative_grid": True}), (True, {})])
def test_cooperative_launches_outside_of_the_interpreter(kernel, monkeypatch, interpret, options):
    monkeypatch.setattr(module.knobs.runtime, "interpret", interpret)
    launch(kernel, (1,), CPU, cooperative=True)
    assert kernel.calls == [(0, (1,), (), options)]


def launches(source):
    """The lines of ``source`` with kernel[grid](...), kernel.run(...) or kernel.warmup(...)."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Subscript)
        or (isinstance(call.func, ast.Attribute) and call.func.attr in ("run", "warmup"))
    ]


def test_no_other_file_launches_a_kernel():
    files = sorted(ROOT.rglob("*.py"))
    found = {str(file.relative_to(ROOT)): launches(file.read_text()) for file in files}
    assert len(found) > 20
    assert len(found.pop("launch.py")) == 2
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize("planted", ["_k[(1,)](X)", "_k[g](\n X,\n)", "_k.run(X, grid=(1,))"])
def test_a_planted_launch_is_found(planted):
    source = (ROOT / "reduce.py").read_text()
    assert not launches(source)
    assert launches(f"{source}\n{planted}\n")
