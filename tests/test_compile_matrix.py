"""Every shipped kernel configuration compiles for every architecture within its limits, on a machine without a GPU."""

import pytest

from lora_kernels.cli.check import QUICK_ARCHS, QUICK_DTYPES, compile_matrix, table
from lora_kernels.kernels.chip import CHIPS


def _assert_all_may_ship(archs: tuple[str, ...], dtypes: tuple[str, ...]) -> None:
    rows = compile_matrix(archs, dtypes)
    red = [row for row in rows if row.faults]
    assert {row.arch for row in rows} == set(archs)
    assert not red, f"{len(red)} of {len(rows)} kernels must not ship:\n{table(red)}"


def test_a_representative_part() -> None:
    _assert_all_may_ship(QUICK_ARCHS, QUICK_DTYPES)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", CHIPS)
def test_everything(arch: str) -> None:
    _assert_all_may_ship((arch,), ())
