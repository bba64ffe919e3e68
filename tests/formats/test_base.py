"""The registry of weight formats."""

import torch

from lora_kernels.formats import base, format_of


def test_a_registered_format_is_found_by_what_it_matches(monkeypatch):
    class Packed:
        name = "packed"

        def matches(self, W: torch.Tensor) -> bool:
            return W.dtype == torch.uint8

    monkeypatch.setattr(base, "_FORMATS", dict(base._FORMATS))
    packed = base.register(Packed())
    assert format_of(torch.zeros(4, dtype=torch.uint8)) is packed
    assert format_of(torch.zeros(2, 2)).name == "dense"
