"""The lint finds 32-bit products with run-time sizes behind pointer offsets, and no others."""

import pytest

from lora_kernels.check.compile.ttir_lint import Dot, DotLoop, dot_loops, dots, narrow_offsets, ring_bytes

FUNCTION = """
  tt.func public @kernel(%X_ptr: !tt.ptr<bf16> loc(unknown), %stride_xm: i32 {tt.divisibility = 16 : i32} loc("s")) {
    %block = arith.constant 64 : i32 loc(#loc1)
    %pid = tt.get_program_id x : i32 loc(#loc1)
    BODY
"""
NARROW = """%row = arith.muli %pid, %stride_xm : i32 loc(#loc2)
    %ptr = tt.addptr %X_ptr, %row : !tt.ptr<bf16>, i32 loc(#loc3)"""
THROUGH_A_TILE = """%range = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32> loc(#loc2)
    %strides = tt.splat %stride_xm : i32 -> tensor<64xi32> loc(#loc2)
    %rows = arith.muli %range, %strides : tensor<64xi32> loc(#loc2)
    %tile = tt.expand_dims %rows {axis = 1 : i32} : tensor<64xi32> -> tensor<64x1xi32> loc(#loc2)
    %ptrs = tt.splat %X_ptr : !tt.ptr<bf16> -> tensor<64x1x!tt.ptr<bf16>> loc(#loc2)
    %ptr = tt.addptr %ptrs, %tile : tensor<64x1x!tt.ptr<bf16>>, tensor<64x1xi32> loc(#loc3)"""
WIDENED = """%pid_wide = arith.extsi %pid : i32 to i64 loc(#loc2)
    %stride_wide = arith.extsi %stride_xm : i32 to i64 loc(#loc2)
    %row = arith.muli %pid_wide, %stride_wide : i64 loc(#loc2)
    %ptr = tt.addptr %X_ptr, %row : !tt.ptr<bf16>, i64 loc(#loc3)"""
CONSTANT = """%row = arith.muli %pid, %block : i32 loc(#loc2)
    %ptr = tt.addptr %X_ptr, %row : !tt.ptr<bf16>, i32 loc(#loc3)"""


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (NARROW, ["%row = arith.muli %pid, %stride_xm : i32"]),
        (THROUGH_A_TILE, ["%rows = arith.muli %range, %strides : tensor<64xi32>"]),
        (WIDENED, []),
        (CONSTANT, []),
    ],
    ids=["narrow", "through a tile", "widened", "constant"],
)
def test_narrow_offsets(body: str, found: list[str]) -> None:
    assert narrow_offsets(FUNCTION.replace("BODY", body)) == found


def test_widening_after_the_product_is_too_late() -> None:
    body = NARROW.replace(
        "%ptr = tt.addptr %X_ptr, %row", "%late = arith.extsi %row : i32 to i64\n    %ptr = tt.addptr %X_ptr, %late"
    )
    assert narrow_offsets(FUNCTION.replace("BODY", body)) == ["%row = arith.muli %pid, %stride_xm : i32"]


def test_dots() -> None:
    half = "%1 = tt.dot %a, %b, %c : tensor<64x32xbf16> * tensor<32x16xbf16> -> tensor<64x16xf32> loc(#loc)"
    tf32 = "%2 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<16x32xf32> * tensor<32x16xf32> -> tensor<16x16xf32>"
    ieee = tf32.replace(", inputPrecision = tf32", "")
    assert dots("\n".join([half, tf32, ieee])) == [
        Dot(64, 32, "bf16", on_matrix_unit=True),
        Dot(16, 32, "f32", on_matrix_unit=True),
        Dot(16, 32, "f32", on_matrix_unit=False),
    ]


def test_dots_of_gluon() -> None:
    hopper = "%p = ttng.warp_group_dot %x, %w, %p {isAsync = true} : !ttg.memdesc<128x64xbf16, #shared> * ..."
    wait = "%q = ttng.warp_group_dot_wait %p {pendings = 1 : i32} : tensor<128x16xf32, #mma>"
    assert dots("\n".join([hopper, wait])) == [Dot(128, 64, "bf16", on_matrix_unit=True)]


GLUON = """
  tt.func public @kernel(%XA_ptr: !tt.ptr<bf16> loc("X"), %N: i32 loc("N")) {
    ttg.warp_specialize(%XA_ptr, %N) attributes {requestedRegisters = array<i32: 24>}
    default {
      %row = arith.muli %pid, %c128 : i32 loc(#loc1)
      %ptr = tt.addptr %XA_ptr, %row : !tt.ptr<bf16>, i32 loc(#loc1)
    }
    partition0(%arg0: !tt.ptr<bf16> loc("X"), %arg1: i32 loc("N")) num_warps(1) {
      %row = arith.muli %pid, OTHER : i32 loc(#loc1)
      %moved = ttg.convert_layout %row : i32 loc(#loc1)
      %ptr = tt.addptr %arg0, %moved : !tt.ptr<bf16>, i32 loc(#loc1)
    } : (!tt.ptr<bf16>, i32) -> ()
"""


def test_a_partition_names_its_values_anew_and_what_it_captures_is_an_argument() -> None:
    assert narrow_offsets(GLUON.replace("OTHER", "%arg1")) == ["%row = arith.muli %pid, %arg1 : i32"]
    assert narrow_offsets(GLUON.replace("OTHER", "%c128")) == []


LOOPS = """tt.func public @kernel(%A_ptr: !tt.ptr<f32> loc("A"), %stride_ar: i32 STRIDE loc("s")) {
    %tiles = scf.for %tile = %c0 to %n step %c1 iter_args(%none = %zero) -> (i32)  : i32 {
      %sum = scf.for %k = %c0 to %K step %c1 iter_args(%acc = %none) -> (tensor<128x16xf32>)  : i32 {
        %x = tt.descriptor_load %X_desc[%row, %k] : !tt.tensordesc<tensor<128x64xbf16>> -> tensor<128x64xbf16>
        %keep = scf.if %inside -> (tensor<128x64xbf16>) {
          %bits = tt.load %bs : tensor<128x8x!tt.ptr<i8>>
          scf.yield %x : tensor<128x64xbf16>
        } else {
          scf.yield %x : tensor<128x64xbf16>
        }
        %a = tt.load %as, %mask : tensor<64x16x!tt.ptr<f32>>
        %half = arith.truncf %a : tensor<64x16xf32> to tensor<64x16xbf16>
        %other = tt.load %os, %mask : tensor<64x64x!tt.ptr<f32>>
        %dropped = arith.select %bits, %x, %zeros : tensor<128x64xbf16>
        %next = tt.dot %dropped, %half, %acc : tensor<128x64xbf16> * tensor<64x16xbf16> -> tensor<128x16xf32>
        scf.yield %next : tensor<128x16xf32>
      } {tt.num_stages = 8 : i32}
      %b = tt.load %bs, %mask : tensor<16x256x!tt.ptr<f32>>
      %closed = tt.dot %sum, %b, %sum : tensor<128x16xbf16> * tensor<16x256xbf16> -> tensor<128x256xf32>
    }
"""


def test_the_loads_of_an_innermost_loop_that_feed_its_dots() -> None:
    tiles = 128 * 64 * 2, 64 * 16 * 4
    wide = LOOPS.replace("STRIDE", "{tt.divisibility = 16 : i32}")
    assert dot_loops(wide) == [DotLoop(8, by_pointer=tiles[1], by_descriptor=tiles[0])]
    assert dot_loops(LOOPS.replace("STRIDE", "")) == [DotLoop(8, by_pointer=0, by_descriptor=tiles[0])]
    assert dot_loops(wide.replace("tt.dot %dropped", "tt.sum %dropped")) == []


def test_rings_are_the_buffers_with_stages() -> None:
    ring = "%xb = ttg.local_alloc : () -> !ttg.memdesc<3x128x64xbf16, #shared, #smem, mutable> loc(#loc1)"
    tile = ring.replace("3x128", "128")
    filled = "%y = ttg.local_alloc %acc : (tensor<2x128x64xbf16>) -> !ttg.memdesc<2x128x64xbf16, #shared, #smem>"
    assert ring_bytes("\n".join([ring, tile, filled, ring.replace("bf16", "i64")])) == 3 * 128 * 64 * (2 + 8)
