"""Backward of a SwiGLU block with LoRA on gate, up and down: the order of the launches.

    dH = dY W_d + D_h/(1-p) * (dYB A_d)     dG, dU, H = swiglu_bwd(dH, G, U)     dA_d = dYB^T (D_h*H) / (1-p)
    dX = dG W_g + dU W_u + D_x/(1-p) * ([dGB, dUB] [A_g; A_u])

H does not exist while dH is computed, so dA of down is a separate pass over H, which swiglu_bwd computes with dG, dU:
7 passes over (M, F) from dH on. H first and dA from dH's epilogue would be 9.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lora_kernels.kernels.chip import Chip
from lora_kernels.kernels.common import Dropout
from lora_kernels.kernels.mlp.swiglu import swiglu, swiglu_bwd
from lora_kernels.kernels.stacked.launchers import da_of, dx_of, lora_linear_stacked_bwd, low_rank_grads

Grads = list[Tensor | None]


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
    drop_x: Dropout | None,
    drop_h: Dropout | None,
    need_x: bool,
    need_a: Sequence[bool],
    need_b: Sequence[bool],
    need_bias: Sequence[bool],
    plans: tuple[str, str],
    chip: Chip,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Grads, Grads]:
    """dX, dA of gate and up (R, K), dA of down (r, F), the dB and dbias of (gate, up, down); M > 0.

    Operands and needs of (gate, up, down), XA as the blocks (M, r_p) of gate and up; ``plans`` of the stacked layers
    and of down.
    """
    upper, lower = plans
    through = need_x or any((*need_a[:2], *need_b[:2], *need_bias[:2]))
    dYB, dB, dbias = low_rank_grads(
        [dY], B[2:], [HA], scaling[2:], through or need_a[2], need_b[2:], need_bias[2:], lower, chip
    )
    if dYB is None or not through:
        dA_down = None if dYB is None else da_of(dYB, swiglu(G, U), drop_h, A[2].dtype, lower, chip)
        return None, None, dA_down, [None, None, *dB], [None, None, *dbias]
    dH, _ = dx_of([dY], W[2:], dYB, A[2], G, drop_h, lower, chip, need_a=False)
    dG, dU, H = swiglu_bwd(dH, G, U, make_h=need_a[2])
    del dH
    dA_down = None if H is None else da_of(dYB, H, drop_h, A[2].dtype, lower, chip)
    del H
    dX, dA, dB_first, dbias_first = lora_linear_stacked_bwd(
        (dG, dU), X, W[:2], A[:2], B[:2], XA, scaling[:2], drop_x, need_x, any(need_a[:2]), need_b[:2], need_bias[:2],
        upper, chip,
    )  # fmt: skip
    return dX, dA, dA_down, [*dB_first, *dB], [*dbias_first, *dbias]
