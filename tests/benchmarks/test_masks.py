from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import masks
from benchmarks.cases import Case
from benchmarks.masks import keep_rate, masks_agree
from benchmarks.rivals import TRITON_BACKENDS
from lora_kernels.reference import philox_keep_mask

NAMED = TRITON_BACKENDS[1:]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("backend", NAMED)
def test_masks_agree_bit_for_bit(device: str, backend: str) -> None:
    case = Case(19, 16, 40, 16, 0.3)
    found = list(masks_agree(case, torch.device(device), backend, ((7, 0), (-5, 1 << 40))))
    backward = [] if backend.endswith("one_pass") else ["dX by bits", "dA by bits", "dX by seed", "dA by seed"]
    assert [check.what for check in found] == 2 * ["XA", "bits", *backward]
    assert {check.status for check in found} == {"ok"}


def test_a_backward_that_reads_bits_alone_refuses_the_seed(device: str) -> None:
    case = Case(19, 16, 40, 16, 0.3)
    found = list(masks_agree(case, torch.device(device), "triton:tma_extend", ((7, 0),)))
    assert [(check.what, check.status) for check in found] == [
        ("", "refused"), ("XA", "ok"), ("bits", "ok"), ("dX by bits", "ok"), ("dA by bits", "ok"),
    ]  # fmt: skip
    assert [c.status for c in masks_agree(case, torch.device(device), "triton:one_launch", ((7, 0),))] == ["refused"]


def test_another_mask_is_noticed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_another_seed(seed: Tensor, p: float, M: int, K: int) -> Tensor:
        return philox_keep_mask(seed + 1, p, M, K)

    monkeypatch.setattr(masks, "philox_keep_mask", of_another_seed)
    found = list(masks_agree(Case(18, 16, 40, 16, 0.3), torch.device(device), "triton:eager", ((7, 0),)))
    assert {check.status for check in found} == {"failed"}
    assert "bits differ" in found[0].message


def test_a_wrong_keep_rate_is_noticed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(64, 16, 64, 16, 0.1)
    assert [check.status for check in keep_rate(case, torch.device(device), "triton:shrink_extend")] == ["ok"]
    always: Callable[..., object] = lambda seed, p, M, K, dtype, backend: (torch.ones(M, K), None)  # noqa: E731
    monkeypatch.setattr(masks, "forward_mask", always)
    assert [check.status for check in keep_rate(case, torch.device(device), "triton:shrink_extend")] == ["failed"]
