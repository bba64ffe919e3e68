"""Runs one linear layer for a mixed batch in several ways: ours by every plan, and the rivals on the same tensors.

What a server computes once per step for all its layers (the adapter of each sequence, masks, padded tables of weights)
is computed for the rivals before the timing starts. Only forwards run, as in serving.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.autograd.multi_lora_linear import multi_lora_linear
from lora_kernels.check.serving.cases import ServingCase
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.finetune.train.extras import installed, require
from lora_kernels.operands.slots import BASE
from lora_kernels.planning.choose import TRITON_DTYPES, chip_for, split_name, triton_missing
from lora_kernels.planning.multi_cost import MultiCallShape
from lora_kernels.planning.multi_plan import CPP_ROWS, PLANS, choose, cpp_missing, resolve
from lora_kernels.testing.multi import MultiProblem

Call = Callable[[], Tensor]
ON_A_CPU = (
    "On a CPU the base product is PyTorch's, and the update one call of C++ (auto, where it was built) or PyTorch's "
    "operators (reference)."
)


@dataclass(frozen=True)
class Contender:
    """One way to compute Y; ``build(case, problem)`` returns a call that returns Y (M, N).

    backend: for ours, else empty. lora: False for the frozen layer, the unit of the ratios. in_full: False if the
    update is rounded to W's precision, so that its 16-bit result is not comparable. graph: whether a CUDA graph can
    capture it.
    """

    name: str
    build: Callable[[ServingCase, MultiProblem], Call]
    backend: str = ""
    lora: bool = True
    in_full: bool = True
    graph: bool = True
    needs: str = ""

    @property
    def ours(self) -> bool:
        """Whether it is lora_kernels' public function."""
        return bool(self.backend)

    @property
    def label(self) -> str:
        """The name with the requested backend."""
        return f"{self.name} {self.backend}".strip()

    def is_rival(self, dtype: torch.dtype) -> bool:
        """Return whether it is a rival for ``dtype``."""
        return not self.ours and self.lora and (self.in_full or dtype.itemsize > 2)

    def missing(self) -> str | None:
        """Return why it cannot run here, or None."""
        return f"{self.needs} is not installed" if self.needs and not installed(self.needs) else None


def _ours(case: ServingCase, q: MultiProblem, backend: str) -> Call:
    def call() -> Tensor:
        return multi_lora_linear(q.X, q.W, q.slots, q.ids, q.bias, backend=backend)

    return call


def _frozen(case: ServingCase, q: MultiProblem) -> Call:
    return lambda: F.linear(q.X, q.W, q.bias)


def _adapters(q: MultiProblem) -> list[tuple[int, int, float]]:
    """Return (first, end, scaling) of each slot, on the host."""
    starts, ranks, scalings = q.slots.starts.tolist(), q.slots.ranks.tolist(), q.slots.scalings.tolist()
    return [(first, first + r, s) for first, r, s in zip(starts, ranks, scalings, strict=True)]


def _peft(case: ServingCase, q: MultiProblem, fp32_adapters: bool = False) -> Call:
    """Call PEFT's own layer, with every adapter loaded, with adapter_names: one name per sequence."""
    peft: Any = require("peft")
    base = nn.Linear(case.K, case.N, bias=q.bias is not None, device="meta")
    base.weight = nn.Parameter(q.W, requires_grad=False)
    if q.bias is not None:
        base.bias = nn.Parameter(q.bias, requires_grad=False)
    holder: Any = nn.Sequential(OrderedDict(proj=base))
    model: Any = None
    for slot, (first, end, scaling) in enumerate(_adapters(q)):
        config = peft.LoraConfig(r=end - first, lora_alpha=end - first, target_modules=["proj"])
        if model is None:
            model = peft.get_peft_model(holder, config, f"slot{slot}", autocast_adapter_dtype=fp32_adapters)
        else:
            model.add_adapter(f"slot{slot}", config, autocast_adapter_dtype=fp32_adapters)
        layer = holder.proj  # PEFT replaces the linear layer by its own
        layer.scaling[f"slot{slot}"] = scaling
        with torch.no_grad():
            layer.lora_A[f"slot{slot}"].weight.copy_(q.slots.A[first:end])
            layer.lora_B[f"slot{slot}"].weight.copy_(q.slots.B[:, first:end])
    layer = holder.proj.eval()
    sequences, X = _sequences(case, q)
    names = [BASE if slot < 0 else f"slot{slot}" for slot in sequences]
    return lambda: layer(X, adapter_names=names).view(case.M, case.N)


def _sequences(case: ServingCase, q: MultiProblem) -> tuple[list[int], Tensor]:
    """Return the slot of each sequence, and X as (sequences, rows, K); one row each if the last sequence is shorter."""
    rows = case.sequence if case.M % case.sequence == 0 else 1
    return q.ids[::rows].tolist(), q.X.view(-1, rows, case.K)


def _bmm(case: ServingCase, q: MultiProblem) -> Call:
    """Shrink and expand by two batched products, with each sequence's A and B gathered from padded tables."""
    slots, L = q.slots, case.L
    width = max(case.ranks)
    A = q.X.new_zeros(L + 1, width, case.K)  # the last one means no adapter
    B = q.X.new_zeros(L + 1, width, case.N)
    for slot, (first, end, scaling) in enumerate(_adapters(q)):
        A[slot, : end - first] = slots.A[first:end] * scaling
        B[slot, : end - first] = slots.B[:, first:end].t()
    names, X = _sequences(case, q)
    index = torch.tensor(names, device=q.X.device) % (L + 1)

    def call() -> Tensor:
        Y = F.linear(q.X, q.W, q.bias)
        XA = torch.bmm(X, A.index_select(0, index).transpose(1, 2))
        return Y.view(*X.shape[:2], -1).baddbmm_(XA, B.index_select(0, index)).view(case.M, case.N)

    return call


def _all_slots(case: ServingCase, q: MultiProblem) -> Call:
    """Multiply X by every slot's A, set the columns of other slots to zero, multiply by every slot's B."""
    mask = q.X.new_zeros(case.M, q.slots.A.shape[0])
    for slot, (first, end, scaling) in enumerate(_adapters(q)):
        mask[q.ids == slot, first:end] = scaling
    A, B = q.slots.A.t(), q.slots.B.t()
    return lambda: F.linear(q.X, q.W, q.bias).addmm_((q.X @ A).mul_(mask), B)


def _swap(case: ServingCase, q: MultiProblem) -> Call:
    """Compute W + s B A for one adapter of the batch after another, and apply it to the adapter's rows."""
    held = _adapters(q)
    groups = [(slot, (q.ids == slot).nonzero().flatten()) for slot in sorted(set(q.ids.tolist()))]

    def call() -> Tensor:
        Y = q.X.new_empty(case.M, case.N)
        for slot, rows in groups:
            W = q.W
            if slot >= 0:
                first, end, scaling = held[slot]
                W = torch.addmm(q.W, q.slots.B[:, first:end], q.slots.A[first:end], alpha=scaling)
            Y[rows] = F.linear(q.X[rows], W, q.bias)
        return Y

    return call


FROZEN = Contender("frozen linear", _frozen, lora=False)
PEFT = Contender("peft adapter_names", _peft, graph=False, needs="peft")
PEFT_FP32 = Contender("peft fp32 adapters", partial(_peft, fp32_adapters=True), graph=False, needs="peft")
TWO_LAUNCHES = Contender("shrink + expand", partial(_ours, backend="triton:eager"))  # in Triton, as Punica and vLLM do
BMM = Contender("shrink + expand by bmm", _bmm)
ALL_SLOTS = Contender("all slots + mask", _all_slots)
SWAP = Contender("merge and swap", _swap, in_full=False)


def ours(backend: str = "auto") -> Contender:
    """Return multi_lora_linear by ``backend``."""
    return Contender("lora_kernels", partial(_ours, backend=backend), backend)


def our_backends(case: ServingCase, device: torch.device) -> list[str]:
    """Return the planner's choice and every plan that takes the case; on a CPU also the reference."""
    if not _in_triton(case, device):
        return ["reference"] if cpp_missing() else ["auto", "reference"]
    named = [*(f"triton:{plan}" for plan in PLANS if plan != "cuda"), "cuda"]
    return ["triton", *(backend for backend in named if refusal(case, backend, device) is None)]


def _in_triton(case: ServingCase, device: torch.device) -> bool:
    return triton_missing(device.type) is None and case.dtype in TRITON_DTYPES


def refusal(case: ServingCase, backend: str, device: torch.device) -> str | None:
    """Return why ``backend`` does not take the case here, or None."""
    try:
        plan_label(case, backend, device)
    except BackendUnavailableError as error:
        return str(error)
    return None


def plan_label(case: ServingCase, backend: str, device: torch.device) -> str:
    """Return what runs: "reference", "decode", "auto (decode)".

    Raises:
        BackendUnavailableError: no plan takes the case.
    """
    found = resolve(backend, device.type, case.dtype)
    if found == "auto":  # on a CPU
        return "auto (reference)" if cpp_missing() or CPP_ROWS[case.dtype] < case.M else "auto (cpp)"
    if found in ("reference", "cpp"):
        return found
    kind, forced = split_name(found)
    forced = "cuda" if kind == "cuda" else forced
    plan = choose(_planned(case), chip_for(device), forced).name
    return plan if forced else f"auto ({plan})"


def planned_launches(case: ServingCase, backend: str, device: torch.device) -> int:
    """Return the number of launches of the plan that runs; 0 on a CPU."""
    label = plan_label(case, backend, device)
    name = label.removeprefix("auto (").removesuffix(")")
    return 0 if name in ("reference", "cpp") else len(choose(_planned(case), chip_for(device), name).launches)


def _planned(case: ServingCase) -> MultiCallShape:
    return MultiCallShape("fwd", case.M, case.N, case.K, case.L, sum(case.ranks), case.dtype)


def contenders(case: ServingCase, device: torch.device) -> list[Contender]:
    """Return the frozen layer, ours by every plan, and every rival."""
    two = [PEFT, *([PEFT_FP32] if case.dtype.itemsize == 2 else [])]
    rivals = [*([TWO_LAUNCHES] if _in_triton(case, device) else []), BMM, ALL_SLOTS, *two, SWAP]
    return [FROZEN, *(ours(backend) for backend in our_backends(case, device)), *rivals]
