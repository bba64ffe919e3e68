"""Adapters in PEFT's format: from a model to a folder and back, checked whole before anything in the model changes."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapters.files import open_adapter, write_adapter
from lora_kernels.adapters.sharded import is_sharded, placed_like, whole, write_once
from lora_kernels.adapters.stored import Limits
from lora_kernels.config import BASE_CHANGING_INITS, LoRAConfig, refuse_unsupported
from lora_kernels.errors import AdapterFormatError, ConfigError, MergeError
from lora_kernels.inject import build_layers, inject, plan_injection, rollback
from lora_kernels.layers import DoRALinear, LoRALinear
from lora_kernels.report import Injection, injection_of, unwrap

PREFIX = "base_model.model."


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
    names = _names(model, injection)
    tensors = {key: whole(state[name]) for key, name in names.items()}
    for key, tensor in tensors.items():
        if not _is_finite(tensor):
            raise AdapterFormatError(f"{key} holds NaN or infinity; nothing was written to {folder}")
    config = replace(
        injection.config, inference_mode=True
    )  # as PEFT writes it: who loads the file says whether to train
    pieces = [state[name] for name in names.values()]
    write_once(outer, pieces, lambda: write_adapter(folder, tensors, config.to_peft_dict()))


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, trainable: bool = False, follow_symlinks: bool = False
) -> nn.Module:
    """Load the adapter in `folder`, written by save_adapter or by PEFT, into `model`, in place; returns the model.

    A model without LoRA layers gets them by the file's configuration, frozen unless `trainable` (PEFT's is_trainable);
    one that has them must have those the file describes, and keeps what it trains. Tensors of any float dtype are
    converted to the layer's. `follow_symlinks` accepts files that are links, as in the Hugging Face cache.
    Into a model sharded over processes (FSDP2) every process loads its own pieces; the layers must be there already.

    Raises AdapterFormatError, naming the key and what was expected, for anything malformed and for an adapter of
    another model; ConfigError for a feature of PEFT's that this package does not have; MergeError while the model is
    merged. The model is then bit for bit as it was.
    """
    inner = unwrap(model)
    if any(isinstance(module, LoRALinear) and module.merged for module in inner.modules()):
        raise MergeError("the model is merged; call unmerge_lora before load_adapter")
    present = injection_of(inner)
    if present is None and any(map(is_sharded, inner.parameters())):
        raise ConfigError(
            f"{type(inner).__name__} is sharded over processes and has no LoRA layers; call load_adapter or apply_lora "
            "before fully_shard"
        )
    with open_adapter(folder, follow_symlinks, Limits(inner)) as files:
        config = replace(_parse_config(files.config), inference_mode=not trainable)
        try:
            injection = plan_injection(inner, config)
        except ConfigError as error:
            raise AdapterFormatError(f"the adapter in {folder} does not fit {type(inner).__name__}: {error}") from None
        if present is not None:
            _check_same(inner, present, injection)
        names = _names(inner, injection)
        _check_tensors(inner, injection, names, files.described)  # nothing is read that has no place in the model
        tensors = files.read()
    _check_tensors(inner, injection, names, tensors)
    with torch.no_grad(), rollback(inner):
        with torch.inference_mode(False):  # tensors made in inference mode cannot be trained
            layers = _new_layers(inner, injection) if present is None else {}
            state = dict(inner.state_dict())
            for path, layer in layers.items():
                state |= {f"{path}.{name}": getattr(layer, name) for name in layer.adapter_parameters}
            values = {name: _converted(key, tensors[key], state[name]) for key, name in names.items()}
            if present is None:
                inject(inner, injection, layers)
        state = dict(inner.state_dict())
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
            refuse_unsupported(raw)  # a sound adapter of a kind that is not ours stays a ConfigError
        raise AdapterFormatError(f"the adapter's configuration: {error}") from None


def _names(model: nn.Module, injection: Injection) -> dict[str, str]:
    """{PEFT's key: name in the state_dict of the injected model} of everything an adapter file holds."""
    adapted, state = injection.adapted, list(model.state_dict())
    inside = tuple(f"{path}." for path in injection.saved)
    names = {}
    for path in adapted:
        names[f"{PREFIX}{path}.lora_A.weight"] = f"{path}.lora_A"
        names[f"{PREFIX}{path}.lora_B.weight"] = f"{path}.lora_B"
        if injection.config.use_dora:
            names[f"{PREFIX}{path}.lora_magnitude_vector"] = f"{path}.lora_magnitude_vector"
    for name in state:
        owner, _, last = name.rpartition(".")
        if name.startswith(inside):
            names[PREFIX + name] = name
        elif last == "bias" and owner in adapted and injection.config.bias != "none":
            names[f"{PREFIX}{owner}.base_layer.bias"] = name
        elif last == "bias" and injection.config.bias == "all":
            names[PREFIX + name] = name
    return names


def _check_same(model: nn.Module, present: Injection, file: Injection) -> None:
    """Raise unless the file describes the layers that the model has."""
    if set(present.adapted) != set(file.adapted):
        path = min(set(present.adapted) ^ set(file.adapted))
        has, lacks = ("model", "adapter") if path in present.adapted else ("adapter", "model")
        raise AdapterFormatError(f"the {has} adapts {path} and the {lacks} does not; load it into a fresh model")
    for path, layer in file.adapted.items():
        live, scaling = model.get_submodule(path), file.config.scaling(layer.r, layer.lora_alpha)
        assert isinstance(live, LoRALinear)
        if live.r != layer.r or not math.isclose(live.scaling, scaling, rel_tol=1e-6):
            raise AdapterFormatError(
                f"{path}: the adapter has r={layer.r}, scaling={scaling:g}; the model r={live.r}, {live.scaling:g}"
            )
    ours, theirs = present.config, file.config
    changing = {c.init_lora_weights if c.init_lora_weights in BASE_CHANGING_INITS else None for c in (ours, theirs)}
    if ours.use_dora != theirs.use_dora:
        raise AdapterFormatError(f"the adapter has use_dora={theirs.use_dora}; the model {ours.use_dora}")
    if ours.bias != theirs.bias or set(present.saved) != set(file.saved) or len(changing) > 1:
        raise AdapterFormatError(
            f"the adapter has bias={theirs.bias!r}, modules_to_save={list(file.saved)}, init_lora_weights="
            f"{theirs.init_lora_weights!r}; the model {ours.bias!r}, {list(present.saved)}, {ours.init_lora_weights!r}"
        )


def _check_tensors(model: nn.Module, injection: Injection, names: dict[str, str], tensors: dict[str, Tensor]) -> None:
    state, adapted = model.state_dict(), injection.adapted
    missing, extra = names.keys() - tensors.keys(), tensors.keys() - names.keys()
    extra = {key for key in sorted(extra) if not _is_pefts_surplus(key, tensors[key], injection, state)}
    if missing or extra:
        key, what = (min(missing), "missing") if missing else (min(extra), "in the file but not expected")
        raise AdapterFormatError(
            f"{key[:300]!r} is {what} ({len(names)} keys expected, {len(missing)} missing, {len(extra)} too many)"
        )
    for key, name in names.items():
        path, _, last = name.rpartition(".")
        if path in adapted and last in DoRALinear.adapter_parameters:
            (N, K), r = state[f"{path}.weight"].shape, adapted[path].r
            shape, dtype = {"lora_A": (r, K), "lora_B": (N, r)}.get(last, (N,)), torch.float32
        else:
            shape, dtype = tuple(state[name].shape), state[name].dtype
        tensor = tensors[key]
        if tuple(tensor.shape) != shape:
            raise AdapterFormatError(f"{key} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype != dtype and not (tensor.is_floating_point() and dtype.is_floating_point):
            raise AdapterFormatError(f"{key} has dtype {tensor.dtype}, expected {dtype} or, for floats, another float")
        if not _is_finite(tensor):
            raise AdapterFormatError(f"{key} holds NaN or infinity, expected finite numbers")


def _is_pefts_surplus(key: str, tensor: Tensor, injection: Injection, state: dict[str, Tensor]) -> bool:
    """Whether PEFT writes this key beside those it reads back: with bias="all" the biases inside its wrappers of
    modules_to_save, and for an adapted output head the base weight, which must be the model's own."""
    name = key.removeprefix(PREFIX)
    for path in injection.saved:
        inner = name.removeprefix(f"{path}.")
        if inner != name and injection.config.bias == "all" and inner.endswith(".bias"):
            return inner.startswith(("modules_to_save.", "original_module."))
    path = name.removesuffix(".base_layer.weight")
    if path == name or path not in injection.adapted:
        return False
    weight = state[f"{path}.weight"]
    same_kind = tensor.dtype == weight.dtype and tensor.shape == weight.shape
    return same_kind and (tensor.is_meta or torch.equal(tensor, whole(weight).cpu()))


def _converted(key: str, tensor: Tensor, like: Tensor) -> Tensor:
    value = tensor.to(device=like.device, dtype=like.dtype)
    if not _is_finite(value):
        raise AdapterFormatError(f"{key} holds numbers too large for {like.dtype}, the dtype of its place in the model")
    return value


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor if tensor.dtype.itemsize > 1 else tensor.float()).all())
