"""Which findings keep a kernel from shipping, each shown on IR and counts that have just that."""

from dataclasses import replace

import pytest

from lora_kernels.check.compile.resources import Kernel, Resources
from lora_kernels.kernels.chip import CHIPS

COUNTS = {"HGMMA": 8, "HMMA": 0, "UTMALDG": 0, "LDGSTS": 12, "USETMAXREG": 0, "TRAP": 0, "all": 900}
CLEAN = Resources(registers=128, spills=0, stack=0, instructions=COUNTS)
DOT = "%acc = tt.dot %x, %w, %zero : tensor<128x64xbf16> * tensor<64x128xbf16> -> tensor<128x128xf32>"
LOOP = f"""tt.func public @kernel(%X: !tt.ptr<bf16> loc("X"), %stride_x: i32 {{tt.divisibility = 16 : i32}} loc("s")) {{
    %sum = scf.for %k = %c0 to %K step %c1 iter_args(%zero = %none) -> (tensor<128x128xf32>)  : i32 {{
      %x = tt.load %xs, %mask : tensor<128x64x!tt.ptr<bf16>> loc(#loc)
      %w = tt.load %ws, %mask : tensor<64x128x!tt.ptr<bf16>> loc(#loc)
      {DOT}
      scf.yield %acc : tensor<128x128xf32> loc(#loc)
    }} ATTRIBUTES loc(#loc)
  }}"""  # 32,768 bytes a turn
BY_TMA = LOOP.replace("tt.load", "tt.descriptor_load").replace("!tt.ptr<bf16>", "bf16").replace("bf16>>", "bf16>")
KERNEL = Kernel("kernel", CHIPS["sm_90"], num_warps=8, num_stages=3, shared=100_000, resources=CLEAN, ir=LOOP)
GLUON = replace(
    KERNEL,
    ir="ttg.warp_specialize(%a)\n ttng.async_tma_copy_global_to_local %x\n"
    "%p = ttng.warp_group_dot %x, %w, %p {isAsync = true} : !ttg.memdesc<128x64xbf16, #shared> * ...",
)


def _with(kernel: Kernel = KERNEL, **instructions: int) -> Kernel:
    return replace(kernel, resources=replace(CLEAN, instructions=COUNTS | instructions))


TMA = replace(_with(UTMALDG=4, LDGSTS=0), ir=BY_TMA, rings=65_536)


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (replace(KERNEL, resources=replace(CLEAN, spills=3)), "3 spill instructions"),
        (replace(KERNEL, resources=replace(CLEAN, stack=8)), "8 bytes of stack"),
        (replace(KERNEL, shared=240_000), "shared memory 240000 of 232448 bytes"),
        (_with(HGMMA=0), "no matrix instruction"),
        (_with(HGMMA=0, HMMA=8), "no HGMMA"),
        (_with(HGMMA=0, TRAP=1, all=12), "compiled to a lone trap"),
        (replace(KERNEL, shared=65_000), "pipelining lost: 65000 bytes of shared memory, its loop has 65536 under way"),
        (_with(LDGSTS=0), "no LDGSTS: its loop waits for every load"),
        (_with(TMA, UTMALDG=0), "no UTMALDG"),
        (replace(TMA, rings=16_384), "pipelining lost: 16384 bytes of rings, its loops have 65536 under way"),
        (_with(GLUON, UTMALDG=4), "no USETMAXREG: its partitions share out no registers"),
        (_with(GLUON, USETMAXREG=4), "no UTMALDG"),
        (_with(GLUON, USETMAXREG=4, UTMALDG=4, HGMMA=0), "no matrix instruction"),
    ],
)
def test_faults(kernel: Kernel, fault: str) -> None:
    assert kernel.faults() == [fault]


@pytest.mark.parametrize("kernel", [KERNEL, TMA, _with(GLUON, USETMAXREG=4, UTMALDG=4, LDGSTS=0)])
def test_what_has_all_of_it_may_ship(kernel: Kernel) -> None:
    assert kernel.faults() == []


def test_no_matrix_unit_is_asked_of_fp32_or_of_a_kernel_without_products() -> None:
    assert replace(_with(HGMMA=0), ir=DOT.replace("bf16", "f32")).faults() == []
    assert replace(_with(HGMMA=0), ir="").faults() == []


def test_few_rows_may_use_the_older_unit() -> None:
    assert replace(_with(HGMMA=0, HMMA=8), ir=DOT.replace("<128x64xbf16>", "<16x64xbf16>")).faults() == []


def test_no_copy_ahead_is_asked_of_one_stage_or_of_rows_that_are_not_multiples_of_16_bytes() -> None:
    lost = replace(_with(LDGSTS=0), shared=1000)
    assert len(lost.faults()) == 2
    assert replace(lost, ir=LOOP.replace("ATTRIBUTES", "{tt.num_stages = 1 : i32}")).faults() == []
    assert replace(lost, num_stages=1).faults() == []
    assert replace(lost, ir=LOOP.replace("{tt.divisibility = 16 : i32} ", "")).faults() == []
    assert replace(lost, chip=CHIPS["gfx942"]).faults() == []  # no such copies there


def test_a_loop_with_stages_of_its_own_is_judged_by_them() -> None:
    deeper = replace(KERNEL, ir=LOOP.replace("ATTRIBUTES", "{tt.num_stages = 6 : i32}"))
    assert deeper.faults() == ["pipelining lost: 100000 bytes of shared memory, its loop has 163840 under way"]
