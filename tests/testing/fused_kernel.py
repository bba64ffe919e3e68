"""A plain fused LoRA kernel for test_planted_bugs.py, which edits this source and imports the result.

Y = X W^T + scaling * (X A^T) B^T         X (M,K)  W (N,K)  A (r,K)  B (N,r)  Y (M,N)
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _fused_kernel(
    X_ptr, W_ptr, A_ptr, B_ptr, Y_ptr, M, N, K, r, scaling, stride_xm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(0)
    pid_n = tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask_r = offs_r < r
    x_ptrs = X_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_k[None, :]
    w_ptrs = W_ptr + offs_n[None, :].to(tl.int64) * K + offs_k[:, None]
    a_ptrs = A_ptr + offs_r[None, :] * K + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    xa = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        mask_k = k * BLOCK_K + offs_k < K
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        a = tl.load(a_ptrs, mask=mask_r[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        xa = tl.dot(x, a, xa, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
        a_ptrs += BLOCK_K
    b_ptrs = B_ptr + offs_n[None, :] * r + offs_r[:, None]
    b = tl.load(b_ptrs, mask=mask_n[None, :] & mask_r[:, None], other=0.0)
    acc = tl.dot((xa * scaling).to(b.dtype), b, acc, input_precision="ieee")
    y_ptrs = Y_ptr + offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(Y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def fused(
    X: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, tiles: tuple[int, int, int]
) -> torch.Tensor:
    """Y (M, N); X may have padded rows, the others are contiguous; tiles are BLOCK_M, BLOCK_N, BLOCK_K."""
    (M, K), (N, r) = X.shape, B.shape
    Y = torch.empty(M, N, dtype=X.dtype, device=X.device)
    grid = (triton.cdiv(M, tiles[0]), triton.cdiv(N, tiles[1]))
    _fused_kernel[grid](X, W, A, B, Y, M, N, K, r, scaling, X.stride(0), *tiles, max(16, triton.next_power_of_2(r)))
    return Y
