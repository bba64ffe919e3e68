"""``lora-kernels merge``: write a plain model folder with an adapter merged into the weights."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from lora_kernels.adapters import load_adapter, merge_lora
from lora_kernels.adapters.files import open_adapter
from lora_kernels.cli.explain import AUTO_CLASSES
from lora_kernels.config import LoRAConfig
from lora_kernels.errors import AdapterFormatError, ConfigError
from lora_kernels.finetune import values
from lora_kernels.finetune.tasks.pretrained import DTYPES, load_pretrained, load_tokenizer, quiet
from lora_kernels.layers import LoRALinear
from lora_kernels.layers.tokens import TrainedRows, out_of_trained_rows

HEADS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("merge", help="merge an adapter into its base model's weights")
    add = parser.add_argument
    add("--adapter", type=values.input_folder, required=True, help="folder with adapter_model.safetensors")
    add("--model", type=values.model, required=True, help="the base model: packaged model, hub id or folder")
    add("--out", type=values.output_folder, required=True, help="new folder for the merged model and its tokenizer")
    add("--labels", type=values.names, help="names of the classes, separated by commas")
    add("--dtype", default="auto", choices=DTYPES, help="of the weights (default: as stored)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the merged model. --out is renamed from a temporary folder, so it is complete or absent."""
    out: Path = arguments.out
    if out.exists() or out.name == "..":
        raise ConfigError(f"{out} exists; name a folder that does not")
    with open_adapter(arguments.adapter) as files:
        described, raw = files.described, files.config
    task_type = LoRAConfig.from_peft_dict(raw).task_type if isinstance(raw, dict) else None
    names = arguments.labels
    sizes = [tensor.shape[0] for key, tensor in described.items() if key.endswith(HEADS) and tensor.dim() == 2]
    labels: dict[str, Any] = {}
    if sizes and task_type in ("SEQ_CLS", "TOKEN_CLS"):
        if names is not None and len(names) != sizes[0]:
            raise AdapterFormatError(f"--labels gives {len(names)} names; the adapter's head has {sizes[0]} classes")
        names = names or [f"LABEL_{i}" for i in range(sizes[0])]
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    elif names is not None:
        raise ConfigError("--labels was given, and the adapter has no classification head; leave --labels out")
    model = load_pretrained(AUTO_CLASSES[task_type], arguments.model, arguments.dtype, **labels)
    count = plain_linears(merge_lora(load_adapter(model, arguments.adapter)))
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with quiet():
            model.save_pretrained(part)  # type: ignore[operator]
            load_tokenizer(arguments.model).save_pretrained(part)
        part.chmod(0o755)
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    print(f"{count} layers merged; the model is in {out}")
    return 0


def plain_linears(model: nn.Module) -> int:
    """Replace every merged layer by an nn.Linear with the same weight, in place. Return their number."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    for module in model.modules():
        if isinstance(module, TrainedRows):
            out_of_trained_rows(module)
    for path, layer in layers.items():
        bias = layer.total_bias()
        if layer.bias is None and bias is not None:
            raise ConfigError(f"{path} has no bias, so the adapter's lora_bias cannot be merged into it")
        linear = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
        linear.weight = layer.weight  # type: ignore[assignment]
        linear.bias = bias if bias is layer.bias else nn.Parameter(bias.detach(), requires_grad=False)  # type: ignore[assignment,union-attr]
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, linear)
    return len(layers)
