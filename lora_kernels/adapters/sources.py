"""Opens an adapter from PEFT's folder, one file, or a mapping, and converts every known layout to PEFT's keys."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_kernels.adapters.files import CONFIG_METADATA, CONFIG_NAME, WEIGHTS_NAME, open_adapter
from lora_kernels.adapters.keys import PREFIX, KeyMapping, renamed, shown, to_peft
from lora_kernels.adapters.layouts import from_layout, implies_scaling, is_foreign
from lora_kernels.adapters.stored import Limits, open_stored, parse_json
from lora_kernels.config import ALL_LINEAR, LoRAConfig
from lora_kernels.errors import AdapterFormatError, ConfigError
from lora_kernels.models.targets import Matcher

DIFFUSERS_NAME, DIFFUSERS_METADATA = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"


class Opened(NamedTuple):
    """An open adapter with PEFT's keys.

    config: not yet checked. described: the tensors as the header of the file describes them, on the meta device; or the
    read tensors, if the configuration is derived from them. read() returns the tensors.
    """

    config: Any
    described: dict[str, Tensor]
    read: Callable[[], dict[str, Tensor]]


@contextmanager
def open_source(
    model: nn.Module,
    source: str | os.PathLike[str],
    key_mapping: KeyMapping | None = None,
    follow_symlinks: bool = False,
) -> Iterator[Opened]:
    """Open the adapter in ``source`` while the block runs.

    source: a folder that PEFT or save_adapter wrote, a .safetensors file, or a folder with one .safetensors file of
    another name. If there is no adapter_config.json and the file is in diffusers' or Kohya's layout, the configuration
    is derived from the tensors. Raises AdapterFormatError.
    """
    path, limits = Path(source), Limits(model)
    if path.name == WEIGHTS_NAME and not path.is_dir():
        path = path.parent
    file = path if path.suffix == ".safetensors" and not path.is_dir() else _weights_alone(path)
    if file is None:
        with open_adapter(path, follow_symlinks, limits) as files:
            config = files.config
            described, config = as_peft(model, files.described, config, {}, key_mapping)
            yield Opened(config, described, lambda: as_peft(model, files.read(), config, {}, key_mapping)[0])
        return
    with open_stored(file, follow_symlinks, limits) as stored:
        metadata, tensors = stored.metadata, stored.read()
    config, settings = metadata.get(CONFIG_METADATA), metadata.get(DIFFUSERS_METADATA)
    if config is not None:
        config = parse_json(config, f"the configuration in {file}")
    found = {} if settings is None else parse_json(settings, f"{DIFFUSERS_METADATA} in {file}")
    if not isinstance(found, dict):
        raise AdapterFormatError(f"{DIFFUSERS_METADATA} in {file} is not a JSON object")
    tensors, config = as_peft(model, tensors, config, found, key_mapping)
    yield Opened(config, tensors, lambda: tensors)


def as_peft(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    config: Any,
    metadata: Mapping[str, Any],
    key_mapping: KeyMapping | None,
) -> tuple[dict[str, Tensor], Any]:
    """The tensors with PEFT's keys, and their configuration: ``config``, or if that is None (a file of diffusers or
    Kohya) the one that is derived from the tensors and ``metadata``."""
    tensors = renamed(tensors, key_mapping)
    foreign = is_foreign(tensors)
    if config is not None:
        if foreign:
            raise AdapterFormatError(
                "the keys are in diffusers' or Kohya's layout, whose configuration is derived from the tensors, and a "
                "configuration was given too; leave config (adapter_config.json) out"
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
    """The configuration; if its target_modules match no module of this model, with the modules that the renamed keys
    name as target_modules."""
    named = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors if ".lora_" in key}
    modules = {path for path, _ in model.named_modules()}
    if not isinstance(config, dict) or not named or not named <= modules:
        return config
    try:
        settings = LoRAConfig.from_peft_dict(config)
    except ConfigError:
        return config  # the caller refuses it with a message
    matcher = Matcher(settings)
    if settings.target_modules in (None, ALL_LINEAR) or any(matcher.why_not(path) is None for path in modules if path):
        return config
    unused = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    return config | unused | {"target_modules": sorted(named)}


def _weights_alone(folder: Path) -> Path | None:
    """The file of tensors in a folder without an adapter_config.json: by its name, or the only .safetensors file. None
    for PEFT's folder, and if reading the folder as PEFT's gives the right error."""
    if os.path.lexists(folder / CONFIG_NAME) or not folder.is_dir():
        return None
    if os.path.lexists(folder / WEIGHTS_NAME):
        return folder / WEIGHTS_NAME if _has_no_copy(folder / WEIGHTS_NAME) else None
    if os.path.lexists(folder / DIFFUSERS_NAME):
        return folder / DIFFUSERS_NAME
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise AdapterFormatError(
            f"{folder} has no {CONFIG_NAME} and {len(found)} .safetensors files ({names}); give the path of one"
        )
    return found[0] if found else None


def _has_no_copy(file: Path) -> bool:
    """Whether the metadata of these weights holds no copy of a configuration."""
    try:
        with open_stored(file, follow_symlinks=True) as stored:
            return CONFIG_METADATA not in stored.metadata
    except AdapterFormatError:
        return False
