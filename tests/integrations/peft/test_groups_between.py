"""Tests siblings that run together, with other events between their calls."""

import gc
import sys
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels.integrations.peft import groups
from lora_kernels.integrations.peft.groups import groups_of
from lora_kernels.integrations.peft.sharing import MAX_UNCLAIMED_ROUNDS
from tests.integrations.peft.siblings import (
    K,
    adapted,
    adapter,
    attention,
    example,
    gradients,
    learned,
    same,
    twins,
    with_another,
)

pytestmark = pytest.mark.usefixtures("nothing_left_over")


def test_an_input_changed_in_place_between_siblings(counted):
    model, twin = twins()
    for m in (model, twin):
        for layer in m.base_model.model.layers:
            layer.between = lambda x: x.mul_(2)
    for _ in range(5):
        x = example().detach()
        expected = twin(x.clone())
        counted.clear()
        torch.testing.assert_close(model(x.clone()), expected)
    assert counted == [1, 2, 1, 1, 2, 1]  # q alone and k with v, as they read when the partners were found again


def test_inference_tensors_have_no_version_and_go_alone(counted):
    model = learned(adapted(p=0.3))
    counted.clear()
    with torch.inference_mode():
        model(example())
    assert set(counted) == {1}


def test_a_sibling_that_is_not_called_keeps_nothing_alive_and_is_left_out_in_the_end(counted):
    model = learned(adapted())
    for layer in model.base_model.model.layers:
        layer.order = "qk"
    refs = watch(model)
    model(example())
    assert groups.unclaimed.made.group is groups_of(model)[1]  # only the last block's; the first one's were dropped
    assert refs[1]() is not None
    model(example())
    assert refs[0]() is refs[1]() is None
    counted.clear()
    for _ in range(5):
        model(example())
    assert counted[-4:] == [2, 1, 2, 1]
    assert groups.unclaimed.made is None


def watch(model):
    """Return weak references to the blocks' inputs, in order of the calls."""
    refs = []
    for layer in model.base_model.model.layers:
        layer.between = lambda x: refs.append(weakref.ref(x))
    return refs


def test_a_complete_round_keeps_nothing_alive():
    model = learned(adapted())
    refs = watch(model)
    model(example())
    assert [ref() for ref in refs] == [None, None]
    assert groups.unclaimed.made is None


def test_an_exception_between_siblings(counted):
    model = learned(adapted())
    expected = gradients(model, example(1))

    def stop(x):
        raise KeyboardInterrupt

    attention(model).between = stop
    with pytest.raises(KeyboardInterrupt):
        model(example())
    attention(model).between = lambda x: None
    counted.clear()
    same(gradients(model, example(1)), expected, 0)
    assert counted == [3, 1, 3, 1]


def scale(model, name):
    with torch.no_grad():
        adapter(attention(model), name)[1].mul_(2)


CHANGES = {
    "step": lambda m: scale(m, "k"),
    "scaling": lambda m: attention(m).k.scaling.update(default=5.0),
    "disabled": lambda m: m.base_model.disable_adapter_layers(),
    "merged": lambda m: attention(m).k.merge(),
    "other": lambda m: m.base_model.set_adapter("other"),
    "parameter": lambda m: setattr(attention(m).k.lora_B["default"], "weight", nn.Parameter(torch.ones(8, 4))),
    "base": lambda m: attention(m).k.base_layer.weight.mul_(2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_output_made_ahead_is_not_handed_out_once_its_layer_has_changed(name):
    model, twin = twins(with_another)
    for m in (model, twin):
        attention(m).between = lambda x, m=m: torch.no_grad()(CHANGES[name])(m)
    x = example()
    torch.testing.assert_close(model(x), twin(x))


def test_gradients_on_and_off_and_autocast_between_siblings():
    model = learned(adapted())
    block, x = attention(model), example()
    with torch.no_grad():
        assert not block.q(x).requires_grad
    block.q(x)
    with torch.no_grad():
        assert not block.v(x).requires_grad
    assert block.k(x).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert block.v(x).dtype == torch.bfloat16
    assert block.q(x).dtype == torch.float32


def test_two_threads_on_one_model():
    """Threads are switched between as many calls as possible, so that partners are found in every order of calls."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(5):
            model = adapted().eval()
            twin = adapted(group=False).eval()
            wrong, left = [], []

            def work(seed, model=model, twin=twin, wrong=wrong, left=left):
                for i in range(30):
                    x = example(seed + 2 * i)
                    y = model(x)
                    y.sum().backward(inputs=[x])
                    if not torch.allclose(y, twin(x), atol=1e-5):
                        wrong.append((seed, i))
                    if groups.unclaimed.made is not None:
                        left.append((seed, i))

            threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert (wrong, left) == ([], [])
            assert groups_of(model)[0].together() == (("q", "k", "v"),)
    finally:
        sys.setswitchinterval(interval)


def paused(model, between):
    """Run a forward in a thread that pauses between the first block's siblings while ``between`` runs.

    Returns its gradients, the outputs cached in the thread at the end, and its calls, as ``counted`` records them.
    """
    block, stopped, go_on, result = attention(model), threading.Event(), threading.Event(), {}

    def stop(x):
        block.between = lambda x: None
        stopped.set()
        assert go_on.wait(600)

    def work():
        result["gradients"] = gradients(model, example(3))
        result["cached"] = groups.unclaimed.made

    block.between = stop
    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert stopped.wait(600)
        between()
    finally:
        go_on.set()
        thread.join()
    return result


@pytest.mark.parametrize("order", ["qkv", "kvq", "vqk"])
def test_another_thread_learns_in_the_midst_of_a_round(counted, order):
    """Only siblings that have not been called yet run together; the outputs of the others would never be used."""
    model, twin = adapted(), adapted(group=False)
    for block in (attention(model), attention(twin)):
        block.order = order
    expected = gradients(twin, example(3))

    def learn():
        for _ in range(2):
            with torch.no_grad():
                model(example())
        assert groups_of(model)[0].together() == (("q", "k", "v"),)
        counted.clear()

    result = paused(model, learn)
    assert result["cached"] is None
    same(result["gradients"], expected)
    assert counted == [2, 1, 3, 1]  # the first of the first block ran before the pause
    counted.clear()
    same(gradients(model, example(3)), expected)
    assert counted.count(3) == 2


def test_another_thread_forgets_in_the_midst_of_a_round(counted):
    """The cached outputs are used, and none remains."""
    model = learned(adapted())
    expected = gradients(model, example(3))

    def forget():
        block = attention(model)
        for _ in range(MAX_UNCLAIMED_ROUNDS + 1):
            block.q(example())
        groups.unclaimed.made = None
        assert groups_of(model)[0].sharing.partners is None
        counted.clear()

    result = paused(model, forget)
    assert result["cached"] is None
    same(result["gradients"], expected)
    assert counted == [1, 3, 1]  # o; the second block: k and v of the first were cached


def test_an_inference_call_drops_what_was_not_claimed():
    model = learned(adapted())
    x = example()
    attention(model).q(x)
    assert groups.unclaimed.made.x is x
    with torch.inference_mode():
        model(example())
    assert groups.unclaimed.made is None


def test_a_sibling_called_with_another_input_drops_what_was_forgotten():
    model = learned(adapted())
    block = attention(model)
    block.q(example())
    groups_of(model)[0].sharing.partners = None
    block.k(example())
    assert groups.unclaimed.made is None


class Pair(nn.Module):
    """Two siblings; the backward needs nothing that is computed after the sine of the first."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(K, 8), nn.Linear(K, 8)
        self.reentrant, self.seen = None, []

    def body(self, x):
        x = x.tanh()
        self.seen.append(weakref.ref(x))
        return self.q(x).sin() + self.k(x)

    def forward(self, x):
        return self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_that_recomputes_leaves_nothing(counted, reentrant):
    """A recomputation that stops early has called only the first sibling."""
    model = learned(adapted(Pair()))
    pair = model.base_model.model
    pair.reentrant = reentrant
    pair.seen.clear()
    counted.clear()
    model(example()).sum().backward()
    assert counted == ([1, 1, 2] if reentrant else [2, 2])  # without gradients and dropout a CPU runs them one by one
    assert len(pair.seen) == 2
    gc.collect()
    assert [ref() for ref in pair.seen] == [None, None]


def test_a_thread_between_the_siblings_of_another(counted):
    model = learned(adapted())
    block, expected = attention(model), gradients(model, example())

    def meanwhile(x):
        block.between = lambda x: None
        thread = threading.Thread(target=lambda: model(example(1)))
        thread.start()
        thread.join()

    block.between = meanwhile
    counted.clear()
    same(gradients(model, example()), expected, 0)
    assert counted == [3, 3, 1, 3, 1, 1, 3, 1]  # q k v of one model, all of the other, the rest of the first
