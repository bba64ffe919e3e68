"""The lint finds 32-bit products with run-time sizes behind pointer offsets, and no others."""

import pytest

from lora_kernels.testing.ttir_lint import Dot, dots, narrow_offsets

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
