"""Checks an adapter file against a model: the keys, shapes and dtypes that it must hold, and keys that it may hold."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapters.keys import PREFIX, is_base_tensor, mismatch
from lora_kernels.adapters.sharded import is_sharded
from lora_kernels.config import BASE_CHANGING_INITS
from lora_kernels.errors import AdapterFormatError
from lora_kernels.layers import BiasedLoRALinear, DoRALinear, LoRALinear
from lora_kernels.layers.tokens import DELTA
from lora_kernels.models.embeddings import embeddings
from lora_kernels.models.explain import Injection


def keys_of(model: nn.Module, injection: Injection) -> dict[str, str]:
    """{PEFT's key: name in the state_dict of the injected model} for all tensors of an adapter file."""
    adapted, state = injection.adapted, list(model.state_dict())
    inside = tuple(f"{path}." for path in injection.saved)
    names = {}
    for path in adapted:
        names[f"{PREFIX}{path}.lora_A.weight"] = f"{path}.lora_A"
        names[f"{PREFIX}{path}.lora_B.weight"] = f"{path}.lora_B"
        if injection.config.lora_bias:
            names[f"{PREFIX}{path}.lora_B.bias"] = f"{path}.lora_bias"
        if injection.config.use_dora:
            names[f"{PREFIX}{path}.lora_magnitude_vector"] = f"{path}.lora_magnitude_vector"
    for one in injection.tokens:
        names[f"{PREFIX}{one.path}.token_adapter.{DELTA}"] = f"{one.path}.{DELTA}"
    names |= {PREFIX + name: name for name in injection.replaced}
    for name in state:
        owner, _, last = name.rpartition(".")
        if name.startswith(inside):
            names[PREFIX + name] = name
        elif last == "bias" and owner in adapted and injection.config.bias != "none":
            names[f"{PREFIX}{owner}.base_layer.bias"] = name
        elif last == "bias" and injection.config.bias == "all":
            names[PREFIX + name] = name
    return names


def with_replaced(
    model: nn.Module, injection: Injection, names: dict[str, str], tensors: dict[str, Tensor]
) -> tuple[Injection, dict[str, str]]:
    """Add the weights of embeddings that the file replaces to the injection and the names: PEFT saves the embeddings
    of a model whose vocabulary was resized, and loads them into the base."""
    taken = {*injection.adapted, *(one.path for one in injection.tokens)}
    candidates = [f"{path}.weight" for path in embeddings(model) if path not in taken]
    state = model.state_dict()
    replaced = tuple(
        name
        for name in candidates
        if (key := PREFIX + name) in tensors and key not in names and not is_base_tensor(key, tensors[key], state)
    )
    return replace(injection, replaced=replaced), names | {PREFIX + name: name for name in replaced}


def check_shared(state: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Raise AdapterFormatError if the file has two different values for one weight that modules share."""
    first = dict[int, str]()
    for name, value in values.items():
        place: Any = state[name]
        address = (place.to_local() if is_sharded(place) else place).data_ptr()
        other = first.setdefault(address, name) if address else name  # address 0: this process stores no part of it
        if other != name and not torch.equal(values[other], value):
            raise AdapterFormatError(
                f"{name} and {other} are one weight of this model, and the file has two different tensors for them"
            )


def check_same(model: nn.Module, present: Injection, file: Injection) -> None:
    """Raise AdapterFormatError unless the file describes the layers that the model has."""
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
    for field in ("use_dora", "lora_bias", "layer_replication"):
        one, other = getattr(ours, field), getattr(theirs, field)
        if one != other:
            raise AdapterFormatError(f"the adapter has {field}={other}; the model {one}")
    if present.tokens != file.tokens:
        raise AdapterFormatError(
            "the adapter trains other rows of the embeddings (trainable_token_indices) than the model; load it into a "
            "fresh model"
        )
    if ours.bias != theirs.bias or set(present.saved) != set(file.saved) or len(changing) > 1:
        raise AdapterFormatError(
            f"the adapter has bias={theirs.bias!r}, modules_to_save={list(file.saved)}, init_lora_weights="
            f"{theirs.init_lora_weights!r}; the model {ours.bias!r}, {list(present.saved)}, {ours.init_lora_weights!r}"
        )


def check_tensors(model: nn.Module, injection: Injection, names: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Raise AdapterFormatError unless the tensors have the keys of ``names``, fitting shapes and dtypes, and finite
    numbers."""
    state, adapted = model.state_dict(), injection.adapted
    missing, extra = names.keys() - tensors.keys(), tensors.keys() - names.keys()
    extra = {key for key in sorted(extra) if not _is_pefts_surplus(key, tensors[key], injection, state)}
    if missing or extra:
        raise AdapterFormatError(mismatch(names.keys(), missing, extra))
    shape: tuple[int, ...]
    for key, name in names.items():
        path, _, last = name.rpartition(".")
        if last == DELTA:
            rows = next(len(one.rows) for one in injection.tokens if one.path == path)
            shape, dtype = (rows, state[f"{path}.weight"].shape[1]), torch.float32
        elif path in adapted and last in (*DoRALinear.adapter_parameters, *BiasedLoRALinear.adapter_parameters):
            (N, K), r = state[f"{path}.weight"].shape, adapted[path].r
            shape, dtype = {"lora_A": (r, K), "lora_B": (N, r)}.get(last, (N,)), torch.float32
        else:
            shape, dtype = tuple(state[name].shape), state[name].dtype
        tensor = tensors[key]
        if tuple(tensor.shape) != shape:
            raise AdapterFormatError(f"{key} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype != dtype and not (tensor.is_floating_point() and dtype.is_floating_point):
            raise AdapterFormatError(f"{key} has dtype {tensor.dtype}, expected {dtype} (for a float, any float dtype)")
        if not is_finite(tensor):
            raise AdapterFormatError(f"{key} holds NaN or infinity, expected finite numbers")


def _is_pefts_surplus(key: str, tensor: Tensor, injection: Injection, state: dict[str, Tensor]) -> bool:
    """Whether PEFT writes this key but does not load it: with bias="all" the biases inside its wrappers of
    modules_to_save, and tensors of the base, which must equal the model's."""
    name = key.removeprefix(PREFIX)
    for path in injection.saved:
        inner = name.removeprefix(f"{path}.")
        if inner != name and injection.config.bias == "all" and inner.endswith(".bias"):
            return inner.startswith(("modules_to_save.", "original_module."))
    return is_base_tensor(key, tensor, state)


def converted(key: str, tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the dtype and on the device of ``like``. Raises AdapterFormatError if a number overflows."""
    value = tensor.to(device=like.device, dtype=like.dtype)
    if not is_finite(value):
        raise AdapterFormatError(f"{key} holds numbers too large for {like.dtype}, its dtype in the model")
    return value


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor if tensor.dtype.itemsize > 1 else tensor.float()).all())
