"""Tensor parallel: transformers' tp_plan under PEFT and accelerate; our own layers raise an error."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from tiny import base, build, config
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import lora_kernels as lk
from lora_kernels.errors import ConfigError
from lora_kernels.testing import assert_close


def saved(folder: Path) -> Path:
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, initializer_range=0.15, **sizes))
        model.save_pretrained(folder / "llama")
    dist.barrier()
    return folder / "llama"


def with_adapter(model: Any) -> Any:
    """PEFT's layers with adapters as large as their bases, the same values however they are placed."""
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                value = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.2
                if isinstance(parameter, DTensor):
                    value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
                parameter.copy_(value)
    return model


def results(model: Any) -> dict[str, Tensor]:
    """Loss's gradients and logits, in training and without gradients."""
    ids = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(1))
    outputs = model(input_ids=ids, labels=ids)
    outputs.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    kinds = {}
    for kind in ("lora_A", "lora_B"):
        whole = [g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items() if kind in n]
        kinds[kind] = torch.cat([g.flatten() for g in whole])
    with torch.no_grad():
        inference = model(input_ids=ids).logits
    whole_logits = [t.full_tensor() if isinstance(t, DTensor) else t for t in (outputs.logits, inference)]
    return {**kinds, "logits": whole_logits[0].detach(), "inference": whole_logits[1]}


def transformers_plan(folder: Path) -> None:
    source = saved(folder)
    plain = results(with_adapter(LlamaForCausalLM.from_pretrained(source)))
    truth = results(with_adapter(LlamaForCausalLM.from_pretrained(source)).double())
    plan = DistributedConfig(tp_plan="auto")
    model = with_adapter(LlamaForCausalLM.from_pretrained(source, distributed_config=plan))
    assert any(isinstance(p, DTensor) for n, p in model.named_parameters() if "lora_" in n)
    printed = io.StringIO()
    with redirect_stdout(printed):
        lk.accelerate(model)
    assert "0 of 14 PEFT LoRA layers fused" in printed.getvalue()
    assert "14: the forward of base_layer is patched" in printed.getvalue()  # by the plan
    got = results(model)
    for name, value in got.items():
        assert_close(value, plain[name], truth[name], what=name)


def our_layers_refuse(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    plan = {"blocks.0.qkv.q_proj": ColwiseParallel(), "blocks.0.o_proj": RowwiseParallel()}
    sharded = parallelize_module(base(), mesh, plan)
    with pytest.raises(ConfigError, match=r"has no plain .*quantised, parametrised or sharded"):
        lk.apply_lora(sharded, config(target_modules=["q_proj", "o_proj"]))
    with pytest.raises(NotImplementedError, match=r"only support nn\.Linear"):
        parallelize_module(build(), mesh, plan)
    llama = LlamaForCausalLM.from_pretrained(saved(folder), distributed_config=DistributedConfig(tp_plan="auto"))
    with pytest.raises(ConfigError, match="sharded"):
        lk.apply_lora(llama, lk.LoRAConfig(target_modules=["q_proj"]))
