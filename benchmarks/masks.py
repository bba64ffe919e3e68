"""Dropout's masks bit for bit: what forward and backward applied, read off results that show nothing but the mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.checks import check_of
from benchmarks.rivals import ours
from benchmarks.rows import Check
from lora_kernels import BackendUnavailableError, ops
from lora_kernels.planning.choose import FORWARD_ONLY
from lora_kernels.reference import GradMask, philox_keep_mask, unpack_keep

_RANKS = 16  # one tile of ranks in any dtype


def forward_mask(
    seed: Tensor, p: float, M: int, K: int, dtype: torch.dtype, backend: str, keep_bits: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The keep mask (M, K) that the forward applied, and the bits it left if ``keep_bits``.

    With X = 1 and one-hot rows in A, XA is the mask's columns.
    """
    like: dict[str, Any] = {"device": seed.device, "dtype": dtype}
    X, W, B = torch.ones(M, K, **like), torch.zeros(_RANKS, K, **like), torch.eye(_RANKS, **like)
    columns, bits = [], None
    for first in range(0, K, _RANKS):
        A = torch.zeros(_RANKS, K, **like)
        picked = torch.arange(min(_RANKS, K - first), device=seed.device)
        A[picked, first + picked] = 1
        _, XA, bits = ops.lora_linear_fwd(X, W, A, B, None, 1.0, p, seed, backend, keep_bits)
        columns.append(XA[:, : len(picked)] != 0)
    return torch.cat(columns, dim=1), bits


def backward_masks(
    seed: Tensor, p: float, M: int, K: int, dtype: torch.dtype, backend: str, bits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The keep masks (M, K) of dX and dA, from ``bits`` or, without them, drawn again from the seed.

    W = 0 and dYB A = 1 leave the mask in dX, one-hot dYB leaves its rows in dA.
    """
    like: dict[str, Any] = {"device": seed.device, "dtype": dtype}
    X, W, B = torch.ones(M, K, **like), torch.zeros(_RANKS, K, **like), torch.eye(_RANKS, **like)
    A, XA = torch.full((_RANKS, K), 1 / _RANKS, **like), torch.zeros(M, _RANKS, **like)

    def gradients(dY: Tensor) -> tuple[Tensor, Tensor]:
        dX, dA, *_ = ops.lora_linear_bwd(dY, X, W, A, B, XA, 1.0, p, seed, bits, GradMask(), backend)
        assert dX is not None
        assert dA is not None
        return dX, dA

    of_dX = gradients(torch.ones(M, _RANKS, **like))[0] != 0
    rows = []
    for first in range(0, M, _RANKS):
        dY = torch.zeros(M, _RANKS, **like)
        picked = torch.arange(min(_RANKS, M - first), device=seed.device)
        dY[first + picked, picked] = 1
        rows.append(gradients(dY)[1][: len(picked)] != 0)
    return of_dX, torch.cat(rows)


def masks_agree(case: Case, device: torch.device, backend: str, seeds: tuple[tuple[int, int], ...]) -> Iterator[Check]:
    """Forward, the bits it leaves, dX and dA by those bits and by the seed: each is philox_keep_mask, bit for bit.

    A plan that refuses dropout, or to draw it again in the backward, gives one check that says so.
    """
    how = case.p, case.M, case.K, case.dtype, backend
    for seed_and_offset in seeds:
        seed = torch.tensor(seed_and_offset, dtype=torch.int64, device=device)
        expected = philox_keep_mask(seed, case.p, case.M, case.K)
        applied: dict[str, Tensor] = {}
        try:
            applied["XA"], bits = forward_mask(seed, *how, keep_bits=True)
            assert bits is not None
            applied["bits"] = unpack_keep(bits, case.K)
            if backend.partition(":")[2] not in FORWARD_ONLY:
                applied["dX by bits"], applied["dA by bits"] = backward_masks(seed, *how, bits)
                applied["dX by seed"], applied["dA by seed"] = backward_masks(seed, *how)
        except BackendUnavailableError as refusal:
            yield check_of("mask", case, ours(backend), "", "refused", message=str(refusal))
        for name, mask in applied.items():
            wrong = int((mask != expected).sum())
            message = f"seed {seed_and_offset}: {wrong} of {mask.numel()} bits differ" if wrong else ""
            yield check_of("mask", case, ours(backend), name, "failed" if wrong else "ok", message=message)


def keep_rate(case: Case, device: torch.device, backend: str) -> Iterator[Check]:
    """The share of kept elements lies within five standard deviations of 1 - p."""
    seed = torch.tensor([20_240_601, 3], dtype=torch.int64, device=device)
    mask, _ = forward_mask(seed, case.p, case.M, case.K, case.dtype, backend)
    kept = mask.double().mean().item()
    deviations = abs(kept - (1 - case.p)) / math.sqrt(case.p * (1 - case.p) / (case.M * case.K))
    message = f"kept {kept:.6f}, {deviations:.1f} standard deviations from {1 - case.p:g}"
    yield check_of("keep rate", case, ours(backend), "XA", "ok" if deviations < 5 else "failed", message=message)
