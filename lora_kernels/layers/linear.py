"""LoRALinear: a replacement of nn.Linear with a frozen weight and a trained low-rank update."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_kernels.autograd.lora_linear import lora_linear_unchecked
from lora_kernels.config import LoRAConfig
from lora_kernels.errors import ConfigError, MergeError
from lora_kernels.formats.inference import savable
from lora_kernels.layers.init import Init, init_lora_weights


class LoRALinear(nn.Module):
    """y = x W^T + bias + scaling * dropout(x) A^T B^T.

    ``weight`` (N, K) and ``bias`` (N,) are nn.Linear's and frozen; ``lora_A`` (r, K) and ``lora_B`` (N, r) are trained.

    Args:
        in_features, out_features: K and N.
        r: rank, from 1 up.
        lora_alpha: scaling is lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``.
        lora_dropout: probability of dropping an element of the adapter's input while training.
        bias: whether the base layer has a bias.
        init_lora_weights: True (A uniform, B zero), False (both random), "gaussian", "pissa" or "olora", as in PEFT.
        adapter_dtype: of lora_A and lora_B; None takes float32 for a 16-bit base, as PEFT does, else the base's.
        backend: as in lora_linear.

    Attributes that may be set at any time: scaling, lora_dropout, backend, and dropout_mask ("bits" or "seed", as in
    lora_linear).

    Raises:
        ConfigError: r below 1, or a dropout outside [0, 1].
    """

    use_dora: ClassVar[bool] = False
    adapter_parameters: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        init_lora_weights: Init = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        super().__init__()
        self._build(base, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype, backend)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: LoRAConfig | None = None,
        *,
        r: int | None = None,
        lora_alpha: float | None = None,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> LoRALinear:
        """Make a layer that shares and freezes the Parameters of ``linear``; r and lora_alpha override those of config.

        Raises ConfigError if ``config`` asks for DoRA and this is LoRALinear.
        """
        config = LoRAConfig() if config is None else config
        if config.use_dora and not cls.use_dora:
            raise ConfigError(f"config.use_dora is set, and {cls.__name__} is plain LoRA; make a DoRALinear")
        if config.lora_bias and "lora_bias" not in cls.adapter_parameters:
            raise ConfigError(f"config.lora_bias is set, and {cls.__name__} has no lora_bias; use BiasedLoRALinear")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._build(
            linear,
            config.r if r is None else r,
            config.lora_alpha if lora_alpha is None else lora_alpha,
            config.lora_dropout,
            config.use_rslora,
            config.init_lora_weights,
            adapter_dtype,
            backend,
        )
        layer.train(linear.training)
        return layer

    def _build(
        self,
        base: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        init: Init,
        adapter_dtype: torch.dtype | None,
        backend: str,
    ) -> None:
        if r < 1:
            raise ConfigError(f"r={r}; a rank is at least 1")
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.backend, self.dropout_mask = backend, "bits"
        self._base_weight: Tensor | None = None
        base.requires_grad_(False)
        weight, bias = base.weight, base.bias
        if weight.is_inference():  # a new Parameter on the same memory: autograd cannot save W
            weight = nn.Parameter(savable(weight), requires_grad=False)
            bias = None if bias is None else nn.Parameter(savable(bias), requires_grad=False)
        self.weight = weight
        self.register_parameter("bias", bias)  # also None: forward reads all operands from _parameters
        if adapter_dtype is None:
            adapter_dtype = torch.float32 if self.weight.dtype.itemsize == 2 else self.weight.dtype
        like: dict[str, Any] = {"device": self.weight.device, "dtype": adapter_dtype}
        with torch.inference_mode(False):  # tensors made in inference mode cannot be trained
            self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **like))
            self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **like))
            self.reset_lora_parameters(init)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_base_weight":  # a Parameter kept aside must not be registered: it is not part of the state_dict
            object.__setattr__(self, name, value)
            return
        if name == "lora_dropout" and not 0.0 <= value <= 1.0:
            raise ConfigError(f"lora_dropout={value}; accepted is a probability from 0 to 1")
        if name == "dropout_mask" and value not in ("bits", "seed"):
            raise ConfigError(f"dropout_mask={value!r}; accepted are 'bits' and 'seed'")
        super().__setattr__(name, value)

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds W + scaling * B A."""
        return self._base_weight is not None

    def reset_lora_parameters(self, init: Init = True) -> None:
        """Initialise lora_A and lora_B again; "pissa" and "olora" also subtract their product from ``weight``."""
        with torch.no_grad():
            init_lora_weights(init, self.weight, self.lora_A, self.lora_B, self.scaling, self.r)

    def forward(self, x: Tensor) -> Tensor:
        """Compute y (..., N) for x (..., K)."""
        if self._base_weight is not None:
            return nn.functional.linear(x, self.weight, self.bias)
        held: dict[str, Any] = self._parameters  # asking nn.Module for each by name costs 0.5 us more
        try:
            W, A, B, bias = held["weight"], held["lora_A"], held["lora_B"], held["bias"]
        except KeyError:  # wrappers keep tensors of their own in the Parameters' place: parametrizations, FSDP
            W, A, B, bias = self.weight, self.lora_A, self.lora_B, self.bias
        p = self.lora_dropout if self.training else 0.0
        keep_bits = self.dropout_mask == "bits"
        return lora_linear_unchecked(x, W, A, B, bias, self.scaling, p, None, self.backend, keep_bits)

    def total_bias(self) -> Tensor | None:
        """The bias (N,) that is added to each row of the output: the base layer's, or None."""
        return self.bias

    def delta_weight(self) -> Tensor:
        """scaling * B A as float32 (N, K) (float64 for float64 adapters)."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        with torch.no_grad():
            return self.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))

    def merged_weight(self) -> Tensor:
        """W + scaling * B A in W's dtype, rounded once.

        Raises:
            MergeError: a value that is not finite.
        """
        delta = self.delta_weight()
        merged = (self.weight.detach().to(delta.dtype) + delta).to(self.weight.dtype)
        if not torch.isfinite(merged).all():
            raise MergeError("W + scaling * B A holds NaN or infinity; the weight was left as it is. Check the adapter")
        return merged

    def merge(self) -> None:
        """Put W + scaling * B A into ``weight``; the original stays in memory. No effect if merged.

        Raises:
            MergeError: the sum is not finite.
        """
        if self._base_weight is None:
            merged = nn.Parameter(self.merged_weight(), requires_grad=False)
            self._base_weight, self.weight = self.weight, merged

    def unmerge(self) -> None:
        """Restore the Parameter that merge replaced. No effect if the layer is not merged."""
        if self._base_weight is not None:
            self.weight, self._base_weight = self._base_weight, None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        super()._apply(fn, recurse)
        if self._base_weight is not None:
            self._base_weight = nn.Parameter(fn(self._base_weight.detach()), requires_grad=False)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, merged={self.merged}"
        )
