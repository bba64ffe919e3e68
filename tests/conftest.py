"""One suite, two machines: on a GPU the kernels run there, elsewhere in Triton's interpreter, made exact and strict.

LORA_TEST_DEVICE=cpu asks for the interpreter on a machine that has a GPU.
"""

import importlib
import os
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

if "PYTEST_XDIST_WORKER" in os.environ:  # one core a worker; read when numpy is imported
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job of a script starts so, and its children too
    signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)  # the benchmarks and what tests share are not installed
DEVICE = os.environ.get("LORA_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: @triton.jit reads it when it decorates
    from lora_kernels.testing import interpreter

    interpreter.install()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "house",  # the same examples in every run, and no verdict by the clock
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("house")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow the cases that ``sampled`` leaves to .ci/run, and refuse a test whose name contains an address: the
    processes of pytest-xdist would collect different tests."""
    changing = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if changing:
        raise pytest.UsageError(f"{len(changing)} tests have an address in their name, such as {changing[0]}")
    cases = Counter[str]()
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled is not None:
            name = item.nodeid.partition("[")[0]
            if cases[name] % sampled.args[0]:
                item.add_marker(pytest.mark.slow)
            cases[name] += 1


def _modes() -> dict[str, object]:
    """What a test must leave as it was: later tests of the same process would fail, or pass without a reason."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(autouse=True)
def _modes_are_left_as_they_were() -> Iterator[None]:
    before = _modes()
    yield
    after = _modes()
    torch.set_grad_enabled(bool(before["gradients"]))
    assert after == before


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that a launcher allocates holds NaN until a kernel writes it."""
    from lora_kernels.testing import poison

    with poison():
        yield


@pytest.fixture
def kernels_with(tmp_path: Path) -> Callable[..., list[ModuleType]]:
    """Modules of a copy of lora_kernels.kernels, in which ``text`` of one file may be replaced: a planted bug."""

    def plant(
        modules: tuple[str, ...], file: str = "", text: str = "", replacement: str = "", count: int = -1
    ) -> list[ModuleType]:
        import lora_kernels.kernels

        name = re.sub(r"\W", "_", f"planted_{tmp_path.name}")
        copy = tmp_path / name
        source = Path(lora_kernels.kernels.__file__).parent
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "tuned"))
        for path in copy.rglob("*.py"):
            path.write_text(path.read_text().replace("lora_kernels.kernels.", f"{name}."))
        if file:
            right = (copy / file).read_text()
            assert text in right, f"{file} no longer holds the text that the bug replaces"
            (copy / file).write_text(right.replace(text, replacement, count))
        sys.path.insert(0, str(tmp_path))
        try:
            return [importlib.import_module(f"{name}.{module}") for module in modules]
        finally:
            sys.path.remove(str(tmp_path))

    return plant


@pytest.fixture(autouse=True)
def _program_order() -> Iterator[None]:
    yield
    if DEVICE == "cpu":
        interpreter.order(0)


def pytest_report_header() -> str:
    import triton

    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU, Triton's interpreter made exact and strict"
    return f"lora_kernels: {machine}; torch {torch.__version__}, triton {triton.__version__}"
