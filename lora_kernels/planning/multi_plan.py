"""Choose the implementation of the linear layer with many adapters.

    eager    the base product by the vendor's library, then shrink and expand in two launches, as other libraries do
    extend   shrink, then one GEMM whose accumulator also adds the adapters of its row tile
    decode   one launch, W read once; up to 64 rows, forward without gradients
    cuda     the same in CUDA C++, if the package was built with it (backend "cuda")
    cpp      on a CPU, forward without gradients: the base product by the library, the update by one call of C++

Backends are "auto", "reference", "triton", "triton:PLAN", "cuda" and "cpp". A plan is chosen by the time that
multi_cost.py predicts; these plans have not been measured on a GPU yet. On a CPU "auto" selects cpp if it accepts the
call, up to the row count at which it was measured to be faster than the reference.
"""

from __future__ import annotations

import functools
import importlib
import math
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from lora_kernels.errors import BackendUnavailableError
from lora_kernels.kernels.chip import Chip
from lora_kernels.kernels.tiles import DECODE_ROWS
from lora_kernels.operands.slots import Slots
from lora_kernels.planning import choose as planner
from lora_kernels.planning.choose import chip_for, requested_backend, resolve_backend, split_name
from lora_kernels.planning.cost import Plan, seconds
from lora_kernels.planning.multi_cost import MultiCallShape, launches
from lora_kernels.planning.plans import switched_off

PLANS = ("eager", "extend", "decode", "cuda")
CPP_ROWS = {torch.float32: 4096, torch.bfloat16: 1024}  # rows; see docs/multi_lora_linear.md


@functools.cache
def triton_kernels() -> ModuleType:
    """The Triton kernels of mixed batches; importing them imports Triton."""
    return planner.triton_kernels("multi.launchers")


@functools.cache
def cuda_kernels() -> ModuleType:
    """The module of the CUDA C++ operators; it checks at each use whether they were built."""
    return importlib.import_module("lora_kernels.kernels.csrc")


def resolve(backend: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend, with its plan if one was named, that runs a call on tensors of this device and dtype.

    On a CPU, for dtypes that cpp accepts, the result is "auto": by_cpp decides for each call.

    Raises:
        BackendUnavailableError: the backend requested by name cannot run.
        ConfigError: unknown name.
    """
    asked = requested_backend(backend)
    if asked in ("cuda", "cpp"):
        reason = cuda_kernels().available() if asked == "cuda" else cuda_kernels().update_missing()
        wrong = device_type != ("cuda" if asked == "cuda" else "cpu")
        if reason := reason or (f"the tensors are on {device_type}" if wrong else None):
            raise BackendUnavailableError(
                f"backend {asked!r} cannot run here: {reason}; use backend='auto' or 'reference'"
            )
        return asked
    if asked == "auto" and device_type == "cpu" and dtype in CPP_ROWS:
        return "auto"
    return resolve_backend(backend, device_type, dtype)


@functools.cache
def cpp_missing() -> str | None:
    """Why "auto" cannot select cpp here, or None."""
    return cuda_kernels().update_missing() or switched_off("cpp")


def by_cpp(X: Tensor, slots: Slots, need_xa: bool, backend: str) -> bool:
    """Whether the C++ operator runs a forward on the CPU for a resolved ``backend``.

    Raises:
        BackendUnavailableError: it was requested by name and does not accept the call.
    """
    if backend == "auto":
        few = not need_xa and X.shape[0] <= CPP_ROWS[X.dtype] and cpp_missing() is None
        return few and cuda_kernels().update_refusal(X, slots) is None
    if backend != "cpp":
        return False
    needs = "it keeps nothing for a backward; call it under torch.no_grad()" if need_xa else None
    if reason := needs or cuda_kernels().update_refusal(X, slots):
        raise BackendUnavailableError(f"backend 'cpp' cannot run here: {reason}; use backend='auto' or 'reference'")
    return True


def _refused(name: str, q: MultiCallShape, unsuited: str | None) -> str | None:
    if name not in ("decode", "cuda"):
        return None
    if name == "cuda" and (reason := cuda_kernels().available() or cuda_kernels().refusal(q.dtype, q.K) or unsuited):
        return reason
    if q.op == "bwd":
        return "it is a forward plan"
    if q.need_xa:
        return "it keeps nothing for a backward; call it under torch.no_grad()"
    return f"{q.M} rows, and it takes up to {DECODE_ROWS}" if q.M > DECODE_ROWS else None


@functools.lru_cache(maxsize=4096)
def candidates(problem: MultiCallShape, chip: Chip, unsuited: str | None = None) -> tuple[Plan, ...]:
    """Every plan for ``problem``, the fastest predicted first, refused ones last.

    ``unsuited``: why plan cuda cannot take the tensors of the call (csrc.unsuited), or None.
    """
    plans = []
    for name in PLANS:
        if reason := (None if name == "eager" else switched_off(name)) or _refused(name, problem, unsuited):
            plans.append(Plan(name, (), math.inf, reason))
        else:
            parts = launches(name, problem)
            plans.append(Plan(name, parts, sum(seconds(part, problem.dtype, chip) for part in parts)))
    return tuple(sorted(plans, key=lambda plan: plan.seconds))


@functools.lru_cache(maxsize=4096)
def choose(problem: MultiCallShape, chip: Chip, forced: str | None = None, unsuited: str | None = None) -> Plan:
    """The plan that runs: ``forced``, else the one with the least predicted time. If ``forced`` has no backward, the
    planner chooses the plan of the backward.

    Raises:
        BackendUnavailableError: the plan requested by name is not valid for this problem.
    """
    plans = candidates(problem, chip, unsuited)
    if forced is None:
        return replace(plans[0], why="model")
    plan = next((p for p in plans if p.name == forced), None)
    if plan is not None and plan.refused is None:
        return replace(plan, why="named")
    if plan is not None and problem.op == "bwd":
        return replace(plans[0], why=f"model, as {forced} is a forward plan")
    why = f"it is none of multi_lora_linear's ({', '.join(PLANS)})" if plan is None else plan.refused
    raise BackendUnavailableError(f"plan {forced!r} cannot run here: {why}; name another or none")


def plan_call(
    op: str, X: Tensor, W: Tensor, slots: Slots, need_xa: bool, backend: str, need_dx: bool = True
) -> tuple[Plan, Chip]:
    """The plan and the Chip of one call; costs one cache look-up.

    Raises:
        BackendUnavailableError: the plan requested by name is not valid for this call.
    """
    (N, K), L, R = W.shape, slots.ranks.shape[0], slots.A.shape[0]
    kind, forced = split_name(backend)
    problem = MultiCallShape(op, X.shape[0], N, K, L, R, X.dtype, need_xa, need_dx)
    chip, cuda = chip_for(X.device), cuda_kernels()
    wanted = op == "fwd" and problem.M <= DECODE_ROWS and cuda.available() is None
    unsuited = cuda.unsuited(X, W, slots) if wanted else None
    return choose(problem, chip, "cuda" if kind == "cuda" else forced, unsuited), chip
