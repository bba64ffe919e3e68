"""Scenarios in which a model is saved, copied, compiled, quantized, or gets adapters from transformers itself."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import tempfile
from typing import Any

import torch
import transformers
from functorch.compile import make_boxed_func
from peft import PeftModel
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import TorchDynamoException

from lora_kernels.check.compat.families import FAMILIES, fill_adapters
from lora_kernels.check.compat.judge import Answers
from lora_kernels.check.compat.stage import Stage, Unavailable, gradients
from lora_kernels.finetune.train.extras import installed


def saved(stage: Stage) -> Answers:
    """Train for a step, save, and load into a fresh base model."""
    model, inputs = stage.build()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    answers = stage.step(model, inputs, "before")
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        fresh = stage.cast(stage.family.model(stage.seed))
        loaded = PeftModel.from_pretrained(fresh, folder, is_trainable=True, autocast_adapter_dtype=not stage.exact)
    return answers | stage.step(stage.accelerate(loaded), inputs, "loaded")


def copied(stage: Stage) -> Answers:
    """Train a deep copy, a pickled copy and one through torch.save, each separately."""
    model, inputs = stage.build()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(file, weights_only=False),
    }
    answers: Answers = {}
    for name, each in copies.items():
        stage.models.append(each)
        answers |= stage.step(each, inputs, name)
    return answers


def injected(stage: Stage) -> Answers:
    """Run adapters that transformers' own add_adapter injected, without a PeftModel."""
    model, inputs = stage.family.build(stage.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage.seed + 1)
        model.add_adapter(stage.config(task_type=None))
    model.train()
    fill_adapters(model, stage.seed)
    return stage.step(stage.accelerate(model), stage.batch(inputs))


def compiled_step(stage: Stage) -> Answers:
    """Run a step of the compiled model without a graph break. Our operators in the graph count as fused calls."""
    model, inputs = stage.build()
    parts = {id(layer): layer for layer in model.modules() if hasattr(layer, "lora_A")}

    def forward(graph: Any, example: Any) -> Any:
        ours = [node for node in graph.graph.nodes if "lora_kernels" in str(node.target)]
        stage.calls.begun += len(ours)
        if not ours:
            stage.calls.reasons[f"none of our operators is in the graph of {len(parts)} layers"] += 1
        return make_boxed_func(graph.forward)

    def backward(graph: Any, example: Any) -> Any:
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=forward, bw_compiler=backward)
    try:
        output = torch.compile(model, fullgraph=True, backend=backend)(**inputs)
    except TorchDynamoException as broken:
        _compiles_with_peft_alone(stage)
        raise broken
    output.loss.backward()
    torch.compiler.reset()
    return gradients(model) | stage.outputs(output)


def _compiles_with_peft_alone(stage: Stage) -> None:
    """Raise Unavailable if torch cannot trace the family without lora_kernels either."""
    torch.compiler.reset()
    model, inputs = Stage(stage.family, stage.seed).build()
    try:
        torch.compile(model, fullgraph=True, backend="eager")(**inputs)
    except TorchDynamoException as broken:
        raise Unavailable(f"PEFT: torch cannot trace it: {str(broken).splitlines()[0]}") from broken
    finally:
        torch.compiler.reset()


@functools.lru_cache(maxsize=1)
def _stored(family: str) -> Any:
    folder = tempfile.TemporaryDirectory()
    FAMILIES[family].model().save_pretrained(folder.name)
    return folder


def four_bit(stage: Stage) -> Answers:
    """Store the base's linear layers except the head in NF4 by bitsandbytes; the truth has the dequantized values."""
    if not installed("bitsandbytes"):
        raise Unavailable("bitsandbytes is not installed")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["classifier", "pre_classifier", "lm_head"],
    )  # fmt: skip
    load = getattr(transformers, stage.family.model_class).from_pretrained
    arguments: dict[str, Any] = {"quantization_config": settings, "dtype": torch.bfloat16, "device_map": "cpu"}
    if implementation := stage.family.settings.get("experts_implementation"):
        arguments["experts_implementation"] = implementation
    base = load(_stored(stage.family.name).name, **arguments)
    if not any("4bit" in type(module).__name__ for module in base.modules()):
        raise Unavailable("transformers stores none of its layers in 4 bits")
    model = stage.wrap(base.train())
    if stage.exact:
        adapters = {name: p for name, p in model.state_dict().items() if "lora_" in name}
        model = stage.wrap(load(_stored(stage.family.name).name, **arguments).dequantize().train())
        model.load_state_dict(adapters, strict=False)
    return stage.step(stage.accelerate(model), stage.batch(stage.family.example_inputs(stage.seed), torch.bfloat16))
