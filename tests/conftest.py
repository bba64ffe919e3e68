"""One suite, two machines: on a GPU the kernels run there, elsewhere in Triton's interpreter, made exact and strict.

LORA_TEST_DEVICE=cpu asks for the interpreter on a machine that has a GPU.
"""

import os
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" in os.environ:  # one core a worker; read when numpy is imported
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch

DEVICE = os.environ.get("LORA_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: @triton.jit reads it when it decorates
    from lora_kernels.testing import interpreter

    interpreter.install()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that a launcher allocates holds NaN until a kernel writes it."""
    from lora_kernels.testing import poison

    with poison():
        yield


@pytest.fixture(autouse=True)
def _program_order() -> Iterator[None]:
    yield
    if DEVICE == "cpu":
        interpreter.order(0)


def pytest_report_header() -> str:
    import triton

    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU, Triton's interpreter made exact and strict"
    return f"lora_kernels: {machine}; torch {torch.__version__}, triton {triton.__version__}"
