"""Converts adapters in the layouts of diffusers and Kohya's scripts to PEFT's keys and a configuration."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_kernels.adapters.implied import implied_config, number, settings_of
from lora_kernels.adapters.keys import COMPARED, PREFIX, common_end, shown, without_name
from lora_kernels.errors import AdapterFormatError

# Ends of keys; an end that ends in another one comes before it.
ENDS = {
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    "_lora.down.weight": "A",
    "_lora.up.weight": "B",
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".alpha": "alpha",
}
FOREIGN = tuple(end for end in ENDS if "lora_A" not in end and "lora_B" not in end and end != ".alpha")
# Parts of keys of adapters that are not plain LoRA, as LyCORIS writes them: the name of the kind.
OTHER_KINDS = {
    "hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "a CP-decomposed convolution", "dora_scale": "DoRA in Kohya's layout",
    "lora_magnitude_vector": "DoRA in diffusers' layout", "diff": "a full difference of weights", "oft_": "OFT",
    "diff_b": "a full difference of biases", "lora_B.bias": "a LoRA with a bias on lora_B",
}  # fmt: skip
# {what a key starts with: names of the attribute that holds the component, in a pipeline's module}
KOHYA = {
    "lora_unet_": ("unet", "transformer"),
    "lora_transformer_": ("transformer",),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3",),
}
DIFFUSERS = {
    f"{name}.": (name,) for name in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
} | {"diffusion_model.": ("unet", "transformer")}
NAMES = KOHYA | DIFFUSERS
# {name of a projection in diffusers' attention processors: names that its module can have}
PROJECTIONS = {
    "to_q": ("to_q", "q_proj"), "to_k": ("to_k", "k_proj"), "to_v": ("to_v", "v_proj"),
    "to_out": ("to_out.0", "out_proj", "to_out"),
}  # fmt: skip


class Part(NamedTuple):
    """A tensor of an adapter: its key, the component and the module that the key names, and its kind: "A", "B" or
    "alpha"."""

    key: str
    component: str
    module: str
    kind: str


def is_foreign(keys: Iterable[str]) -> bool:
    """Whether one of these keys has an end that diffusers or Kohya write and PEFT does not."""
    return any(key.endswith(FOREIGN) for key in keys)


def implies_scaling(keys: Iterable[str]) -> bool:
    """Whether the scaling is known without a configuration: from alpha tensors, or by the rule of these layouts for
    files without alphas (alpha is the rank)."""
    keys = list(keys)
    return any(key.endswith((*FOREIGN, ".alpha")) for key in keys) or all(key.startswith(tuple(NAMES)) for key in keys)


def from_layout(
    model: nn.Module, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors with PEFT's keys for ``model``, and the configuration as adapter_config.json would hold it.

    model: the component that the adapter is for, or a module with the components as attributes, like a pipeline. If
    the file holds several components, the part that fits the model is returned, with a warning about the other parts.
    metadata: PEFT's settings as diffusers writes them beside the tensors ("unet.lora_alpha"); may be empty.
    The scaling of a module is alpha / rank: alpha from its tensor, else from the metadata, else the rank.

    Raises AdapterFormatError for keys of another kind, and for a name that fits no module or several modules.
    """
    parts = [_parse(key) for key in sorted(tensors)]
    groups = defaultdict[str, list[Part]](list)
    for part in parts:
        groups[part.component].append(part)
    places = {component: _root(model, component) for component in groups}
    found = {component: _resolve(model, places[component], group) for component, group in groups.items()}
    chosen = [component for component in groups if places[component]] or list(groups)
    if len(chosen) > 1 and not places[chosen[0]]:
        chosen = _choose(model, groups, found, tensors)
    left = [component for component in groups if component not in chosen]
    if left:
        warnings.warn(
            f"the file also holds {sum(len(groups[component]) for component in left)} tensors for "
            f"{', '.join(map(repr, left))}, which were not loaded; load the file into those models too",
            stacklevel=5,
        )
    result, alphas = dict[str, Tensor](), dict[str, float]()
    for component in chosen:
        for part in groups[component]:
            path = found[component].get(part.module)
            if path is None:
                raise AdapterFormatError(_unresolved(model, places[component], part))
            if part.kind == "alpha":
                alphas[path] = number(part.key, tensors[part.key])
                continue
            key = f"{PREFIX}{path}.lora_{part.kind}.weight"
            if key in result:
                raise AdapterFormatError(
                    f"two keys become {shown(key)}, one of them {shown(part.key)}; every tensor needs its own key"
                )
            result[key] = _flat(model, path, tensors[part.key])
    settings = {component: settings_of(metadata, NAMES.get(component, ())) for component in chosen}
    config = implied_config(result, alphas, {path: settings[c] for c in chosen for path in found[c].values()})
    targets = config["target_modules"]
    ends = tuple(f".{path}" for path in targets)
    if any(path.endswith(ends) and path not in targets for path, _ in model.named_modules()):
        config["target_modules"] = "|".join(
            map(re.escape, targets)
        )  # a name would also match modules whose path ends in it
    return result, config


def _parse(key: str) -> Part:
    plain = without_name(key)
    end = next((end for end in ENDS if plain.endswith(end)), None)
    if end is None:
        kind = next((what for name, what in OTHER_KINDS.items() if _is_of_kind(key, name)), None)
        if kind:
            raise AdapterFormatError(
                f"{shown(key)} belongs to {kind}, which is not read; accepted are LoRA's two matrices and alpha"
            )
        raise AdapterFormatError(
            f"{shown(key)} is not a key of an adapter; accepted ends are {', '.join(ENDS)}. Leave other keys out with "
            "key_mapping={prefix: None}"
        )
    name = plain.removesuffix(end).removeprefix(PREFIX).replace(".processor.", ".")
    if end.startswith("_lora"):
        name += "_lora"
    component = next((start for start in NAMES if name.startswith(start)), "")
    return Part(key, component, name.removeprefix(component).removeprefix(PREFIX), ENDS[end])


def _is_of_kind(key: str, name: str) -> bool:
    if name.endswith("_"):
        return f".{name}" in key
    return key.endswith(f".{name}") or f".{name}." in key


def _root(model: nn.Module, component: str) -> str:
    """The path of the component in the model, with a dot at the end; "" if the model itself is the component."""
    names = NAMES.get(component, ())
    return next((f"{name}." for name in names if isinstance(getattr(model, name, None), nn.Module)), "")


def _resolve(model: nn.Module, root: str, group: list[Part]) -> dict[str, str]:
    """{module name in a key: path in the model} for the modules that are found."""
    paths = [path for path, module in model.named_modules() if path.startswith(root) and _has_weight(module)]
    known, flat = set(paths), defaultdict[str, list[str]](list)
    for path in paths:
        flat[path.removeprefix(root).replace(".", "_")].append(path)
    found = {}
    for name in {part.module: part.component for part in group}:
        options = [root + option for option in _spellings(name)]
        path = next((option for option in options if option in known), None)
        if path is None and group[0].component in KOHYA:
            same = flat.get(name, [])
            if len(same) > 1:
                written = shown(group[0].component + name)
                raise AdapterFormatError(
                    f"{written} may be {same[0]!r} or {same[1]!r}, since Kohya's scripts write dots as underscores; "
                    f"choose with key_mapping={{{written}: {PREFIX + same[0]!r}}}"
                )
            path = same[0] if same else None
        if path is not None:
            found[name] = path
    return found


def _spellings(name: str) -> Iterator[str]:
    if not name.endswith("_lora"):
        yield name
        return
    before, _, last = name.removesuffix("_lora").rpartition(".")
    for option in PROJECTIONS.get(last, (last,)):
        yield f"{before}.{option}" if before else option


def _has_weight(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor)


def _choose(
    model: nn.Module,
    groups: Mapping[str, list[Part]],
    found: Mapping[str, Mapping[str, str]],
    tensors: Mapping[str, Tensor],
) -> list[str]:
    """The one component of the file that fits the model, or the one with the most modules found if none fits. Raises
    AdapterFormatError if several fit."""

    def fits(component: str) -> bool:
        paths = found[component]
        return all(
            part.module in paths and _fits(model, paths[part.module], tensors[part.key], part)
            for part in groups[component]
        )

    fitting = [component for component in groups if fits(component)]
    if len(fitting) > 1:
        raise AdapterFormatError(
            f"the file holds adapters for {', '.join(map(repr, groups))}, and several of them fit "
            f"{type(model).__name__}: {', '.join(map(repr, fitting))}; leave the others out with "
            f"key_mapping={{{fitting[-1]!r}: None}}"
        )
    return fitting or [max(groups, key=lambda component: len(found[component]))]


def _fits(model: nn.Module, path: str, tensor: Tensor, part: Part) -> bool:
    weight = model.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    if part.kind == "alpha" or tensor.dim() < 2 or weight.dim() < 2:
        return True
    return tensor.shape[1] == weight.shape[1] if part.kind == "A" else tensor.shape[0] == weight.shape[0]


def _unresolved(model: nn.Module, root: str, part: Part) -> str:
    paths = [path for path, module in model.named_modules() if path.startswith(root) and _has_weight(module)][:COMPARED]
    flat = part.module.replace(".", "_")
    nearest = max(paths, key=lambda path: len(common_end(path.replace(".", "_"), flat)), default="(it has none)")
    return (
        f"{shown(part.key)} names no module of {type(model).__name__}; the nearest is {nearest!r}. If that is the one, "
        f"pass key_mapping={{{shown(part.component + part.module)}: {PREFIX + nearest!r}}} (prefixes work likewise)"
    )


def _flat(model: nn.Module, path: str, tensor: Tensor) -> Tensor:
    """The tensor; for a linear layer a matrix in place of the 1x1 convolution (n, m, 1, 1) that some trainers save."""
    linear = isinstance(model.get_submodule(path), nn.Linear)
    return tensor.flatten(1) if linear and tensor.dim() == 4 and tensor.shape[2:] == (1, 1) else tensor
