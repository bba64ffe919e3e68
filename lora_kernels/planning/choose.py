"""Choose the implementation of a call: backend (where it runs) and plan (how the work is split into launches).

A backend is requested per call, for a block of code (``use_backend``) or for a program (LORA_KERNELS_BACKEND), in that
order. "auto" selects Triton if it can run, otherwise the reference. "triton:one_pass" also names a plan. Without a
name, the plan comes from the tuned table of this GPU (tuned.py), or from the time that cost.py predicts.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import torch

from lora_kernels.errors import BackendUnavailableError, ConfigError
from lora_kernels.kernels.chip import CHIPS, Chip, chip_of
from lora_kernels.kernels.tiles import wide_loads
from lora_kernels.planning import override
from lora_kernels.planning.cost import CallShape, Plan, seconds
from lora_kernels.planning.plans import MULTI, VARIANTS, Variant, switched_off
from lora_kernels.planning.tuned import Entry, table_for

BACKENDS = ("auto", "reference", "triton", "cuda", "cpp")
PLANS = tuple(variant.name for variant in VARIANTS if not variant.opt_in)  # the planner chooses among these
OPT_IN = tuple(variant.name for variant in VARIANTS if variant.opt_in)
FORWARD_ONLY = {variant.name: variant.backward for variant in VARIANTS if variant.bwd is None}
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NAMES: dict[str, tuple[str, str | None]] = {backend: (backend, None) for backend in BACKENDS}
_NAMES |= {f"triton:{plan}": ("triton", plan) for plan in PLANS + OPT_IN + MULTI}

_triton_installed = importlib.util.find_spec("triton") is not None
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
_environment = os.environ.get("LORA_KERNELS_BACKEND", "auto")


def split_name(requested: str) -> tuple[str, str | None]:
    """("triton", "one_pass") from "triton:one_pass"; the plan is None if none is named.

    Raises:
        ConfigError: not a backend or plan of ours.
    """
    if requested not in _NAMES:
        raise ConfigError(f"backend {requested!r} is unknown; accepted are {', '.join(_NAMES)}")
    return _NAMES[requested]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every call of a block with backend ``name`` ("auto", "reference", "triton", "triton:PLAN").

    It applies to the thread or asyncio task that entered the block, and to tasks created inside; another thread starts
    with the program's default. A graph of torch.compile uses the block that was entered last in the whole program.

    Raises:
        ConfigError: unknown name; or, at the end of the block, another block of this thread or task overlaps it
            without being nested, as in two generators that run in turn. Then both blocks are ended.
    """
    split_name(name)
    with override.block(name):
        yield


def triton_missing(device_type: str) -> str | None:
    """None where Triton kernels can run on tensors of this device type; otherwise the reason."""
    if not _triton_installed:
        return "the package triton is not installed"
    if device_type == "cuda":
        return None
    if device_type == "cpu":
        if _interpreted:
            return None
        return (
            "the tensors are on the CPU (TRITON_INTERPRET=1, set before Triton is imported, interprets kernels there)"
        )
    return f"no Triton kernels for {device_type} tensors"


@functools.cache
def triton_kernels(launchers: str = "linear.launchers") -> ModuleType:
    """Import the launchers, and with them Triton; no other code does. Makes bfloat16 exact in the interpreter."""
    if _interpreted:
        importlib.import_module("lora_kernels.testing.interpreter.bf16").ensure_exact()
    return importlib.import_module(f"lora_kernels.kernels.{launchers}")


def backend_status() -> dict[str, str | None]:
    """For each backend that every operator has: None if it can run here, or the reason it cannot."""
    return {"reference": None, "triton": triton_missing("cuda" if torch.cuda.is_available() else "cpu")}


def requested_backend(backend: str = "auto") -> str:
    """The requested backend: the argument, else the enclosing use_backend, else LORA_KERNELS_BACKEND, else "auto"."""
    if backend == "auto" and override.latest is not None:
        backend = override.requested()
    if backend == "auto":
        backend = _environment
    return backend


def resolve_backend(backend: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend, with its plan if one was named, that runs a call on tensors of this device and dtype.

    Raises:
        BackendUnavailableError: "triton" was requested by name and cannot run.
        ConfigError: unknown name.
    """
    backend = requested_backend(backend)
    kind, _ = split_name(backend)
    if kind == "reference":
        return backend
    if kind == "auto":
        usable = device_type == "cuda" and dtype in TRITON_DTYPES and triton_missing(device_type) is None
        return "triton" if usable else "reference"
    reason = triton_missing(device_type) if kind == "triton" else "it has the forward of multi_lora_linear alone"
    if reason is None and dtype not in TRITON_DTYPES:
        reason = f"its kernels take float32, float16 and bfloat16, not {dtype}"
    if reason is not None:
        raise BackendUnavailableError(
            f"backend {backend!r} cannot run here: {reason}; use backend='auto' or 'reference'"
        )
    return backend


def chip_for(device: torch.device) -> Chip:
    """The Chip of a device; on a CPU (interpreter) the Chip of an H100."""
    if device.type == "cuda":
        return chip_of(device.index if device.index is not None else torch.cuda.current_device())
    return CHIPS["sm_90"]


def _plan(variant: Variant, problem: CallShape, chip: Chip, entry: Entry | None) -> Plan:
    direction = variant.fwd if problem.op == "fwd" else variant.bwd
    if direction is None:
        return Plan(variant.name, (), math.inf, "it is a forward plan", variant.opt_in)
    found = None if entry is None else entry.best(variant.name)
    tiles = found.tiles if found and entry and entry.r == problem.r else None  # tiles were measured at one rank
    if tiles is not None and direction.refused(problem, chip, tiles):
        tiles = None
    if refused := switched_off(variant.name) or direction.refused(problem, chip, tiles):
        return Plan(variant.name, (), math.inf, refused, variant.opt_in)
    parts = direction.launches(problem)
    time = sum(seconds(launch, problem.dtype, chip) for launch in parts)
    measured = None if found is None else found.cost * 1e-6
    return Plan(variant.name, parts, time, None, variant.opt_in, tiles, measured, "", direction.descriptors)


@functools.lru_cache(maxsize=4096)
def candidates(problem: CallShape, chip: Chip) -> tuple[Plan, ...]:
    """Every plan for ``problem``: first those not opt-in, then the opt-in ones; in each part the fastest predicted
    first and refused ones last."""
    entry = table_for(chip.name).lookup(problem)
    plans = (_plan(variant, problem, chip, entry) for variant in VARIANTS)
    return tuple(sorted(plans, key=lambda plan: (plan.opt_in, plan.seconds)))


def _own_choice(problem: CallShape, chip: Chip) -> Plan:
    """The tuned table's plan if it can run, else the plan of least predicted time among those not opt-in."""
    plans = candidates(problem, chip)
    entry = table_for(chip.name).lookup(problem)
    if entry is not None:
        plan = next(p for p in plans if p.name == entry.chosen.plan)
        if plan.refused is None:
            return replace(plan, why=f"tuned on this GPU at {entry.M} rows")
        return replace(plans[0], why=f"model, as the tuned {plan.name} is refused: {plan.refused}")
    return replace(plans[0], why="model")


@functools.lru_cache(maxsize=4096)
def choose(problem: CallShape, chip: Chip, forced: str | None = None) -> Plan:
    """The plan that runs: ``forced``, else the tuned table's, else the model's among PLANS.

    A FORWARD_ONLY plan has no backward. If one is named, the backward is run by the plan that FORWARD_ONLY assigns to
    it, if there is one and it is valid; otherwise by the planner's own choice.

    Raises:
        BackendUnavailableError: the plan requested by name is not valid for this problem.
    """
    if forced is None:
        return _own_choice(problem, chip)
    counterpart = problem.op == "bwd" and forced in FORWARD_ONLY
    name = FORWARD_ONLY[forced] if counterpart else forced
    plan = next((p for p in candidates(problem, chip) if p.name == name), None)
    if plan is not None and plan.refused is None:
        return replace(plan, why="named" if name == forced else f"named {forced}")
    if counterpart:
        return _own_choice(problem, chip)
    why = plan.refused if plan is not None else "it is a plan of multi_lora_linear"
    raise BackendUnavailableError(f"plan {forced!r} cannot run here: {why}; name another or none")


@functools.lru_cache(maxsize=8192)
def _plan_of(
    op: str, M: int, N: int, K: int, r: int, dtype: torch.dtype, dropout: bool, bias: bool, need_dx: bool, bits: bool,
    descriptors: bool, device: torch.device, forced: str | None,
) -> tuple[Plan, Chip]:  # fmt: skip
    chip = chip_for(device)
    return choose(CallShape(op, M, N, K, r, dtype, dropout, bias, need_dx, bits, descriptors), chip, forced), chip


def plan_call(
    op: str,
    operands: tuple[torch.Tensor, ...],
    N: int,
    K: int,
    r: int,
    dropout: bool,
    bias: bool,
    need_dx: bool,
    bits: bool,
    forced: str | None,
) -> tuple[Plan, Chip]:
    """The plan and the Chip of one call. ``operands``: (X, W) forward, (dY, X, W) backward; the first has M rows.

    Costs one cache look-up. If descriptors cannot take these matrices, "auto" chooses again and a plan requested by
    name raises. If the matrices do not allow the wide loads that tuned tiles need, the default tiles are used.

    Raises:
        BackendUnavailableError: the plan requested by name is not valid for this call.
    """
    dtype, device = (first := operands[0]).dtype, first.device
    plan, chip = _plan_of(op, first.shape[0], N, K, r, dtype, dropout, bias, need_dx, bits, True, device, forced)
    if plan.descriptors and not descriptors_take(*operands):
        return _plan_of(op, first.shape[0], N, K, r, dtype, dropout, bias, need_dx, bits, False, device, forced)
    if plan.tiles is not None and not plan.descriptors and not wide_loads(*operands):
        return replace(plan, tiles=None), chip
    return plan, chip


def descriptors_take(*matrices: torch.Tensor) -> bool:
    """Whether TMA descriptors can take these matrices: contiguous rows that begin at multiples of 16 bytes."""
    for t in matrices:
        rows, columns = t.shape
        stride, step = t.stride()
        if (step != 1 and columns > 1) or (rows > 1 and stride * t.element_size() % 16) or t.data_ptr() % 16:
            return False
    return True


def forget() -> None:
    """Clear all cached plans and tables: the next call reads the tables again."""
    for remembered in (table_for, candidates, choose, _plan_of):
        remembered.cache_clear()
