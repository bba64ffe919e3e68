"""Generates other content for the inputs of a model, for probes: valid, and of the same kind and size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# Words in the names of inputs that describe other inputs, such as masks. A probe does not alter them.
ABOUT = ("mask", "position", "type_ids", "cache", "label", "grid", "size", "length")


def is_content(name: str) -> bool:
    """Whether an input with this name holds the content of requests."""
    return not any(word in name for word in ABOUT)


def is_extent(name: str) -> bool:
    """Whether an input with this name may hold the length of each sequence."""
    return "mask" in name or "length" in name


def with_other_extents(extents: Sequence[Tensor], args: Any, kwargs: Any) -> Any:
    """(args, kwargs) with sequences of other lengths: masks (n, T) that end earlier, smaller lengths (n,)."""
    generator = torch.Generator().manual_seed(0)

    def other(leaf: Any) -> Any:
        if not any(leaf is tensor for tensor in extents) or leaf.is_floating_point() or leaf.dim() > 2:
            return leaf
        share = torch.rand(len(leaf), generator=generator).to(leaf.device)
        if leaf.dim() == 1:
            return (1 + (leaf - 1) * share).to(leaf.dtype).minimum(leaf)
        kept = 1 + ((leaf.shape[1] - 1) * share).long()
        return leaf * (torch.arange(leaf.shape[1], device=leaf.device) < kept[:, None]).to(leaf.dtype)

    return tree_map(other, (args, dict(kwargs)))


def kept_values(content: Mapping[str, Tensor], media: bool) -> Iterator[tuple[int, ...]]:
    """Yield, for each attempt of a probe, the tokens that it leaves unchanged: one may be an image's placeholder."""
    yield ()
    for tokens in content.values() if media else ():
        if not tokens.is_floating_point() and tokens.numel():
            for value in (tokens.max(), tokens.min(), tokens.flatten().mode().values):
                yield (int(value),)


def other_content(kept: Sequence[int]) -> Callable[[Tensor, torch.Generator], Tensor]:
    """A function (tensor, generator) -> other content: floats with the same mean and spread; integers between the
    smallest and the largest of the tensor, each different from the old one. Negative integers and ``kept`` stay."""

    def other(tensor: Tensor, generator: torch.Generator) -> Tensor:
        tensor = tensor.detach()
        if tensor.is_floating_point():
            values = tensor.float()
            spread = values.std(correction=0) if tensor.numel() else values.sum()
            spread = torch.where(spread.isfinite() & (spread > 0), spread, torch.ones_like(spread))
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
            return (values.nan_to_num(0, 0, 0).mean() + spread * noise).to(tensor.dtype)
        if tensor.dtype == torch.bool or tensor.is_complex():
            return tensor
        stays = (tensor < 0) | torch.isin(tensor, torch.tensor(sorted(kept), dtype=tensor.dtype, device=tensor.device))
        free = tensor[~stays]
        if not free.numel():  # all tokens are kept ones, as the first token of an answer may be
            stays = tensor < 0
            free = tensor[~stays]
        if not free.numel():
            return tensor
        low, span = int(free.min()), int(free.max() - free.min()) + 1
        if span == 1:
            changed = torch.full_like(tensor, low + 1 if low == 0 else low - 1)
        else:
            step = torch.randint(1, span, tensor.shape, generator=generator).to(tensor.device)
            changed = (tensor - low + step) % span + low
        return torch.where(stays | torch.isin(changed, tensor[stays]), tensor, changed)

    return other
