"""Other content for the inputs of a model, as a probe needs it: of the same kind and size, and valid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# Inputs that describe others; their content is no request's own.
ABOUT = ("mask", "position", "type_ids", "cache", "label", "grid", "size", "length")


def is_content(name: str) -> bool:
    """Whether an input of this name has content of the requests."""
    return not any(word in name for word in ABOUT)


def is_extent(name: str) -> bool:
    """Whether an input of this name may say how long each sequence is."""
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
    """Tokens that stay where they are, for the case that one is the placeholder of an image and has to."""
    yield ()
    for tokens in content.values() if media else ():
        if not tokens.is_floating_point() and tokens.numel():
            for value in (tokens.max(), tokens.min(), tokens.flatten().mode().values):
                yield (int(value),)


def other_content(kept: Sequence[int]) -> Callable[[Tensor, torch.Generator], Tensor]:
    """A function that gives other content of the same kind: floats of the same spread, integers between the smallest
    and the largest there is, none of them the old one, but for ``kept`` and negative ones, which stay."""

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
        if not free.numel():  # the first token of an answer
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
