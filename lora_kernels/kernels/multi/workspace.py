"""Memory of multi_decode between its programs: scratch, and counters that each launch finds and leaves at zero."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lora_kernels.locks import fork_safe_lock
from lora_kernels.operands.dtypes import low_rank_dtype


class Workspace(NamedTuple):
    """int32 counters, zero between launches; fp32 planes of tiles; fp32 parts of XA; XA in low_rank_dtype. All flat."""

    counters: Tensor
    planes: Tensor
    parts: Tensor
    XA: Tensor


_workspaces: dict[tuple[torch.device, int, torch.dtype], Workspace] = {}
_spare: dict[torch.device, Tensor] = {}  # zeros from which captured launches take their counters
_spare_lock = fork_safe_lock()
SPARE = 1 << 20  # of them, on a device


def workspace_of(needed: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> Workspace:
    """Memory for a launch on the current stream; only its counters need what they hold from one launch to the next.

    Launches on one stream follow each other and share a workspace. A captured launch may be replayed beside anything
    but itself: its planes belong to the graph's own memory, its counters to it alone, for good, cut from zeros made
    before (about 500 bytes a launch, 4 MB a device; past those the graph clears its counters itself).
    """
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        if torch.cuda.is_current_stream_capturing():
            return Workspace(_spare_counters(needed[0], device), *_scratch(needed, device, dtype))
    else:
        stream = 0
    kept = _workspaces.get((device, stream, dtype))
    if kept is None or any(have.numel() < need for have, need in zip(kept, needed, strict=True)):
        most = [max(need, have.numel()) for have, need in zip(kept, needed, strict=True)] if kept else list(needed)
        grown = tuple(triton.next_power_of_2(max(size, 1)) for size in most)
        counters = torch.zeros(grown[0], dtype=torch.int32, device=device)
        kept = _workspaces[device, stream, dtype] = Workspace(counters, *_scratch(grown, device, dtype))
        if device.type == "cuda" and device not in _spare:
            _spare[device] = torch.zeros(SPARE, dtype=torch.int32, device=device)
    return kept


def _spare_counters(n: int, device: torch.device) -> Tensor:
    with _spare_lock:
        spare = _spare.get(device)
        if spare is None or spare.numel() < n:
            return torch.zeros(n, dtype=torch.int32, device=device)
        _spare[device] = spare[-(-n // 64) * 64 :]  # the next launch's are as aligned as these
        return spare[:n]


def _scratch(sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    kinds = (torch.float32, torch.float32, low_rank_dtype(dtype))
    planes, parts, XA = (torch.empty(n, dtype=kind, device=device) for n, kind in zip(sizes[1:], kinds, strict=True))
    return planes, parts, XA
