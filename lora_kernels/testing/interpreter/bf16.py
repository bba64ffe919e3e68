"""bfloat16 and TF32 arithmetic for Triton's interpreter: rounded where a GPU rounds, exact everywhere else.

The interpreter keeps bf16 as numpy uint16 and runs numpy on the bit patterns. Each method here decodes its bf16
operands to float32, lets the interpreter work on those, and rounds the result to nearest even.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from lora_kernels.errors import BackendUnavailableError
from lora_kernels.testing.interpreter.memory import Method, wrap_method


@dataclasses.dataclass
class _State:
    installed: bool = False
    tf32: bool = True
    strict: bool = True


_state = _State()


def ensure_exact() -> None:
    """Makes bf16 exact if it is not yet; the package calls this before its kernels are interpreted.

    It affects every kernel that this process interprets. A sum in bf16 is computed in float32 and rounded once, and
    float32 dots keep float32's precision, as without the patch.

    Raises:
        BackendUnavailableError: this Triton version's interpreter has other classes than the patch expects.
    """
    if _state.installed:
        return
    try:
        make_exact(tf32=False, strict=False)
    except AttributeError as error:
        raise BackendUnavailableError(
            f"TRITON_INTERPRET=1 is set, and this Triton's interpreter cannot be made exact in bfloat16 ({error}); "
            "install Triton 3.6 to 3.9, or use backend='reference'"
        ) from error


def make_exact(*, tf32: bool = True, strict: bool = True) -> None:
    """Patches Triton's interpreter with the arithmetic of this module; `interpreter.install` calls it.

    Args:
        tf32: fp32 dots that don't ask for another input_precision round their operands to TF32.
        strict: a sum or scan in bf16 is refused.
    """
    _state.tf32, _state.strict = tf32, strict
    if _state.installed:
        return
    for name, wrap in _BUILDER_METHODS.items():
        wrap_method(InterpreterBuilder, name, wrap)
    wrap_method(triton_interpreter.ReduceOps, "apply_impl", _reduction)
    wrap_method(triton_interpreter.ScanOps, "apply_impl", _reduction)
    InterpreterBuilder.get_bf16 = _bf16_constant
    _state.installed = True


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns of bf16 -> float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bit patterns of bf16, to nearest even; overflow gives inf, NaN stays a (quiet) NaN."""
    bits = _float32_bits(values)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 -> float32 with TF32's 10 bits of mantissa, to nearest even."""
    bits = _float32_bits(values)
    rounded = (bits + (np.uint32(0x0FFF) + ((bits >> np.uint32(13)) & np.uint32(1)))) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


def _float32_bits(values: np.ndarray) -> np.ndarray:
    return np.array(values, dtype=np.float32, order="C").view(np.uint32)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _values(handle: TensorHandle) -> np.ndarray:
    return bf16_values(handle.data) if _is_bf16(handle) else handle.data


def _float32_handle(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(bf16_values(handle.data), tl.float32)


def _bf16_handle(values: np.ndarray) -> TensorHandle:
    return TensorHandle(bf16_bits(values), tl.bfloat16)


def _bf16_constant(builder: InterpreterBuilder, value: float) -> TensorHandle:
    return _bf16_handle(np.array([value], dtype=np.float32))


def _binary_op(original: Method) -> Method:
    def binary_op(self: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle, op: np.ufunc) -> TensorHandle:
        if not (_is_bf16(lhs) or _is_bf16(rhs)):
            return original(self, lhs, rhs, op)
        result = op(_values(lhs), _values(rhs))
        return TensorHandle(result, tl.int1) if result.dtype == np.bool_ else _bf16_handle(result)

    return binary_op


def _unary_op(original: Method) -> Method:
    def unary_op(self: InterpreterBuilder, arg: TensorHandle, *op: np.ufunc) -> TensorHandle:
        if not _is_bf16(arg):
            return original(self, arg, *op)
        return _bf16_handle(original(self, _float32_handle(arg), *op).data)

    return unary_op


def _ternary_op(original: Method) -> Method:
    def ternary_op(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, c: TensorHandle, op: Method
    ) -> TensorHandle:
        if _is_bf16(c) and op is not np.where:  # where moves bit patterns, which is exact
            return _bf16_handle(op(_values(a), _values(b), _values(c)))
        return original(self, a, b, c, op)

    return ternary_op


def _fma(original: Method) -> Method:
    def create_fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if not _is_bf16(z):
            return original(self, x, y, z)
        fused = _values(x).astype(np.float64) * _values(y) + _values(z)
        return _bf16_handle(fused.astype(np.float32))

    return create_fma


def _dot(original: Method) -> Method:
    def create_dot(
        self: InterpreterBuilder,
        a: TensorHandle,
        b: TensorHandle,
        acc: TensorHandle,
        input_precision: ir.INPUT_PRECISION,
        max_num_imprecise_acc: int,
    ) -> TensorHandle:
        if _is_bf16(a):  # then so is b, and acc is float32: Triton's front end sees to it
            a, b = _float32_handle(a), _float32_handle(b)
        elif _state.tf32 and a.data.dtype == np.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            a, b = (TensorHandle(round_to_tf32(operand.data), tl.float32) for operand in (a, b))
        return original(self, a, b, acc, input_precision, max_num_imprecise_acc)

    return create_dot


def _cast_impl(original: Method) -> Method:
    def cast_impl(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        if dst_type.scalar == tl.bfloat16 and not _is_bf16(src):
            return _bf16_handle(src.data.astype(np.float32))
        if not _is_bf16(src) or dst_type.scalar == tl.bfloat16:
            return original(self, src, dst_type)
        widened = _float32_handle(src)
        return widened if dst_type.scalar == tl.float32 else original(self, widened, dst_type)

    return cast_impl


def _fp_to_fp(original: Method) -> Method:
    def create_fp_to_fp(
        self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype, rounding_mode: Any
    ) -> TensorHandle:
        if _is_bf16(src):
            src = _float32_handle(src)
        if dst_type.scalar not in (tl.bfloat16, tl.float32):
            return original(self, src, dst_type, rounding_mode)
        if src.dtype.scalar != tl.float32:  # fp8 and fp16 widen to fp32 exactly
            src = original(self, src, tl.float32, None)
        if dst_type.scalar == tl.float32:
            return src
        if rounding_mode == ir.ROUNDING_MODE.RTZ:
            return TensorHandle((_float32_bits(src.data) >> np.uint32(16)).astype(np.uint16), tl.bfloat16)
        return _bf16_handle(src.data)

    return create_fp_to_fp


_BUILDER_METHODS: dict[str, Callable[[Method], Method]] = {
    "binary_op": _binary_op,
    "unary_op": _unary_op,
    "create_rsqrt": _unary_op,
    "create_erf": _unary_op,
    "ternary_op": _ternary_op,
    "create_fma": _fma,
    "create_dot": _dot,
    "cast_impl": _cast_impl,
    "create_fp_to_fp": _fp_to_fp,
}


def _reduction(original: Method) -> Method:
    """A bf16 maximum or minimum is exact; every other reduction or scan is refused, or rounded once at its end."""
    exact = (
        tl.standard._elementwise_max,
        tl.standard._elementwise_min,
        tl.standard._argmax_combine_tie_break_left,
        tl.standard._argmin_combine_tie_break_left,
    )

    def apply_impl(self: Any, inputs: tuple[tl.tensor, ...]) -> Any:
        values, *indices = inputs
        if not _is_bf16(values.handle):
            return original(self, inputs)
        if _state.strict and self.combine_fn not in exact:
            raise TypeError("a reduction in bf16 rounds at every step on a GPU; convert the tile to float32 first")
        widened = tl.tensor(_float32_handle(values.handle), _with_scalar(values.type, tl.float32))
        result = original(self, (widened, *indices))
        extreme, *positions = result if isinstance(result, (tuple, list)) else [result]
        rounded = tl.tensor(_bf16_handle(extreme.handle.data), _with_scalar(extreme.type, tl.bfloat16))
        return (rounded, *positions)

    return apply_impl


def _with_scalar(tensor_type: Any, scalar: tl.dtype) -> Any:
    return tl.block_type(scalar, tensor_type.shape) if tensor_type.is_block() else scalar
