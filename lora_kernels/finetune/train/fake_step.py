"""Count FLOPs and saved bytes of a training step with fake tensors, which have shapes and no data.

FLOPs are counted by torch.utils.flop_counter. Saved bytes are those of the tensors that autograd saves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lora_kernels.finetune.train.batch import call_model
from lora_kernels.layers.dora import DoRALinear


class _NoDropoutInAttention(TorchFunctionMode):
    """Disables dropout in attention: a fused GPU kernel saves nothing for it, the CPU fallback every score."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is nn.functional.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs |= {"dropout_p": 0.0} if len(args) <= 4 else {}
        return func(*args, **kwargs)


class _Norms:
    """Computes DoRA's row norms in every step, as on a GPU. The cache for the CPU reads the data."""

    @torch.no_grad()
    def norm(self, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, trust: bool = False) -> Any:
        return torch.linalg.vector_norm(torch.addmm(W.float(), B.float(), A.float(), alpha=scaling), dim=1)


def _update_flops(total: Any, left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


MORE_FLOPS = {  # operators that torch's counter ignores
    torch.ops.aten.addmm_: _update_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def fake_step(model: nn.Module, batch: int, tokens: int) -> tuple[int, int]:
    """Count (FLOPs, bytes saved for backward) of a training step on ``batch`` rows of ``tokens`` tokens, no padding.

    The model may be on any device, including meta. It is not changed and nothing is computed. The loss is
    cross-entropy. Causal attention is counted without the mask's savings, as torch's own counter does.
    """
    config: Any = getattr(model, "config", None)
    with FakeTensorMode(allow_non_fake_inputs=True), _NoDropoutInAttention():
        state = {name: torch.empty_like(p, device="cpu").requires_grad_(p.requires_grad)
                 for name, p in model.named_parameters()}  # fmt: skip
        state |= {name: torch.empty_like(buffer, device="cpu") for name, buffer in model.named_buffers()}
        inputs = {"input_ids": torch.zeros(batch, tokens, dtype=torch.long)}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = torch.zeros(batch, tokens, dtype=torch.long)
        weights = {tensor.untyped_storage()._cdata for tensor in state.values()}
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage  # kept alive, so that its address is not reused
            return tensor

        training, caches = model.training, [(m, m._norms) for m in model.modules() if isinstance(m, DoRALinear)]
        for module, _ in caches:
            vars(module)["_norms"] = _Norms()
        model.train()
        try:
            with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter:
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    logits = torch.func.functional_call(_Called(model), _prefixed(state), (inputs,))
                    rows = logits.flatten(0, -2)
                    targets = torch.zeros(rows.shape[0], dtype=torch.long)
                    loss = nn.functional.cross_entropy(rows, targets)
                loss.backward()
        finally:
            model.train(training)
            for module, cache in caches:
                module._norms = cache
        return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())


class _Called(nn.Module):
    """Calls a model as the Trainer does: inputs in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> torch.Tensor:
        return call_model(self.model, inputs)


def _prefixed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"model.{name}": tensor for name, tensor in state.items()}
