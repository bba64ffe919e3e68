"""The operator, and a cache that must never hand out norms of tensors that have changed."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels.ops.weight_norm import NormCache, weight_norm
from lora_kernels.reference import weight_norm as norms


class Held:
    """W, A, B as parameters, a cache over them, and how often norms were computed."""

    def __init__(self, monkeypatch, N=40, K=30, r=4):
        torch.manual_seed(0)
        self.module = nn.ParameterDict({"W": torch.randn(N, K), "A": torch.randn(r, K), "B": torch.randn(N, r)})
        self.scaling, self.cache, self.computed = 2.0, NormCache(), 0
        whole = norms.weight_norm

        def counted(*args):
            self.computed += 1
            return whole(*args)

        monkeypatch.setattr(norms, "weight_norm", counted)

    def norm(self):
        W, A, B = (self.module[name] for name in "WAB")
        got = self.cache.norm(W, A, B, self.scaling)
        want = torch.linalg.norm((W + self.scaling * B @ A).detach(), dim=1)
        torch.testing.assert_close(got, want)
        return got


@pytest.fixture
def held(monkeypatch):
    held = Held(monkeypatch)
    held.norm()
    assert held.computed == 1
    return held


@pytest.mark.parametrize("A_dtype", [torch.float32, torch.bfloat16])
def test_opcheck(A_dtype, device):
    W, A, B = torch.randn(12, 9), torch.randn(3, 9).to(A_dtype), torch.randn(12, 3)
    args = W.to(device), A.to(device), B.to(device), 1.5
    torch.library.opcheck(torch.ops.lora_kernels.weight_norm.default, args)


def test_compiles_in_one_graph_without_gradients(device):
    W, A, B = (torch.randn(*s, device=device) for s in ((12, 9), (3, 9), (12, 3)))
    A.requires_grad_()
    cache = NormCache()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def norm(W, A, B):
        return cache.norm(W, A, B, 1.5)

    got = norm(W, A, B)
    assert torch.equal(got, weight_norm(W, A, B, 1.5))
    assert not got.requires_grad
    A.data.mul_(2)
    assert torch.equal(norm(W, A, B), weight_norm(W, A, B, 1.5))


def test_autocast_does_not_round_the_norms():
    W, A, B = torch.randn(12, 9), torch.randn(3, 9), torch.randn(12, 3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = weight_norm(W, A, B, 1.5)
    assert torch.equal(inside, weight_norm(W, A, B, 1.5))


def test_devices_other_than_the_cpu_are_never_waited_for():
    W, A, B = (torch.empty(s, device="meta") for s in ((12, 9), (3, 9), (12, 3)))
    assert weight_norm(W, A, B, 1.5).is_meta  # to look at a meta tensor's data raises
    assert NormCache().norm(W, A, B, 1.5).is_meta


def test_unchanged_tensors_are_not_normed_again(held):
    first = held.norm()
    with torch.no_grad():
        assert held.norm() is first
    with torch.inference_mode():
        assert held.norm() is first
    assert held.computed == 1


def _step(held):
    optimizer = torch.optim.AdamW([held.module["A"], held.module["B"]], lr=0.1)
    for name in "AB":
        held.module[name].grad = torch.randn_like(held.module[name])
    optimizer.step()


def _pointer(held):
    held.module["B"].detach().numpy()[3, 1] += np.float32(0.5)


def _set(name, value):
    def change(held):
        held.module[name].data = value(held.module[name].data)

    return change


def _edit(name, edit):
    def change(held):
        edit(held.module[name].data)

    return change


def _load(assign):
    def change(held):
        state = {name: torch.randn_like(value) for name, value in held.module.state_dict().items()}
        held.module.load_state_dict(state, assign=assign)

    return change


def _double(held):
    held.module.double()


def _round_trip(held):
    held.module.half().float()


def _recycled(held):
    """A new W whose memory may well be the old one's: nothing but the contents tells them apart."""
    for _ in range(50):
        held.module["W"].data = torch.randn_like(held.module["W"])
        held.norm()


def _scaling(held):
    held.scaling = 3.0


CHANGES = {
    "optimizer step": _step,
    "write through a pointer": _pointer,
    "A.data swapped": _set("A", torch.randn_like),
    "B.data swapped": _set("B", lambda old: old + 1),
    "W.data swapped": _set("W", lambda old: old * 1.5),
    "A.data written": _edit("A", lambda data: data.mul_(1.5)),
    "one element of B.data written": _edit("B", lambda data: data[5, 2].add_(1)),
    "W.data merged into": _edit("W", lambda data: data.add_(0.1)),
    "one row of W.data written": _edit("W", lambda data: data[37].mul_(2)),
    "checkpoint copied in": _load(False),
    "checkpoint assigned": _load(True),
    "cast": _double,
    "cast there and back": _round_trip,
    "W's memory recycled": _recycled,
    "scaling": _scaling,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_change_is_seen(held, change, mode):
    before = held.norm()
    change(held)
    with mode():
        after = held.norm()
    assert before is not after
    assert held.computed >= 2


def test_norms_first_asked_for_in_inference_mode_can_be_saved_by_a_backward(monkeypatch):
    held = Held(monkeypatch)
    with torch.inference_mode():
        norm = held.norm()
    assert not norm.is_inference()
    assert held.norm() is norm


def test_inference_tensors_are_compared_by_contents(monkeypatch):
    held = Held(monkeypatch)
    with torch.inference_mode():
        held.module = {name: value.detach().clone() for name, value in held.module.items()}
        held.norm()
        held.module["A"][0] += 1
        held.norm()
        held.module["W"] *= 2
        held.norm()


def test_copies_and_pickles_are_empty(held):
    for other in (copy.deepcopy(held.cache), pickle.loads(pickle.dumps(held.cache)), copy.copy(held.cache)):
        assert type(other) is NormCache
        assert other._base is None
        assert other._adapter is None


def test_a_cache_keeps_no_dead_weight_alive(held):
    reference = torch.multiprocessing.reductions.StorageWeakRef(held.module["W"].untyped_storage())
    held.module["W"].data = torch.randn(40, 30)
    assert reference.expired()


def test_vouching_for_contents_on_a_device():
    W, A, B = (torch.empty(s, device="meta") for s in ((12, 9), (3, 9), (12, 3)))
    cache = NormCache()
    first = cache.norm(W, A, B, 1.5, trust=True)
    assert cache.norm(W, A, B, 1.5, trust=True) is first
    for change in (lambda: A.zero_(), lambda: W.zero_(), lambda: setattr(B, "data", torch.empty_like(B))):
        before = cache.norm(W, A, B, 1.5, trust=True)
        change()
        assert cache.norm(W, A, B, 1.5, trust=True) is not before
    last = cache.norm(W, A, B, 1.5, trust=True)
    assert cache.norm(W, A, B, 1.6, trust=True) is not last
    cache.norm(W, A, B, 1.6)  # once without the word forgets everything
    assert cache._adapter is None
