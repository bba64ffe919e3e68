"""Where an adapter is read from: PEFT's folder, one file, or a mapping; whatever its layout, PEFT's keys come out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_kernels.adapters.files import (
    CONFIG_METADATA,
    CONFIG_NAME,
    WEIGHTS_NAME,
    parse_json,
    read_adapter,
    read_weights,
)
from lora_kernels.adapters.keys import PREFIX, KeyMapping, renamed, shown, to_peft
from lora_kernels.adapters.layouts import from_layout, implies_scaling, is_foreign
from lora_kernels.config import ALL_LINEAR, LoRAConfig
from lora_kernels.errors import AdapterFormatError, ConfigError
from lora_kernels.targets import Matcher

DIFFUSERS_NAME, DIFFUSERS_METADATA = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"


def read_source(
    model: nn.Module,
    source: str | os.PathLike[str],
    key_mapping: KeyMapping | None = None,
    follow_symlinks: bool = False,
) -> tuple[dict[str, Tensor], Any]:
    """The tensors of the adapter in ``source`` by PEFT's keys for ``model``, and its configuration, not yet checked.

    source: a folder of PEFT's or of save_adapter, a .safetensors file, or a folder with such a file of another name.
    Without an adapter_config.json the configuration is derived from a file in diffusers' or Kohya's layout. Raises
    AdapterFormatError.
    """
    path = Path(source)
    if path.name == WEIGHTS_NAME and not path.is_dir():
        path = path.parent
    if path.suffix != ".safetensors" and ((path / CONFIG_NAME).exists() or not path.is_dir()):
        tensors, config = read_adapter(path, follow_symlinks)
        return as_peft(model, tensors, config, {}, key_mapping)
    file = path if path.suffix == ".safetensors" and not path.is_dir() else _only_weights(path)
    tensors, metadata = read_weights(file, follow_symlinks)
    if CONFIG_METADATA in metadata:
        if file.name == WEIGHTS_NAME:  # one of ours, whose adapter_config.json is missing
            return as_peft(model, *read_adapter(path, follow_symlinks), {}, key_mapping)
        return as_peft(
            model, tensors, parse_json(metadata[CONFIG_METADATA], f"the configuration in {file}"), {}, key_mapping
        )
    settings = metadata.get(DIFFUSERS_METADATA)
    found = {} if settings is None else parse_json(settings, f"{DIFFUSERS_METADATA} in {file}")
    if not isinstance(found, dict):
        raise AdapterFormatError(f"{DIFFUSERS_METADATA} in {file} is no JSON object")
    return as_peft(model, tensors, None, found, key_mapping)


def as_peft(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    config: Any,
    metadata: Mapping[str, Any],
    key_mapping: KeyMapping | None,
) -> tuple[dict[str, Tensor], Any]:
    """The tensors by PEFT's keys, and their configuration: the one given, or for a file of diffusers or Kohya without
    one (None) what its tensors and ``metadata`` say."""
    tensors = renamed(tensors, key_mapping)
    foreign = is_foreign(tensors)
    if config is not None:
        if foreign:
            raise AdapterFormatError(
                "keys of diffusers' or Kohya's layout come without a configuration, which is derived from the tensors; "
                "leave config (adapter_config.json) out"
            )
        tensors = to_peft(tensors)
        return tensors, config if key_mapping is None else _retargeted(model, tensors, config)
    if not tensors or not (metadata or implies_scaling(tensors)):
        raise AdapterFormatError(
            f"{CONFIG_NAME} is missing, and without it lora_alpha is not known (the first key is "
            f"{shown(min(tensors, default=''))}); put it beside the weights, as PEFT's save_pretrained does"
        )
    try:
        return from_layout(model, tensors, metadata)
    except ConfigError as error:
        raise AdapterFormatError(f"the file's {DIFFUSERS_METADATA}: {error}") from None


def _retargeted(model: nn.Module, tensors: Mapping[str, Tensor], config: Any) -> Any:
    """The configuration with the modules that the renamed keys name as its targets, where its own names, of the model
    that the keys were written for, find none in this one."""
    named = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors if ".lora_" in key}
    modules = {path for path, _ in model.named_modules()}
    if not isinstance(config, dict) or not named or not named <= modules:
        return config
    try:
        settings = LoRAConfig.from_peft_dict(config)
    except ConfigError:
        return config  # refused by its name later
    matcher = Matcher(settings)
    if settings.target_modules in (None, ALL_LINEAR) or any(matcher.why_not(path) is None for path in modules if path):
        return config
    unused = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    return config | unused | {"target_modules": sorted(named)}


def _only_weights(folder: Path) -> Path:
    """The file with the tensors, by its name or as the only one in the folder."""
    for name in (WEIGHTS_NAME, DIFFUSERS_NAME):
        if os.path.lexists(folder / name):
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    raise AdapterFormatError(
        f"{folder} has no {CONFIG_NAME} and {len(found)} .safetensors files"
        + (f" ({', '.join(path.name for path in found[:4])}); name one of them" if found else "; an adapter has one")
    )
