"""Which implementation of the linear layer with many adapters runs, and why.

eager    the base product by the vendor's library, then shrink and expand in two launches: the rivals' algorithm
extend   shrink, then one GEMM whose accumulator takes every adapter of its row tile as well
decode   one launch, W read once; up to 64 rows, forward without gradients
cuda     the same in CUDA C++, where the package was built with it
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from torch import Tensor

from lora_kernels.cost import Plan
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.kernels.chip import Chip
from lora_kernels.plan import chip_for, split_name
from lora_kernels.slots import Slots

PLANS = ("eager", "extend", "decode", "cuda")
DECODE_ROWS = 64


@functools.cache
def cuda_kernels() -> ModuleType:
    """The CUDA C++ operators' front end."""
    return importlib.import_module("lora_kernels.csrc")


def _choose(op: str, M: int, need_xa: bool, forced: str | None) -> Plan:
    if forced is None:
        name = "decode" if op == "fwd" and M <= DECODE_ROWS and not need_xa else "extend"
        return Plan(name, (), 0.0, why="model")
    if forced in ("decode", "cuda") and (op == "bwd" or need_xa or M > DECODE_ROWS):
        if op == "bwd":
            return Plan("extend", (), 0.0, why=f"named {forced}, which has no backward")
        why = f"{M} rows, and it takes up to {DECODE_ROWS}" if M > DECODE_ROWS else "gradients are asked for"
        raise BackendUnavailableError(f"plan {forced!r} cannot run here: {why}; name another or none")
    if forced not in PLANS:
        raise BackendUnavailableError(f"plan {forced!r} is none of multi_lora_linear's: {', '.join(PLANS)}")
    return Plan(forced, (), 0.0, why="named")


def plan_call(op: str, X: Tensor, W: Tensor, slots: Slots, need_xa: bool, backend: str) -> tuple[Plan, Chip]:
    """The plan and the Chip of one call.

    Raises:
        BackendUnavailableError: the plan asked for by name is not valid for this call.
    """
    _, forced = split_name(backend)
    return _choose(op, X.shape[0], need_xa, forced), chip_for(X.device)
