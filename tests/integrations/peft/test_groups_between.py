"""Siblings that run together, whatever happens between their calls."""

import threading
import weakref

import pytest
import torch
from torch import nn

from lora_kernels.integrations.peft import groups
from lora_kernels.integrations.peft.groups import groups_of
from tests.integrations.peft.siblings import (
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
    assert counted == [1, 2, 1, 1, 2, 1]  # q alone and k with v: what it read when it was learned again


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
    assert groups._aside.made.group is groups_of(model)[1]  # the last block's only; the first one's went with it
    assert refs[1]() is not None
    model(example())
    assert refs[0]() is refs[1]() is None
    counted.clear()
    for _ in range(5):
        model(example())
    assert counted[-4:] == [2, 1, 2, 1]
    assert groups._aside.made is None


def watch(model):
    """Weak references to what the blocks read, as they are called."""
    refs = []
    for layer in model.base_model.model.layers:
        layer.between = lambda x: refs.append(weakref.ref(x))
    return refs


def test_a_complete_round_keeps_nothing_alive():
    model = learned(adapted())
    refs = watch(model)
    model(example())
    assert [ref() for ref in refs] == [None, None]
    assert groups._aside.made is None


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
    model = adapted().eval()
    twin = adapted(group=False).eval()
    wrong = []

    def work(seed):
        for i in range(30):
            x = example(seed + 2 * i)
            y = model(x)
            y.sum().backward(inputs=[x])
            if not torch.allclose(y, twin(x), atol=1e-5) or groups._aside.made is not None:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert groups_of(model)[0].together() == (("q", "k", "v"),)


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
    assert counted == [3, 3, 1, 3, 1, 1, 3, 1]  # q k v of the one, all of the other, the rest of the one
