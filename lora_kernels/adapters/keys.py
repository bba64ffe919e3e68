"""Keys of an adapter's tensors: renames prefixes, converts keys to PEFT's form, reports keys that do not fit."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lora_kernels.adapters.sharded import whole
from lora_kernels.errors import AdapterFormatError

PREFIX = "base_model.model."
KeyMapping = Mapping[str, str | None]
COMPARED = 10_000  # at most so many keys are compared to find the nearest one
# Keys of a PEFT model's state_dict, which hold the adapter's name (group 2) between lora_A, ... and the end.
NAMED = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.([^.]+)(\.weight|\.bias|)$"
)


def renamed(tensors: Mapping[str, Tensor], key_mapping: KeyMapping | None) -> dict[str, Tensor]:
    """The tensors with the prefixes of their keys replaced.

    key_mapping: {found prefix: wanted prefix}, plain strings. If several prefixes fit a key, the longest is used, once;
    "" fits every key. A prefix that starts with "base_model.model." also fits keys without "base_model.model.". None
    as the wanted prefix leaves the keys out.
    Raises AdapterFormatError for a map of another type, a prefix that no key starts with, and two keys that become the
    same key.
    """
    if key_mapping is None:
        return dict(tensors)
    if not isinstance(key_mapping, Mapping) or not all(
        isinstance(found, str) and isinstance(wanted, str | None) for found, wanted in key_mapping.items()
    ):
        raise AdapterFormatError(
            f"key_mapping = {key_mapping!r:.100}: accepted is a dictionary {{found prefix: wanted prefix}} of strings "
            "(None as wanted prefix leaves the keys out)"
        )
    longest_first = sorted(key_mapping, key=len, reverse=True)
    unused, result = set(key_mapping), dict[str, Tensor]()
    for key, tensor in tensors.items():
        for found in longest_first:
            full = PREFIX + key if found.startswith(PREFIX) and not key.startswith(PREFIX) else key
            if full.startswith(found):
                unused.discard(found)
                wanted = key_mapping[found]
                new = None if wanted is None else wanted + full[len(found) :]
                break
        else:
            new = key
        if new is None:
            continue
        if new in result:
            raise AdapterFormatError(
                f"key_mapping gives two tensors the key {shown(new)}; every tensor needs its own key"
            )
        result[new] = tensor
    if unused:
        raise AdapterFormatError(
            f"key_mapping: no key starts with {min(unused)!r}; the first key is {shown(min(tensors, default=''))}"
        )
    return result


def to_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the keys of PEFT's files: with the prefix "base_model.model." and without the adapter's name.

    The adapter's name, usually "default", is in the keys of a PEFT model's state_dict() and of files of old PEFT:
    "q.lora_A.default.weight". Raises AdapterFormatError for tensors of several adapters and for two keys that become
    the same key.
    """
    named = {key: match for key in tensors if (match := NAMED.search(key)) and match[2] not in ("weight", "bias")}
    names = {match[2] for match in named.values()}
    if len(names) > 1:
        raise AdapterFormatError(
            f"the keys name {len(names)} adapters ({', '.join(sorted(names)[:4])}): save one of them with PEFT's "
            'save_pretrained, or leave the others out with key_mapping={"prefix of their keys": None}'
        )
    name, result = next(iter(names), None), dict[str, Tensor]()
    for key, tensor in tensors.items():
        new = key if key.startswith(PREFIX) else PREFIX + key
        new = new.removesuffix(".weight") if new.endswith(".lora_magnitude_vector.weight") else new
        if name is not None:
            if key in named:
                end = named[key][3]
                new = new.removesuffix(f".{name}{end}") + ("" if "lora_magnitude_vector" in named[key][1] else end)
            elif ".original_module." in new:  # the trained copy beside it is used instead
                continue
            new = new.replace(f".modules_to_save.{name}.", ".").removesuffix(f".{name}")
        if new in result:
            raise AdapterFormatError(
                f"two keys become {shown(new)}, one of them {shown(key)}; every tensor needs its own key"
            )
        result[new] = tensor
    return result


def without_name(key: str) -> str:
    """The key without the name of an adapter between lora_A or lora_B and its end."""
    match = NAMED.search(key)
    return key if not match or match[2] in ("weight", "bias") else key[: match.start(2)] + match[3][1:]


def is_base_tensor(key: str, tensor: Tensor, state: Mapping[str, Tensor]) -> bool:
    """Whether this tensor equals the base model's own, bit for bit. Files can hold such tensors: PEFT writes the weight
    of an adapted output head, and state_dict() holds all tensors. For a tensor on the meta device only shape and dtype
    are compared."""
    own = state.get(key.removeprefix(PREFIX).replace(".token_adapter.", ".").replace(".base_layer.", "."))
    if own is None or own.shape != tensor.shape or own.dtype != tensor.dtype:
        return False
    return tensor.is_meta or torch.equal(tensor, whole(own).to(tensor.device))


def mismatch(expected: Collection[str], missing: Collection[str], extra: Collection[str]) -> str:
    """The error message for keys that do not fit: the first such key, the counts, and the nearest key to it."""
    key, what = (min(missing), "missing") if missing else (min(extra), "in the file but not expected")
    counts = f"({len(expected)} keys expected, {len(missing)} missing, {len(extra)} too many)"
    others = sorted(extra if missing else expected)[:COMPARED]
    if not others:
        return f"{shown(key)} is {what} {counts}"
    other = max(others, key=lambda one: (len(common_end(one, key)), len(_common_start(one, key))))
    found, wanted = (other, key) if missing else (key, other)
    nearest = "the nearest key in the file is" if missing else "the nearest expected key is"
    hint = "If the two are the same, pass key_mapping={found prefix: expected prefix}"
    end = common_end(found, wanted)
    end = "." + end.partition(".")[2] if "." in end else ""
    old, new = f"{found.removesuffix(end)}.", f"{wanted.removesuffix(end)}."
    if missing and end and all(one.startswith(old) and new + one[len(old) :] in missing for one in extra):
        hint = f"key_mapping={{{old!r}: {new!r}}} makes all of them fit"
    return f"{shown(key)} is {what} {counts}; {nearest} {shown(other)}. {hint[:300]}"


def shown(key: str) -> str:
    """The key, quoted for a message; a key of more than 200 characters is shown by its two ends."""
    return repr(key if len(key) <= 200 else f"{key[:100]}...{key[-90:]}")


def _common_start(a: str, b: str) -> str:
    n = min(len(a), len(b))
    return a[: next((i for i in range(n) if a[i] != b[i]), n)]


def common_end(a: str, b: str) -> str:
    """The longest common suffix."""
    return _common_start(a[::-1], b[::-1])[::-1]
