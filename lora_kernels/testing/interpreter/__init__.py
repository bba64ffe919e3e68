"""Makes Triton's CPU interpreter exact in bfloat16 and as strict as a GPU, so that kernels can be judged without one.

The interpreter (Triton 3.6 to 3.9) stores bf16 as numpy uint16 and computes on the bit patterns: a dot is off by 1e10,
a cast truncates, an integer is reinterpreted, all without a warning. `install` mends that (interpreter_bf16), checks
memory and shuffles programs (interpreter_memory), and here:

- a dot that a GPU's compiler refuses (K < 16, or K < 32 in 8 bits) is refused;
- +, -, * of signed 32-bit integers that wrap around raise (on a GPU: an access far away, once past 2**31 elements);
- loop bounds that are tensors work with numpy >= 2.4 on Triton 3.6;
- the language is patched once a launch, not at every call of a device function (0.11 ms instead of 0.28).

Set TRITON_INTERPRET=1 before Triton is imported (it is read when @triton.jit decorates) and call `install()` before
the first launch. The kernels under test are unchanged. Not covered: bf16 atomics, inline assembly, libdevice, Gluon.
Programs run one after another, so a spin on the flag of a later program never ends.
"""

import dataclasses
import operator
from typing import Any

import numpy as np
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import min_dot_size
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from lora_kernels.testing.interpreter.bf16 import make_exact
from lora_kernels.testing.interpreter.memory import Method, check_memory, order, wrap_method

__all__ = ["install", "order"]

_INT32 = np.iinfo(np.int32)
_EXACT: dict[Any, Any] = {np.add: operator.add, np.subtract: operator.sub, np.multiply: operator.mul}


@dataclasses.dataclass
class _State:
    installed: bool = False
    trap_int32: bool = True
    patched_globals: set[int] = dataclasses.field(default_factory=set)  # by id, in the launch under way


_state = _State()


def install(*, tf32: bool = True, trap_int32: bool = True, bounds: bool = True) -> None:
    """Patches Triton's interpreter in this process; called again, it changes the options and patches nothing twice.

    Args:
        tf32: fp32 dots that don't ask for input_precision="ieee" round their operands to TF32, as on a GPU.
        trap_int32: wrap-around of signed 32-bit integers raises OverflowError.
        bounds: an access outside the tensors of a launch raises IndexError.

    What is raised inside a kernel reaches the caller as Triton's InterpreterError with the message kept.

    Raises:
        RuntimeError: Triton was imported without TRITON_INTERPRET=1.
        AttributeError: Triton's interpreter has moved, and these files need to follow.
    """
    if not isinstance(tl.philox, InterpretedFunction):
        raise RuntimeError("Triton was imported without its interpreter; set TRITON_INTERPRET=1 before importing it")
    _state.trap_int32 = trap_int32
    make_exact(tf32=tf32)
    check_memory(bounds=bounds)
    if _state.installed:
        return
    _state.installed = True
    wrap_method(InterpreterBuilder, "binary_op", _trap_int32)
    wrap_method(triton_interpreter, "_patch_lang_tensor", _index_of_any_shape)
    wrap_method(triton_interpreter, "_patch_lang", _patch_language_once)
    wrap_method(triton_interpreter.GridExecutor, "__call__", _launch)
    builder = triton_interpreter.interpreter_builder
    builder.codegen_fns["min_dot_size"] = min_dot_size(GPUTarget("cuda", 80, 32))
    # Triton's own overflow check computes every operation a second time and asserts in debug mode only.
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _trap_int32(original: Method) -> Method:
    def binary_op(self: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle, op: np.ufunc) -> TensorHandle:
        if _state.trap_int32 and op in _EXACT and lhs.data.dtype == rhs.data.dtype == np.int32:
            _check_int32(lhs.data, rhs.data, op)
        return original(self, lhs, rhs, op)

    return binary_op


def _check_int32(lhs: np.ndarray, rhs: np.ndarray, op: np.ufunc) -> None:
    """Raises where op wraps around; the extremes of the operands clear most calls without an elementwise look."""
    exact = _EXACT[op]
    corners = [exact(int(a), int(b)) for a in (lhs.min(), lhs.max()) for b in (rhs.min(), rhs.max())]
    if min(corners) >= _INT32.min and max(corners) <= _INT32.max:
        return
    wide = op(lhs.astype(np.int64), rhs.astype(np.int64))
    for value in (int(wide.max()), int(wide.min())):
        if not _INT32.min <= value <= _INT32.max:
            raise OverflowError(f"int32 {op.__name__} wraps around at {value}; widen an operand with .to(tl.int64)")


def _index_of_any_shape(original: Method) -> Method:
    def patch_lang_tensor(tensor: type, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    return patch_lang_tensor


def _patch_language_once(original: Method) -> Method:
    def patch_lang(fn: Any) -> Any:
        if id(fn.__globals__) in _state.patched_globals:
            return triton_interpreter._LangPatchScope()
        scope = original(fn)
        _state.patched_globals.add(id(fn.__globals__))
        return scope

    return patch_lang


def _launch(original: Method) -> Method:
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        _state.patched_globals.clear()
        try:
            original(self, *args, **kwargs)
        finally:
            _state.patched_globals.clear()

    return call
