"""Matrix products of the reference path, computed by the faster of PyTorch's two float32 libraries on a CPU.

    linear(X, W, bias) = X W^T + bias        mm(P, Q) = P Q
    scaled_mm(P, Q, f) = f P Q               add_mm_(Y, P, Q), add_low_rank_(Y, P, Q): Y += P Q

``F.linear`` and ``@`` use MKL for float32, which does not use a tenth to a fifth of an AMD core's rate (Zen 4, two
threads, 512 x 768 x 3072: 15.2 ms, oneDNN 12.2; XA 0.28, 0.23; dY^T XA 0.91, 0.45). torch.compile's CPU backend calls
oneDNN by a separate operator. This file calls it where it was measured to be faster: large products on AMD processors
with AVX-512. All other products, dtypes, devices and layouts use PyTorch's usual operators. docs/lora_linear.md has the
figures; ``LORA_KERNELS_CPU_GEMM`` = auto, torch or onednn selects the library.

Operands of two dtypes are multiplied in the wider one, for example float32 A and B of a float16 layer. Such products
use in-place operations, since autocast narrows the operands of all other products to 16 bits.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels.errors import ConfigError

SWITCH = "LORA_KERNELS_CPU_GEMM"
CHOICES = ("auto", "torch", "onednn")
CHUNK = 1 << 17  # elements of a 16-bit Y for which the wide update is computed at a time
MULTIPLICATIONS = 1 << 22  # from which oneDNN gains more than its 12 us a call and its 0.5 ms a new shape
_CPUINFO = Path("/proc/cpuinfo")


def library() -> tuple[str, str]:
    """The library of float32 products on a CPU, "onednn" or "torch", and the reason.

    Raises:
        ConfigError: the environment names another library.
    """
    asked = os.environ.get(SWITCH, "auto")
    if asked not in CHOICES:
        raise ConfigError(f"{SWITCH} is {asked!r}; accepted are {', '.join(CHOICES)}")
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "torch", "this torch has no oneDNN product"
    if asked != "auto":
        return asked, f"by {SWITCH}"
    capability = torch.backends.cpu.get_cpu_capability()
    if _vendor() == "AuthenticAMD" and capability == "AVX512":
        return "onednn", "faster than MKL on an AMD processor with AVX-512"
    return "torch", f"PyTorch's own choice; oneDNN is not known to be faster here ({capability})"


def _vendor() -> str:
    """The processor's vendor id: AuthenticAMD, GenuineIntel; "" if unknown."""
    if not _CPUINFO.is_file():
        return platform.processor().rpartition(", ")[2]  # Windows: "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD"
    lines = (line.partition(":") for line in _CPUINFO.read_text().splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == "vendor_id"), "")


@functools.cache
def _onednn() -> Callable[..., Tensor] | None:
    """oneDNN's X W^T + bias (X, W, bias, "none", [], ""), if it is the selected library."""
    return torch.ops.mkldnn._linear_pointwise.default if library()[0] == "onednn" else None


def _takes(P: Tensor, Q: Tensor, columns: int) -> bool:
    """Whether oneDNN computes P times Q, or its transpose: large, float32, on a CPU, in no autograd graph.

    Reads only sizes and strides: a view would cost one more operator.
    """
    return (
        P.numel() * columns >= MULTIPLICATIONS
        and P.dtype is torch.float32
        and Q.dtype is torch.float32
        and P.is_cpu
        and Q.is_cpu
        and _onednn() is not None
        and torch._C._get_mkldnn_enabled()
        and not (torch.is_grad_enabled() and (P.requires_grad or Q.requires_grad))
    )


def _dense(T: Tensor) -> bool:
    """Whether rows or columns are adjacent without gaps."""
    rows, columns = T.stride()
    return (columns == 1 and rows == T.size(1)) or (rows == 1 and columns == T.size(0))


def _run(X: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    product = _onednn()
    assert product is not None
    return product(X, W, bias, "none", [], "")


def linear(X: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """X W^T + bias (M, N) for X (M, K), W (N, K), bias (N,) or None."""
    if _takes(X, W, W.size(0)) and X.is_contiguous() and _dense(W) and (bias is None or bias.dtype is X.dtype):
        return _run(X, W, bias)
    return torch.nn.functional.linear(X, W, bias)


def wide_mm(P: Tensor, Q: Tensor, factor: float | None = None) -> Tensor:
    """factor * P Q in the wider dtype of the two, under autocast as well."""  # a 1.0 would be an input of a graph
    if (
        P.dtype is Q.dtype
        and factor is None
        and not torch.is_autocast_enabled("cpu" if P.is_cpu or P.is_meta else P.device.type)
    ):
        return mm(P, Q)
    dtype = torch.promote_types(P.dtype, Q.dtype)
    P, Q = P.to(dtype), Q.to(dtype)
    if not torch.compiler.is_compiling() and _takes(P, Q, Q.size(1)):  # reading the sizes would add a guard
        product = mm(P, Q)
        return product if factor in (None, 1.0) else product.mul_(factor)
    return P.new_empty(P.shape[0], Q.shape[1]).addmm_(P, Q, beta=0, alpha=1 if factor is None else factor)


def mm(P: Tensor, Q: Tensor) -> Tensor:
    """P Q (m, n) for P (m, k), Q (k, n)."""
    if P.dtype is not Q.dtype:
        return wide_mm(P, Q)
    if _takes(P, Q, Q.size(1)):  # oneDNN copies a first operand that is not contiguous: make it the small one
        small = P.size(0) <= Q.size(1)
        if (small or P.is_contiguous()) and _dense(Q):
            return _run(P, Q.t())
        if not small and _dense(P):
            return _run(Q.t(), P).t().contiguous()
    return P @ Q


def add_mm_(Y: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    """Y += P Q in place, for an inner size so large that another pass over Y costs little."""
    return Y.add_(mm(P, Q)) if _takes(P, Q, Q.size(1)) else Y.addmm_(P, Q)


def add_low_rank_(Y: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    """Y += P Q in place for P (M, r), Q (r, N), rounded to Y's dtype once if P and Q have a wider one.

    On a CPU the rows are added in parts whose wide product fits the cache.
    """
    if P.dtype is Y.dtype:
        return Y.addmm_(P, Q)
    if Y.device.type != "cpu" or torch.compiler.is_compiling() or Y.numel() <= CHUNK:
        return Y.add_(wide_mm(P, Q))
    rows = max(1, CHUNK // Y.shape[1])
    for y, p in zip(Y.split(rows), P.split(rows), strict=True):
        y.add_(wide_mm(p, Q))
    return Y


def scaled_mm(P: Tensor, Q: Tensor, factor: float, like: Tensor | None = None) -> Tensor:
    """factor * P Q with the factor applied before rounding to 16 bit, in one matrix product.

    ``like``: any tensor of the result's shape and dtype. addmm requires it, and does not read it at beta=0.
    """
    if factor == 1.0:
        return mm(P, Q)
    if P.dtype is not Q.dtype:
        return wide_mm(P, Q, factor)
    if _takes(P, Q, Q.size(1)):
        return mm(P, Q).mul_(factor)
    if like is None or like.dtype != P.dtype:
        like = P.new_empty(P.shape[0], Q.shape[1])
    return torch.addmm(like, P, Q, beta=0, alpha=factor)
