"""What is active around a call, and what is computed past it."""

import threading

import pytest
import torch

from lora_kernels.reference.transforms import bare, batched, derived, in_thread, no_autocast


def test_what_is_active_is_seen():
    seen = []

    def look(x):
        seen.append((derived(), batched(x), bare(x) is x))
        return x.sum()

    x = torch.ones(3, 2)
    look(x)
    torch.func.grad(look)(x)
    torch.func.vmap(look)(x)
    torch.func.vmap(torch.func.grad(look))(x)
    torch.func.jacfwd(look)(x)  # which maps over tangents, not over x
    with torch.autograd.forward_ad.dual_level():
        look(x)
    assert [first for first, _, _ in seen] == [False, True, True, True, True, True]
    assert [second for _, second, _ in seen] == [False, False, True, True, False, False]
    assert [third for _, _, third in seen] == [True, False, False, False, False, True]


def test_a_thread_has_no_transform_and_raises_here():
    found = []

    def draw(x):
        generator = torch.Generator().manual_seed(0)
        found.append(in_thread(lambda: torch.rand(2, generator=generator)))
        return x

    torch.func.vmap(draw)(torch.ones(3))  # randomness="error"
    assert torch.equal(found[0], torch.rand(2, generator=torch.Generator().manual_seed(0)))
    assert in_thread(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        in_thread(lambda: 1 // 0)


def test_autocast_is_off_inside_and_on_after():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with no_autocast("cpu"):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
    with no_autocast("cpu"):
        assert (x @ x).dtype == torch.float32
