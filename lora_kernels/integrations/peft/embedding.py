"""PEFT's LoRA layer over nn.Embedding, with the forward and backward of lora_embedding.

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
from lora_kernels.integrations.peft.linear import Told, count_peft_call


class EmbeddingOperands(NamedTuple):
    """What one fused call reads: W (vocab, N), each active adapter's A (r, vocab), B (N, r) and scaling, padding_idx,
    and the factor of the base's rows."""

    W: Tensor
    updates: list[Update]
    padding_idx: int | None
    base_scale: float | Tensor | None


def operands(layer: Embedding, ids: Tensor | None = None) -> EmbeddingOperands | str:
    """What the fused path reads of the layer in its present state, for ``ids`` if given, or the reason why PEFT's own
    forward runs."""
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
        update = _adapter(layer, name)
        if isinstance(update, str):
            return update
        A, B, scaling = update
        updates.append((A, B, scaling if update_scale is None else update_scale * scaling))
    return EmbeddingOperands(W, updates, base.padding_idx, scale.to(W.dtype) if isinstance(scale, Tensor) else scale)


def _base_reason(base: nn.Module) -> str | None:
    """Why lora_embedding would not compute what the base layer does."""
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


def _adapter(layer: Embedding, name: str) -> tuple[Tensor, Tensor, float] | str:
    """A (r, vocab), B (N, r) and scaling of one adapter, or why PEFT's own forward has to run it."""
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} has no fused path"
    if name in getattr(layer, "input_fns", ()):
        return "tensor parallelism shards it"
    modules: Any = layer._modules
    A, B = modules["lora_embedding_A"][name], modules["lora_embedding_B"][name]
    reason = conditions.weight_reason(A, "lora_embedding_A") or conditions.weight_reason(B, "lora_embedding_B")
    if reason is not None:
        return reason
    if conditions.unsavable(A):
        return conditions.UNSAVABLE
    if A.dtype is not B.dtype:
        return f"lora_embedding_A is {A.dtype}, lora_embedding_B {B.dtype}"
    scaling = conditions.scaling_of(layer, name)
    return scaling if isinstance(scaling, str) else (A, B, scaling)


class FusedEmbedding(Told, Embedding):
    """peft.tuners.lora.layer.Embedding whose forward is lora_embedding wherever that computes the same.

    Never built: accelerate changes the class of PEFT's layers, which keep every attribute, parameter and method.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y (*x.shape, N) for ids x; a call that cannot be fused is PEFT's own, and counted with its reason."""
        found = conditions.kwargs_reason(args, kwargs) if args or kwargs else operands(self, x)
        if isinstance(found, str):
            count_peft_call(self, found)
            return super().forward(x, *args, **kwargs)
        W, ((A, B, scaling), *more), padding_idx, base_scale = found
        return lora_embedding(x, W, A, B, scaling=scaling, more=more, padding_idx=padding_idx, base_scale=base_scale)

    operands = staticmethod(operands)
