"""LoRA on all three layers of a SwiGLU block, forward and backward.

    G, U = gate(X), up(X)                   (M, F)   saved       stacked LoRA linear layers of one X
    H    = silu(G) * U                      (M, F)   not saved: computed again from G and U
    Y    = down(H)                          (M, N)   a LoRA linear layer
    dG   = dH * U * sig(G) (1 + G (1 - sig(G)))
    dU   = dH * silu(G)                     silu(G) = G sig(G), sig the logistic function

Dropout masks X, for gate and up together, and H, for down. Source: Shazeer, GLU Variants Improve Transformer,
arXiv 2002.05202, equation 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.reference.lora_linear import GradMask, lora_linear_bwd, lora_linear_fwd
from lora_kernels.reference.lora_linear_stacked import StackedNeeds, lora_linear_stacked_bwd, lora_linear_stacked_fwd


class MLPNeeds(NamedTuple):
    """The gradients that a backward call computes: of X, and of A, B and bias of (gate, up, down)."""

    X: bool
    A: Sequence[bool]
    B: Sequence[bool]
    bias: Sequence[bool]

    @property
    def first(self) -> StackedNeeds:
        """The selection for gate and up."""
        return StackedNeeds(self.X, any(self.A[:2]), self.B[:2], self.bias[:2])

    @property
    def through(self) -> bool:
        """Whether the gradient must flow through down."""
        return self.X or any((*self.A[:2], *self.B[:2], *self.bias[:2]))


class MLPGrads(NamedTuple):
    """dX (M, K), dA of gate and up (R, K), dA of down (r, F), and dB, dbias of the three; None if not selected."""

    X: Tensor | None
    A: Tensor | None
    A_down: Tensor | None
    B: list[Tensor | None]
    bias: list[Tensor | None]


def swiglu(G: Tensor, U: Tensor) -> Tensor:
    """H = silu(G) * U."""
    return torch.nn.functional.silu(G).mul_(U)


def swiglu_bwd(dH: Tensor, G: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """dG and dU."""
    return torch.ops.aten.silu_backward(dH * U, G), torch.nn.functional.silu(G).mul_(dH)


def lora_mlp_fwd(
    X: Tensor,
    W: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    scaling: Sequence[float],
    keep_x: Tensor | None = None,
    keep_h: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Y (M, N), G and U (M, F), XA (M, R) and HA (M, r) for the operands of (gate, up, down) and X (M, K)."""
    first = W[:2], A[:2], B[:2], bias[:2], scaling[:2]
    (G, U), XA = lora_linear_stacked_fwd(X, *first, keep_x, p)
    Y, HA = lora_linear_fwd(swiglu(G, U), W[2], A[2], B[2], bias[2], scaling[2], keep_h, p)
    return Y, G, U, XA, HA


def lora_mlp_bwd(
    dY: Tensor,
    X: Tensor,
    G: Tensor,
    U: Tensor,
    W: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    XA: Sequence[Tensor],
    HA: Tensor,
    scaling: Sequence[float],
    keep_x: Tensor | None,
    keep_h: Tensor | None,
    p: float,
    needs: MLPNeeds,
) -> MLPGrads:
    """The gradients selected by ``needs``; XA as its blocks (M, r_p) of gate and up."""
    last = GradMask(needs.through, needs.A[2], needs.B[2], needs.bias[2])
    H = swiglu(G, U) if needs.A[2] else G  # without dA only its shape is used
    dH, dA_down, *down = lora_linear_bwd(dY, H, W[2], A[2], B[2], HA, scaling[2], keep_h, p, last)
    if dH is None:
        return MLPGrads(None, None, dA_down, [None, None, down[0]], [None, None, down[1]])
    del H
    dGU = swiglu_bwd(dH, G, U)
    del dH
    first = W[:2], A[:2], B[:2], XA, scaling[:2]
    dX, dA, dB, dbias = lora_linear_stacked_bwd(dGU, X, *first, keep_x, p, needs.first)
    return MLPGrads(dX, dA, dA_down, [*dB, down[0]], [*dbias, down[1]])
