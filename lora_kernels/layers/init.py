"""Initialises lora_A (r, K) and lora_B (N, r), with PEFT's meaning and arithmetic."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lora_kernels.errors import ConfigError

Init = bool | str


def init_lora_weights(init: Init, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, r: int) -> None:
    """Fill lora_A and lora_B in place; "pissa" and "olora" also replace weight.data by the rest of W.

    True: A Kaiming-uniform with a = sqrt(5) as in nn.Linear, B zero: the layer starts as its base.
    False: A and B both as in nn.Linear: the layer starts away from its base, for tests.
    "gaussian": A normal with standard deviation 1/r, B zero.
    "pissa" (Meng et al., arXiv 2404.02948): W = U S V^T; B = U_r sqrt(S_r / scaling), A = sqrt(S_r / scaling) V_r^T.
    "olora" (Buyukakyuz, arXiv 2406.01775): W = Q R; B = Q_r, A = R_r.
    For the last two W becomes W - scaling * B A, computed in float32 (float64 for a float64 W) and rounded once to W's
    dtype. weight.data is replaced, not overwritten, so that a caller that kept the old tensor can restore it.

    Raises ConfigError for an unknown init, and where W cannot be decomposed (r > min(N, K), scaling <= 0, not finite);
    nothing was changed then.
    """
    with torch.no_grad():
        if init is True or init is False:
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
            nn.init.zeros_(lora_B) if init else nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
        elif init == "gaussian":
            nn.init.normal_(lora_A, std=1 / r)
            nn.init.zeros_(lora_B)
        elif init in ("pissa", "olora"):
            W = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
            if r > min(W.shape) or scaling <= 0 or not torch.isfinite(W).all():
                raise ConfigError(
                    f"init_lora_weights={init!r} takes r columns out of a finite W, with a positive scaling; given are "
                    f"r={r}, W {tuple(W.shape)}, scaling={scaling}"
                )
            A, B = _pissa(W, scaling, r) if init == "pissa" else _olora(W, r)
            weight.data = (W - scaling * B @ A).to(weight.dtype)
            lora_A.copy_(A)
            lora_B.copy_(B)
        else:
            raise ConfigError(f'init_lora_weights={init!r}: accepted are True, False, "gaussian", "pissa", "olora"')


def _pissa(W: Tensor, scaling: float, r: int) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = torch.diag(torch.sqrt(S[:r] / scaling))
    return root @ Vh[:r], U[:, :r] @ root


def _olora(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(W)
    return R[:r], Q[:, :r]
