"""Runs PEFT's LoRA layer over nn.Embedding by lora_embedding, forward and backward.

    y = e * W[ids] + sum over active adapters of e * scaling_i * A_i[:, ids]^T B_i^T

e is 1, or the factor of embeddings that scale their rows (Gemma's, BART's). PEFT applies no dropout here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Embedding
from torch import Tensor, nn

from lora_kernels.autograd.lora_embedding import Update, lora_embedding
from lora_kernels.integrations.peft import why_not as conditions
from lora_kernels.integrations.peft.adapter import read_adapter
from lora_kernels.integrations.peft.linear import ExplainMixin, count_peft_call


class EmbeddingOperands(NamedTuple):
    """Operands of one fused call: W (vocab, N); A (r, vocab), B (N, r) and scaling of each active adapter; padding_idx;
    and the factor of the base's rows."""

    W: Tensor
    updates: list[Update]
    padding_idx: int | None
    base_scale: float | Tensor | None


def operands(layer: Embedding, ids: Tensor | None = None) -> EmbeddingOperands | str:
    """Return the operands of the layer in its present state, for ``ids`` if given, or the reason why PEFT's own forward
    runs."""
    reason = conditions.state_reason(layer)
    if reason is not None:
        return reason
    base: Any = layer._modules["base_layer"]
    reason = _base_reason(base) or conditions.module_reason(base, "base_layer")
    if reason is not None:
        return reason
    held: Any = layer._modules["lora_embedding_A"]
    names = conditions.active_in(layer, held._parameters)
    if not names:
        return "no adapter of it is active"
    W = conditions.weight_of(base)
    reason = conditions.weight_reason(W, "base_layer")
    if reason is not None:
        return reason
    assert W is not None
    if W.requires_grad:
        return "its base weight requires a gradient"
    if ids is not None:
        if type(ids) is not Tensor or ids.dtype not in (torch.int64, torch.int32):
            return f"its input is a {type(ids).__name__} of {str(ids.dtype).removeprefix('torch.')}"
        reason = conditions.storage_reason(ids, "its input") or conditions.call_reason()
        if reason is not None:
            return reason
    scale: float | Tensor | None = getattr(base, "embed_scale", None)
    update_scale = layer._get_embed_scale() if scale is not None and hasattr(layer, "_get_embed_scale") else None
    updates: list[Update] = []
    for name in names:
        if name in getattr(layer, "input_fns", ()):
            return "tensor parallelism shards it"
        part = read_adapter(layer, name, W.dtype, nn.Embedding)
        if isinstance(part, str):
            return part
        A, B, _, scaling, _ = part
        if A.dtype is not B.dtype:
            return f"lora_embedding_A is {A.dtype}, lora_embedding_B {B.dtype}"
        updates.append((A, B, scaling if update_scale is None else update_scale * scaling))
    return EmbeddingOperands(W, updates, base.padding_idx, scale.to(W.dtype) if isinstance(scale, Tensor) else scale)


def _base_reason(base: nn.Module) -> str | None:
    """Return why lora_embedding would not compute what the base layer does, or None."""
    kind = type(base)
    scales = kind.__module__.startswith("transformers.models.") and kind.__name__.endswith("ScaledWordEmbedding")
    if kind is not nn.Embedding and not (scales and kind.__bases__ == (nn.Embedding,)):
        if nn.utils.parametrize.is_parametrized(base):
            return "its base layer is parametrized"
        return f"its base layer is a {kind.__module__}.{kind.__name__}"
    embedding: Any = base
    if embedding.max_norm is not None:
        return "max_norm changes the base weight and lora_embedding_A in place"
    if embedding.sparse:
        return "sparse=True asks for sparse gradients"
    return "scale_grad_by_freq is set" if embedding.scale_grad_by_freq else None


class FastEmbedding(ExplainMixin, Embedding):
    """peft.tuners.lora.layer.Embedding with lora_embedding as its forward. accelerate assigns this class; it is never
    built."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return y (*x.shape, N) for ids x. PEFT's forward runs a call that cannot be fused; its reason is counted."""
        found = conditions.kwargs_reason(args, kwargs) if args or kwargs else operands(self, x)
        if isinstance(found, str):
            count_peft_call(self, found)
            return super().forward(x, *args, **kwargs)
        W, ((A, B, scaling), *more), padding_idx, base_scale = found
        return lora_embedding(x, W, A, B, scaling=scaling, more=more, padding_idx=padding_idx, base_scale=base_scale)

    operands = staticmethod(operands)
