"""Reads a PEFT adapter for a pool, matches it with the pooled layers, and checks it before the pool changes."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.adapters.checkpoint import _parse_config
from lora_kernels.adapters.keys import PREFIX, KeyMapping, is_base_tensor, mismatch, shown
from lora_kernels.adapters.layouts import is_foreign
from lora_kernels.adapters.matching import is_finite
from lora_kernels.adapters.sharded import is_sharded
from lora_kernels.adapters.sources import as_peft, open_source
from lora_kernels.config import BASE_CHANGING_INITS, LoRAConfig
from lora_kernels.errors import AdapterFormatError, ConfigError, UnservableAdapterError
from lora_kernels.layers.replication import REPLICATED_AS
from lora_kernels.models.embeddings import embeddings
from lora_kernels.models.targets import Matcher, resolve
from lora_kernels.pool.layer import _Pooled

Source = str | os.PathLike[str] | Mapping[str, Tensor]
REMEDY = ". Load it with load_adapter into a separate model"
MAX_NAMES = 4  # in a message


class Update(NamedTuple):
    """The operands of the update s B A that an adapter adds to one layer: A (r, K), B (N, r), s = scaling. With
    lora_bias the layer also adds s bias, bias (N,)."""

    A: Tensor
    B: Tensor
    scaling: float
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[0]


def read_updates(
    model: nn.Module,
    layers: Mapping[str, _Pooled],
    left_out: Mapping[str, str],
    adapter: Source,
    config: Any = None,
    follow_symlinks: bool = False,
    key_mapping: KeyMapping | None = None,
) -> dict[str, Update]:
    """Return {path: update} for every pooled layer that the adapter targets, with the tensors of the file unchanged.

    adapter: a folder, or PEFT's tensors by PEFT's keys, with the ``config`` that belongs to them (a LoRAConfig, PEFT's
    LoraConfig, or a dictionary). left_out: {path: reason} of linear layers that are not pooled.

    Raises AdapterFormatError for malformed input and for an adapter of another model, UnservableAdapterError for a
    valid adapter of a kind that a pool does not serve, or that targets modules which are not pooled.
    """
    if isinstance(adapter, Mapping):
        if not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in adapter.items()):
            raise AdapterFormatError("an adapter in memory is a mapping from PEFT's keys to tensors")
        raw = None if config is None and is_foreign(adapter) else _plain(config)
        tensors, raw = as_peft(model, adapter, raw, {}, key_mapping)
        settings, scaled = _fitted(model, layers, left_out, tensors, raw, "the adapter")
    elif config is not None:
        raise AdapterFormatError("config belongs to tensors in memory; a folder has its own")
    else:
        origin = f"the adapter in {os.fspath(adapter)}"
        with open_source(model, adapter, key_mapping, follow_symlinks) as source:
            settings, scaled = _fitted(model, layers, left_out, source.described, source.config, origin)
            tensors = source.read()
    _check_keys(model, settings, list(scaled), tensors)
    updates = {}
    for path, scaling in scaled.items():
        A, B, *bias = keys = _keys(path, settings)
        for key in keys:
            _check_values(key, tensors[key])
        updates[path] = Update(tensors[A], tensors[B], scaling, tensors[bias[0]] if bias else None)
    return updates


def _fitted(
    model: nn.Module,
    layers: Mapping[str, _Pooled],
    left_out: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    raw: Any,
    origin: str,
) -> tuple[LoRAConfig, dict[str, float]]:
    """Return the configuration and {path: scaling} of its targets. Checks that the keys, shapes and dtypes of
    ``tensors`` fit them; values are not read."""
    settings = _served(model, raw, any(layer.pool_bias is not None for layer in layers.values()))
    try:
        settings = resolve(model, settings, (nn.Linear,))
        matcher = Matcher(settings)
        targets = [path for path, _ in model.named_modules() if path and matcher.why_not(path) is None]
    except ConfigError as error:
        raise AdapterFormatError(f"{origin} does not fit {type(model).__name__}: {error}") from None
    _check_targets(model, layers, left_out, targets)
    if not targets:
        named = reprlib.repr(settings.target_modules)
        raise AdapterFormatError(
            f"{origin} does not fit {type(model).__name__}: no module matches target_modules={named}"
        )
    _check_keys(model, settings, targets, tensors)
    scaled = {}
    for path in targets:
        rank, alpha = matcher.rank_and_alpha(path)
        N, K = layers[path].base_weight().shape
        for key, shape in zip(_keys(path, settings), ((rank, K), (N, rank), (N,)), strict=False):
            _check_shape(key, tensors[key], shape)
        scaled[path] = settings.scaling(rank, alpha)
    return settings, scaled


def _keys(path: str, config: LoRAConfig) -> list[str]:
    """Return PEFT's keys of one layer: A, B, and with lora_bias the bias of B."""
    ends = ("lora_A.weight", "lora_B.weight", *(["lora_B.bias"] if config.lora_bias else []))
    return [f"{PREFIX}{path}.{end}" for end in ends]


def _plain(config: Any) -> Any:
    """Return the configuration in the form of adapter_config.json."""
    if isinstance(config, LoRAConfig):
        return config.to_peft_dict()
    if isinstance(config, Mapping):
        return dict(config)
    to_dict: Callable[[], Any] | None = getattr(config, "to_dict", None)
    if to_dict is None:
        raise AdapterFormatError(f"config = {config!r:.60}: tensors in memory need the configuration they belong to")
    return to_dict()


def _served(model: nn.Module, raw: Any, lora_bias: bool) -> LoRAConfig:
    """Parse the configuration. Raises UnservableAdapterError if a pool over this model cannot serve such an adapter."""
    try:
        config = _parse_config(raw)
    except ConfigError as error:
        raise UnservableAdapterError(f"a pool does not serve this adapter: {error}") from None
    wrong = None
    if config.use_dora:
        wrong = "use_dora: a magnitude that scales the adapted weight, for each adapter another"
    elif config.init_lora_weights in BASE_CHANGING_INITS:
        wrong = f"init_lora_weights={config.init_lora_weights!r} has changed the base weights, which all adapters share"
    elif config.lora_bias and not lora_bias:
        wrong = "lora_bias: a bias on lora_B, which a pool made by AdapterPool(..., lora_bias=True) serves"
    elif config.trainable_token_indices is not None:
        wrong = "trainable_token_indices: trained rows of an embedding that all adapters share"
    elif config.layer_replication and getattr(model, REPLICATED_AS, None) != config.layer_replication:
        wrong = (
            f"layer_replication={config.layer_replication}: the model's layers are not replicated in this way. Call "
            "lora_kernels.adapters.replicate_layers(model, layer_replication) before the pool is made"
        )
    if wrong:
        raise UnservableAdapterError(f"a pool serves A and B over a frozen base, and this adapter has {wrong}{REMEDY}")
    return replace(config, inference_mode=True)


def _check_targets(
    model: nn.Module, layers: Mapping[str, _Pooled], left_out: Mapping[str, str], targets: list[str]
) -> None:
    missing = [path for path in targets if path not in layers]
    if not missing:
        return
    shown_paths = []
    for path in missing[:MAX_NAMES]:
        kind = type(model.get_submodule(path)).__name__
        shown_paths.append(f"{path} ({left_out.get(path) or f'a {kind}, no linear layer'})")
    more = f" and {len(missing) - MAX_NAMES} more" if len(missing) > MAX_NAMES else ""
    raise UnservableAdapterError(
        f"the adapter targets {len(missing)} of its {len(targets)} modules that this pool does not hold: "
        f"{', '.join(shown_paths)}{more}"
    )


def _check_keys(model: nn.Module, config: LoRAConfig, targets: list[str], tensors: Mapping[str, Tensor]) -> None:
    expected = {key for path in targets for key in _keys(path, config)}
    extra = sorted(tensors.keys() - expected)
    state = model.state_dict() if extra else {}
    extra = [key for key in extra if not is_base_tensor(key, tensors[key], state)]
    for key in extra[:100]:  # enough to name a kind; a file may have thousands
        kind = _kind(model, key.removeprefix(PREFIX), config)
        if kind:
            raise UnservableAdapterError(
                f"a pool serves A and B of linear layers, and this adapter has {kind}: {shown(key)}{REMEDY}"
            )
    missing = sorted(expected - tensors.keys())
    if missing or extra:
        raise AdapterFormatError(mismatch(expected, missing, extra))


def _kind(model: nn.Module, name: str, config: LoRAConfig) -> str | None:
    """Return the kind of PEFT tensor that has this name, or None; A and B of linear layers are handled elsewhere."""
    if name.endswith(".lora_magnitude_vector") or ".lora_magnitude_vector." in name:
        return "magnitudes of DoRA"
    if ".lora_embedding_" in name:
        return "a trained embedding"
    if "trainable_tokens" in name:
        return "trained tokens"
    if any(f".{saved}." in f".{name}" for saved in config.modules_to_save or ()):
        return "a module trained whole (modules_to_save) that differs from the model's, which all adapters share"
    if name in [f"{path}.weight" for path in embeddings(model)]:
        return "the weight of an embedding (PEFT saves it if the vocabulary was resized)"
    if name.endswith(".lora_B.bias"):
        return "a bias on lora_B"
    if config.bias != "none" and name.endswith(".bias"):
        return f"trained biases (bias={config.bias!r})"
    return None


def _check_shape(key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise AdapterFormatError(f"{key} has shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_floating_point():
        raise AdapterFormatError(f"{key} has dtype {tensor.dtype}, expected a float")


def _check_values(key: str, tensor: Tensor) -> None:
    if is_sharded(tensor) or tensor.is_meta or tensor.layout != torch.strided:
        raise AdapterFormatError(f"{key} is no plain tensor in memory (sharded, sparse or on the meta device)")
    if not is_finite(tensor):
        raise AdapterFormatError(f"{key} holds NaN or infinity, expected finite numbers")


def check_ranks(name: str, updates: Mapping[str, Update], max_rank: int) -> None:
    """Raise UnservableAdapterError if the largest rank exceeds ``max_rank``."""
    path, update = max(updates.items(), key=lambda item: item[1].rank)
    if update.rank > max_rank:
        raise UnservableAdapterError(
            f"{name!r} has rank {update.rank} in {path}, and this pool takes up to max_rank={max_rank}; make it with "
            f"max_rank={update.rank}"
        )


def convert_updates(updates: Mapping[str, Update], layers: Mapping[str, _Pooled]) -> dict[str, Update]:
    """Convert the updates to the dtype and device of their layers. Raises AdapterFormatError if a value overflows."""
    return {
        path: Update(
            _converted(f"{path}.lora_A", A, layers[path].pool_A),
            _converted(f"{path}.lora_B", B, layers[path].pool_Bt),
            scaling,
            None if bias is None else _converted(f"{path}.lora_B.bias", bias, layers[path].pool_scalings),
        )
        for path, (A, B, scaling, bias) in updates.items()
    }


def _converted(key: str, tensor: Tensor, like: Tensor) -> Tensor:
    value = tensor.detach().to(device=like.device, dtype=like.dtype)
    if not is_finite(value):
        raise AdapterFormatError(f"{key} holds numbers too large for {like.dtype}, the dtype of its layer")
    return value
