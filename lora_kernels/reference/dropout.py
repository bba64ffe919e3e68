"""Keep masks that are regenerated from a seed instead of stored.

Philox4x32 with seven rounds (Salmon et al., SC 2011: the fewest that pass BigCrush), key = seed, counter =
(column // 8, row, offset low, offset high). One draw is 128 bits: eight 16-bit lanes for eight neighbouring columns.
An element is dropped when its lane is below round(p * 65536). The mask depends only on (seed, offset, row, column),
not on M, K or a tile shape, so every kernel regenerates the same mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
_MUL = (0xD2511F53, 0xCD9E8D57)
_KEY = (0x9E3779B9, 0xBB67AE85)
_U32 = 0xFFFFFFFF


def drop_threshold(p: float) -> int:
    """The 16-bit lane value below which an element is dropped."""
    return round(p * 65536)


def _mul_hi_lo(const: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of const * x for 0 <= x < 2**32 in int64, without overflow."""
    lo, hi = const * (x & 0xFFFF), const * (x >> 16)
    mid = (lo >> 16) + hi
    return mid >> 16, ((mid & 0xFFFF) << 16) | (lo & 0xFFFF)


def philox_keep_mask(seed: Tensor, p: float, M: int, K: int, device: torch.device | str | None = None) -> Tensor:
    """The kernels' keep mask, bit for bit: bool (M, K).

    ``seed`` is an int64 tensor (2,): seed and offset. Runs on ``device`` (default: the seed's) without a host sync.
    """
    device = seed.device if device is None else torch.device(device)
    seed = seed.to(device)
    key0, key1 = seed[0] & _U32, (seed[0] >> 32) & _U32
    c0 = torch.arange((K + 7) // 8, device=device)[None, :]
    c1 = torch.arange(M, device=device)[:, None]
    c2, c3 = seed[1] & _U32, (seed[1] >> 32) & _U32
    for _ in range(ROUNDS):
        hi0, lo0 = _mul_hi_lo(_MUL[0], c0)
        hi1, lo1 = _mul_hi_lo(_MUL[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ key0, lo1, hi0 ^ c3 ^ key1, lo0
        key0, key1 = (key0 + _KEY[0]) & _U32, (key1 + _KEY[1]) & _U32
    words = torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)
    lanes = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    return lanes.reshape(M, 8 * ((K + 7) // 8))[:, :K] >= drop_threshold(p)


def generator_keep_mask(seed: Tensor, p: float, M: int, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A keep mask from PyTorch's own CPU generator: (M, K) of 0 and 1, the same for the same (seed, p, M, K).

    ``seed`` is an int64 CPU tensor (2,). As in Philox an element is dropped by 16 random bits, four elements to a draw:
    an eighth of the time that bernoulli_ takes, and a far smaller part of Philox's in PyTorch operations. Compared as
    float32, which holds 16 bits exactly: comparing int16 takes three times as long, going through bool seven times.
    """
    first, second = seed.tolist()
    mixed = (first * 0x9E3779B97F4A7C15 + second * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    generator = torch.Generator().manual_seed(mixed >> 32)  # the CPU generator uses 32 bits of its seed
    draws = torch.randint(-(2**63), 2**63 - 1, (M, (K + 3) // 4), generator=generator, device="cpu")
    lanes = draws.view(torch.int16) if K % 4 == 0 else draws.view(torch.int16)[:, :K]
    keep = lanes.float().ge_(drop_threshold(p) - 32768)
    return keep if dtype == torch.float32 else keep.to(dtype)


def packed_width(K: int) -> int:
    """Bytes of a row of K mask bits, rounded up to a multiple of 16, so that rows are aligned for wide loads."""
    return 16 * ((K + 127) // 128)


def pack_keep(keep: Tensor) -> Tensor:
    """A keep mask bool (M, K) at one bit an element: uint8 (M, packed_width(K)), bit j of byte c for column 8 c + j."""
    M, K = keep.shape
    lanes = keep.new_zeros(M, 8 * packed_width(K))
    lanes[:, :K] = keep
    weights = torch.tensor([1 << j for j in range(8)], device=keep.device)
    return (lanes.view(M, -1, 8) * weights).sum(2).to(torch.uint8)


def unpack_keep(bits: Tensor, K: int) -> Tensor:
    """The keep mask bool (M, K) that pack_keep packed."""
    lanes = bits[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
    return lanes.reshape(bits.shape[0], 8 * bits.shape[1])[:, :K].bool()
