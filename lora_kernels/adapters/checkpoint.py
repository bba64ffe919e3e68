"""Saves and loads adapters in PEFT's format. A file is checked completely before the model is changed."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_kernels.adapters.files import write_adapter
from lora_kernels.adapters.keys import KeyMapping
from lora_kernels.adapters.matching import (
    check_same,
    check_shared,
    check_tensors,
    converted,
    is_finite,
    keys_of,
    with_replaced,
)
from lora_kernels.adapters.sharded import is_sharded, placed_like, whole, write_once
from lora_kernels.adapters.sources import open_source
from lora_kernels.config import LoRAConfig, refuse_unsupported
from lora_kernels.errors import AdapterFormatError, ConfigError, MergeError
from lora_kernels.layers import LoRALinear
from lora_kernels.layers.replication import replicate_layers
from lora_kernels.layers.tokens import TrainedRows
from lora_kernels.models.explain import REMEMBERED_AS, Injection, injection_of, unwrap
from lora_kernels.models.inject import build_layers, inject, plan_injection, rollback


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the model's adapter to `folder`: adapter_model.safetensors and adapter_config.json, as PEFT reads them.

    Holds lora_A and lora_B of every adapted layer, the biases that config.bias names, and modules_to_save whole. A
    crash at any moment leaves the old adapter or the new one. The model, merged or not, is left as it is.
    A model sharded over processes (FSDP2): all of them call this, the first writes the whole tensors, and none returns
    before. Under DistributedDataParallel the first process writes and the others may, but need not, call it.
    Raises ConfigError for a model that apply_lora was not called on or whose layers no longer fit its configuration,
    AdapterFormatError for a tensor that holds NaN or infinity (the folder keeps what it has), OSError.
    """
    outer, model = model, unwrap(model)
    injection = _require_injection(model)
    for path, layer in injection.adapted.items():
        live, scaling = model.get_submodule(path), injection.config.scaling(layer.r, layer.lora_alpha)
        if (
            not isinstance(live, LoRALinear)
            or live.use_dora != injection.config.use_dora
            or live.r != layer.r
            or not math.isclose(live.scaling, scaling, rel_tol=1e-6)
        ):
            raise ConfigError(
                f"{path} is no longer the layer with r={layer.r}, scaling={scaling:g} that apply_lora made"
            )
    state = model.state_dict()
    names = keys_of(model, injection)
    tensors = {key: whole(state[name]) for key, name in names.items()}
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise AdapterFormatError(f"{key} holds NaN or infinity; nothing was written to {folder}")
    config = replace(
        injection.config, inference_mode=True
    )  # as PEFT writes it: load_adapter(trainable=...) decides whether to train
    pieces = [state[name] for name in names.values()]
    write_once(outer, pieces, lambda: write_adapter(folder, tensors, config.to_peft_dict()))


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    trainable: bool = False,
    follow_symlinks: bool = False,
    key_mapping: KeyMapping | None = None,
) -> nn.Module:
    """Load the adapter in `folder`, written by save_adapter or by PEFT, into `model`, in place; returns the model.

    `folder` may also be a .safetensors file in diffusers' or Kohya's layout, or a folder with such a file; then the
    configuration is derived from the tensors. `key_mapping`: {found prefix: wanted prefix} for keys that another
    program or version wrote; the longest prefix that fits is used, "" fits every key, and None as the wanted prefix
    leaves the keys out.

    A model without LoRA layers gets them by the file's configuration, frozen unless `trainable` (PEFT's is_trainable);
    one that has them must have those the file describes, and keeps what it trains. Tensors of any float dtype are
    converted to the dtype of the layer. `follow_symlinks` accepts files that are links, as in the Hugging Face cache.
    Into a model sharded over processes (FSDP2) every process loads its own pieces; the layers must be there already.

    Raises AdapterFormatError, naming the key and what was expected, for malformed files and for an adapter of another
    model; ConfigError for a PEFT feature that this package does not have; MergeError while the model is merged. If an
    error is raised, the model is bit for bit unchanged.
    """
    inner = unwrap(model)
    if any(isinstance(module, LoRALinear | TrainedRows) and module.merged for module in inner.modules()):
        raise MergeError("the model is merged; call unmerge_lora before load_adapter")
    present = injection_of(inner)
    if present is None and any(map(is_sharded, inner.parameters())):
        raise ConfigError(
            f"{type(inner).__name__} is sharded over processes and has no LoRA layers; call load_adapter or apply_lora "
            "before fully_shard"
        )
    with torch.no_grad(), rollback(inner):
        with open_source(inner, folder, key_mapping, follow_symlinks) as source:
            config = replace(_parse_config(source.config), inference_mode=not trainable)
            if trainable and str(source.config.get("init_lora_weights")).lower() == "mica":
                raise ConfigError(
                    "the adapter has init_lora_weights='mica', which trains lora_A only; lora_kernels cannot "
                    "train it. Load it with trainable=False"
                )
            try:
                if config.layer_replication:
                    replicate_layers(inner, config.layer_replication)
                injection = plan_injection(inner, config)
            except ConfigError as error:
                raise AdapterFormatError(
                    f"the adapter in {folder} does not fit {type(inner).__name__}: {error}"
                ) from None
            injection, names = with_replaced(inner, injection, keys_of(inner, injection), source.described)
            if present is not None:
                check_same(inner, present, injection)
            check_tensors(inner, injection, names, source.described)  # before the tensors are read
            tensors = source.read()
        injection, names = with_replaced(inner, injection, keys_of(inner, injection), tensors)
        check_tensors(inner, injection, names, tensors)
        with torch.inference_mode(False):  # tensors made in inference mode cannot be trained
            if present is None:
                inject(inner, injection, _new_layers(inner, injection))
            state = dict(inner.state_dict())
            values = {name: converted(key, tensors[key], state[name]) for key, name in names.items()}
        check_shared(state, values)
        if present is not None:
            setattr(inner, REMEMBERED_AS, replace(present, replaced=injection.replaced))
        for name, value in values.items():
            state[name].copy_(placed_like(value, state[name]))
    return model


def _new_layers(model: nn.Module, injection: Injection) -> dict[str, LoRALinear]:
    try:
        return build_layers(model, injection)
    except ConfigError as error:
        raise AdapterFormatError(f"the adapter does not fit {type(model).__name__}: {error}") from None


def _require_injection(model: nn.Module) -> Injection:
    injection = injection_of(model)
    if injection is None:
        raise ConfigError(f"{type(model).__name__} has no adapter; call apply_lora or load_adapter on this very module")
    return injection


def _parse_config(raw: Any) -> LoRAConfig:
    try:
        return LoRAConfig.from_peft_dict(raw)
    except ConfigError as error:
        if isinstance(raw, dict) and raw.get("peft_type") == "LORA":
            refuse_unsupported(raw)  # a valid adapter of an unsupported kind stays a ConfigError
        raise AdapterFormatError(f"the adapter's configuration: {error}") from None
