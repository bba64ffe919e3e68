"""Functions that all kernels share: dropout's keep mask, tile order, the K loop, and the dtype of a product."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Argument record of inverted dropout: probability p and an int64 tensor (2,) of seed and offset, on the device.

    ``bits``: the keep mask at one bit an element, uint8 (M, ceil(K/8)) in rows of 16 ceil(K/128) bytes, bit j of byte c
    for column 8 c + j: the forward writes it and the backward reads it. None: it is drawn again.
    """

    p: float
    seed: Tensor
    bits: Tensor | None = None

    @property
    def inv_keep(self) -> float:
        return 0.0 if self.p >= 1.0 else 1.0 / (1.0 - self.p)

    @property
    def threshold(self) -> int:
        """16-bit lanes below this value are dropped."""
        return round(self.p * 65536)


NONE, DRAW, READ = 0, 1, 2  # DROPOUT of a kernel: no mask, Philox from the seed, the packed bits


def dropout_args(drop: Dropout | None, draw: bool = False) -> dict[str, Any]:
    """Keyword arguments seed_ptr, keep_ptr, stride_keep, threshold and DROPOUT of a kernel.

    ``draw``: draw the mask even if bits exist, for a kernel that writes them.
    """
    if drop is None:
        return {"seed_ptr": None, "keep_ptr": None, "stride_keep": 0, "threshold": 0, "DROPOUT": NONE}
    return {
        "seed_ptr": drop.seed,
        "keep_ptr": drop.bits,
        "stride_keep": 0 if drop.bits is None else drop.bits.stride(0),
        "threshold": drop.threshold,
        "DROPOUT": DRAW if draw or drop.bits is None else READ,
    }


def inv_keep(drop: Dropout | None) -> float:
    """1 / (1 - p), or 1 without dropout."""
    return 1.0 if drop is None else drop.inv_keep


def precision_of(dtype: torch.dtype) -> str:
    """Triton's input_precision for the dots of a layer of ``dtype``: for float32 what torch.matmul would use.

    float16: its low-rank operands are float32 (low_rank_dtype), which three TF32 products multiply as exactly as
    float32, at six times the work of 16 bits in the r columns. AMD's matrix units multiply float32. 16-bit dots ignore
    this setting.
    """
    if dtype == torch.float16:
        hip = not knobs.runtime.interpret and driver.active.get_current_target().backend == "hip"
        return "ieee" if hip else "tf32x3"
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


@triton.jit
def tile_order(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """(pid_m, pid_n): tiles run down GROUP_M row blocks before the next column block, so that W tiles stay in L2."""
    width = GROUP_M * num_n
    first_m = (pid // width) * GROUP_M
    rows = tl.minimum(num_m - first_m, GROUP_M)
    return first_m + (pid % width) % rows, (pid % width) // rows


@triton.jit
def _draw(seed_ptr, offs_m, col, BLOCK_K: tl.constexpr):
    """Four random words (BLOCK_M, BLOCK_K / 8) each, for 8 columns at a time: Philox4x32-7, key = seed, counter =
    (column // 8, row, offset); reference/dropout.py has it in words."""
    BLOCK_M: tl.constexpr = offs_m.shape[0]
    seed = tl.load(seed_ptr)
    offset = tl.load(seed_ptr + 1)
    # all four counters in the tile's shape, as tl.philox requires
    c0 = tl.broadcast_to((col // 8 + tl.arange(0, BLOCK_K // 8))[None, :], (BLOCK_M, BLOCK_K // 8))
    c1 = tl.broadcast_to(offs_m[:, None], (BLOCK_M, BLOCK_K // 8))
    zero = c0 * 0
    c2 = zero.to(tl.uint32) + (offset & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero.to(tl.uint32) + ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, c0, c1, c2, c3, 7)


@triton.jit
def _two_bits(word, threshold):
    """Whether a word's low and high 16 bits reach the threshold, as bits 0 and 1."""
    low = ((word & 0xFFFF).to(tl.int32) >= threshold).to(tl.int32)
    return low | (((word >> 16).to(tl.int32) >= threshold).to(tl.int32) << 1)


@triton.jit
def keep_bytes(
    seed_ptr,
    keep_ptr,
    stride_keep,
    offs_m,
    mask_m,
    col,
    K,
    threshold,
    BLOCK_K: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Keep bits int32 (BLOCK_M, BLOCK_K / 8) of rows offs_m and columns col .. col + BLOCK_K, both multiples of 8.

    Bit j of byte c is that of column col + 8 c + j. DROPOUT 1: drawn from the seed; 2: read.
    """
    if DROPOUT == 2:
        offs_c = col // 8 + tl.arange(0, BLOCK_K // 8)
        c_ptrs = keep_ptr + offs_m[:, None].to(tl.int64) * stride_keep + offs_c[None, :]
        return tl.load(c_ptrs, mask=mask_m[:, None] & (offs_c * 8 < K)[None, :], other=0).to(tl.int32)
    else:
        w0, w1, w2, w3 = _draw(seed_ptr, offs_m, col, BLOCK_K)
        packed = _two_bits(w0, threshold) | (_two_bits(w1, threshold) << 2)
        return packed | (_two_bits(w2, threshold) << 4) | (_two_bits(w3, threshold) << 6)


@triton.jit
def store_keep(packed, keep_ptr, stride_keep, offs_m, mask_m, col, K, BLOCK_K: tl.constexpr):
    """Store the bytes of rows offs_m and columns col .. col + BLOCK_K."""
    offs_c = col // 8 + tl.arange(0, BLOCK_K // 8)
    c_ptrs = keep_ptr + offs_m[:, None].to(tl.int64) * stride_keep + offs_c[None, :]
    tl.store(c_ptrs, packed.to(tl.uint8), mask=mask_m[:, None] & (offs_c * 8 < K)[None, :])


@triton.jit
def unpack_keep(packed):
    """Keep bits int32 (BLOCK_M, BLOCK_K / 8) as a mask (BLOCK_M, BLOCK_K)."""
    bits = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (packed.shape[0], packed.shape[1] * 8)) != 0


@triton.jit
def keep_tile(
    seed_ptr,
    keep_ptr,
    stride_keep,
    offs_m,
    mask_m,
    col,
    K,
    threshold,
    BLOCK_K: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Keep mask (BLOCK_M, BLOCK_K) of rows offs_m and columns col .. col + BLOCK_K, drawn or read.

    Drawn for a mask alone, without bytes in between: beside an accumulator of 128 x 128 that saves 50 registers.
    """
    if DROPOUT == 2:
        packed = keep_bytes(seed_ptr, keep_ptr, stride_keep, offs_m, mask_m, col, K, threshold, BLOCK_K, DROPOUT)
        return unpack_keep(packed)
    else:
        w0, w1, w2, w3 = _draw(seed_ptr, offs_m, col, BLOCK_K)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # last two axes read w0 w1 w2 w3
        lanes = tl.join(words & 0xFFFF, words >> 16)
        return tl.reshape(lanes, (offs_m.shape[0], BLOCK_K)).to(tl.int32) >= threshold


@triton.jit
def accumulate(
    acc,
    P_ptr,
    Q_ptr,
    offs_m,
    offs_n,
    mask_m,
    mask_n,
    K,
    stride_pm,
    stride_pk,
    stride_qn,
    stride_qk,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc (BLOCK_M, BLOCK_N) + P Q^T over the whole of K, for P (M, K) and Q (N, K) of any strides."""
    offs_k = tl.arange(0, BLOCK_K)
    p_ptrs = P_ptr + offs_m[:, None].to(tl.int64) * stride_pm + offs_k[None, :].to(tl.int64) * stride_pk
    q_ptrs = Q_ptr + offs_n[None, :].to(tl.int64) * stride_qn + offs_k[:, None].to(tl.int64) * stride_qk
    step_p = tl.cast(stride_pk, tl.int64) * BLOCK_K
    step_q = tl.cast(stride_qk, tl.int64) * BLOCK_K
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            p = tl.load(p_ptrs, mask=mask_m[:, None], other=0.0)
            q = tl.load(q_ptrs, mask=mask_n[None, :], other=0.0)
        else:
            mask_k = offs_k < K - k * BLOCK_K
            p = tl.load(p_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            q = tl.load(q_ptrs, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(p, q, acc, input_precision=PRECISION)
        p_ptrs += step_p
        q_ptrs += step_q
    return acc


@triton.jit
def low_rank(
    S_ptr,
    T_ptr,
    offs_m,
    offs_n,
    mask_m,
    mask_n,
    r,
    stride_sm,
    stride_sr,
    stride_tn,
    stride_tr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S T^T (BLOCK_M, BLOCK_N) in fp32 for S (M, r) and T (N, r) of any strides; T is converted to S's dtype."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r0 in tl.range(0, r, BLOCK_R, num_stages=1):
        offs_r = r0 + tl.arange(0, BLOCK_R)
        mask_r = offs_r < r
        s_ptrs = S_ptr + offs_m[:, None].to(tl.int64) * stride_sm + offs_r[None, :] * stride_sr
        t_ptrs = T_ptr + offs_n[None, :].to(tl.int64) * stride_tn + offs_r[:, None].to(tl.int64) * stride_tr
        s = tl.load(s_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        t = tl.load(t_ptrs, mask=mask_n[None, :] & mask_r[:, None], other=0.0)
        acc = tl.dot(s, t.to(s.dtype), acc, input_precision=PRECISION)
    return acc
