"""The compiled extension of csrc/: whether it can run here, what it does not take, and its calls.

    XA[m] = scaling_l X[m] A_l^T        Y[m] = X[m] W^T + bias + XA[m] B_l^T        l = ids[m]

On a GPU in one launch for up to 64 rows; on a CPU the update of a Y that holds the base product, in one call.
docs/csrc.md has the design. setup.py builds it and says what came of it.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels.errors import BackendUnavailableError
from lora_kernels.operands.slots import Slots

DTYPES = (torch.bfloat16,)
ROWS = 64  # of X, at most
UPDATE_DTYPES = (torch.float32, torch.bfloat16)
_PIECE = 16  # bytes that the kernel copies at once
_COUNTERS = 16384  # of the workspace: 64 for every 16 ranks of the largest adapter, one for every 64 rows of W
_INFO = Path(__file__).parents[1] / "_build_info.json"


def build_info() -> dict[str, str]:
    """What setup.py wrote of its build: "built", and "why" where it is "no"; {} where the package was not installed."""
    return json.loads(_INFO.read_text()) if _INFO.is_file() else {}


@functools.cache
def update_missing() -> str | None:
    """None where the C++ operator of the CPU can run; otherwise the reason."""
    try:
        importlib.import_module("lora_kernels._C")
    except ImportError as error:
        if error.name == "lora_kernels._C":
            why = build_info().get("why")
            return "the package was installed without its compiled extension" + (f": {why}" if why else "")
        return f"the compiled extension does not load: {error}"
    return None


@functools.cache
def available() -> str | None:
    """None where the CUDA C++ operators can run; otherwise the reason."""
    if missing := update_missing():
        return missing
    if not importlib.import_module("lora_kernels._C").WITH_CUDA:
        why = build_info().get("why")
        return "the compiled extension was built without CUDA" + (f": {why}" if why else "")
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no usable NVIDIA GPU is here"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"the GPU is sm_{major}{minor}; it takes sm_80 and newer"


def refusal(dtype: torch.dtype, K: int) -> str | None:
    """Why no tensors of this dtype and this K are taken, or None."""
    if dtype is torch.float16:
        return "it keeps XA in 16 bits, and XA may leave float16's range; it takes bfloat16"
    if dtype not in DTYPES:
        return f"it multiplies bfloat16 alone, X is {str(dtype).removeprefix('torch.')}"
    if K % (_PIECE // dtype.itemsize) or K == 0:
        return f"K = {K}, and rows must be whole pieces of {_PIECE} bytes"
    return None


def unsuited(X: Tensor, W: Tensor, slots: Slots) -> str | None:
    """Why these operands of a dtype and K that are taken cannot be read as they lie, or None. Looks at no data."""
    if slots.A.dtype != X.dtype or slots.B.dtype != X.dtype:
        return f"adapters of {slots.A.dtype} and {slots.B.dtype} beside X of {X.dtype}: it converts none"
    if 2 + 64 * -(-slots.max_rank // 16) + -(-W.shape[0] // 64) > _COUNTERS:
        return f"W of {W.shape[0]} rows and adapters up to rank {slots.max_rank} need more counters than it has"
    for name, T in (("X", X), ("W", W), ("A", slots.A)):
        rows, columns = T.stride()
        if (columns != 1 and T.shape[1] > 1) or (rows * T.itemsize % _PIECE and T.shape[0] > 1):
            return f"{name} has strides {tuple(T.stride())}; its rows must be contiguous and begin on {_PIECE} bytes"
        if T.data_ptr() % _PIECE:
            return f"{name} begins at an address that is no multiple of {_PIECE} bytes"
    return None


def multi_lora_decode(X: Tensor, W: Tensor, slots: Slots, ids: Tensor, bias: Tensor | None) -> Tensor:
    """Y (M, N) for X (M, K), W (N, K), ids int32 (M,), bias (N,) or None, M <= 64, in one launch.

    All operands are bfloat16. B is read fastest if it is a transposed (R, N), as in a pool. An id
    that names no slot, and a slot whose rows are not all in A, give their rows the base alone.

    Raises:
        BackendUnavailableError: it cannot run here, or does not take these operands.
    """
    reason = available() or refusal(X.dtype, X.shape[1]) or unsuited(X, W, slots)
    if reason or X.shape[0] > ROWS:
        reason = reason or f"{X.shape[0]} rows, and it takes up to {ROWS}"
        raise BackendUnavailableError(f"multi_lora_decode of csrc/ cannot run: {reason}; use backend='auto'")
    bias = None if bias is None else bias.contiguous()
    return torch.ops.lora_kernels.multi_lora_decode(X, W, *slots, ids.contiguous(), bias)


def update_refusal(X: Tensor, slots: Slots) -> str | None:
    """Why the operator of the CPU does not take these operands, or None. Looks at no data."""
    A, B, dtype = slots.A, slots.B, X.dtype
    if dtype not in UPDATE_DTYPES:
        return f"it takes float32 and bfloat16, X is {str(dtype).removeprefix('torch.')}"
    if A.dtype != dtype or B.dtype != dtype:
        return f"adapters of {A.dtype} and {B.dtype} beside X of {dtype}: it converts none"
    if (X.stride(1) != 1 or A.stride(1) != 1) and X.shape[1] > 1:
        return f"X and A have strides {tuple(X.stride())} and {tuple(A.stride())}; it reads rows of neighbours"
    return None


def multi_lora_update_(Y: Tensor, X: Tensor, slots: Slots, ids: Tensor) -> Tensor:
    """Y (M, N), in place, += s_l X A_l^T B_l^T by row, for X (M, K), ids int32 (M,), all on the CPU in one dtype.

    An id that names no slot, and a slot whose rows are not all in A, add nothing. The bits of a row depend on itself
    alone: neither on the batch nor on the number of threads.

    Raises:
        BackendUnavailableError: it cannot run here, or does not take these operands.
    """
    if reason := update_missing() or update_refusal(X, slots):
        raise BackendUnavailableError(f"multi_lora_update_ of csrc/ cannot run: {reason}; use backend='auto'")
    torch.ops.lora_kernels.multi_lora_update_(Y, X, *slots, ids.contiguous())
    return Y
