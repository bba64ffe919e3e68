"""Siblings that run together: the same numbers as PEFT's, whatever happens between their calls."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels.autograd.lora_linear import dropout_seed
from lora_kernels.integrations.compat.judge import errors, fault
from lora_kernels.integrations.families import FAMILIES, fill_adapters
from lora_kernels.integrations.peft import accelerate, groups, linear
from lora_kernels.integrations.peft.groups import dissolve, form_groups, groups_of
from lora_kernels.reference import generator_keep_mask
from lora_kernels.testing import assert_close

K = 16


class Attention(nn.Module):
    """q, k and v of one x (k and v of another, if given), called in ``order``; o reads something else of that width."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(K, N) for N in (24, 8, 8, K))
        self.order, self.between = "qkv", lambda x: None

    def forward(self, x, context=None):
        made = {}
        for i, name in enumerate(self.order):
            if i == 1:
                self.between(x)
            made.setdefault(name, getattr(self, name)(x if context is None or name == "q" else context))
        return self.o(x.tanh()) + sum(y.sum(-1, keepdim=True).sin() for y in made.values())


class Stack(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(layers))
        self.reentrant = None

    def forward(self, x):
        for layer in self.layers:
            if self.reentrant is None:
                x = layer(x.tanh())
            else:  # what siblings read is made inside, so that it is another tensor when it is made again
                x = checkpoint(lambda x, layer=layer: layer(x.tanh()), x, use_reentrant=self.reentrant)
        return x


def adapted(model=None, p=0.0, r=4, group=True, **config):
    torch.manual_seed(0)
    model = get_peft_model(
        model or Stack(), LoraConfig(r=r, lora_dropout=p, target_modules=["q", "k", "v", "o"], **config)
    )
    fill_adapters(model)
    accelerate(model, verbose=False, group=group)
    form_groups(model) if group else dissolve(model)
    return model.train()


def attention(model):
    return model.base_model.model.layers[0]


def example(seed=0, rows=5):
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(model, x, seed=7):
    """The output and every gradient of a forward with the program's generator at ``seed``."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    y = model(x)
    y.square().sum().backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **named}


def twins(prepare=lambda model: None, **config):
    """A model whose siblings run together and one like it whose layers run alone."""
    model = adapted(**config)
    prepare(model)
    twin = copy.deepcopy(model)
    dissolve(twin)
    return learned(model), twin


def learned(model, x=None):
    for _ in range(2):
        with torch.no_grad():
            model.eval()(example() if x is None else x)
    return model.train()


@pytest.fixture(autouse=True)
def nothing_left_over():
    yield
    groups._aside.made = None


@pytest.fixture
def counted(monkeypatch):
    """How many layers each call of the fused functions served, in order."""
    calls = []

    def stacked(x, projections, p):
        calls.append(len(projections))
        return run_stacked(x, projections, p)

    def alone(*args):
        calls.append(1)
        return run_alone(*args)

    run_stacked, run_alone = groups.run_stacked, linear.run_lora_linear
    monkeypatch.setattr(groups, "run_stacked", stacked)
    monkeypatch.setattr(linear, "run_lora_linear", alone)
    return calls


def same(got, expected, limit=2e-5):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp_min(1e-3)
        assert (got[name] - value).abs().max() <= limit * scale, name


TOGETHER = {
    "BERT": ["query + key + value"],
    "RoBERTa": ["query + key + value"],
    "GPT-2": [],
    "Llama": ["gate_proj + up_proj", "q_proj + k_proj + v_proj"],
    "Qwen2": ["gate_proj + up_proj", "q_proj + k_proj + v_proj"],
    "T5": ["k + v", "q + k + v", "wi_0 + wi_1"],
    "Marian": ["k_proj + v_proj", "k_proj + v_proj + q_proj"],
    "ViT": ["q_proj + k_proj + v_proj"],
}


@pytest.mark.parametrize("name", TOGETHER)
def test_families_compute_what_peft_computes(name):
    family = FAMILIES[name]
    config = LoraConfig(
        r=4, target_modules=list(family.linear), task_type=family.task or None, fan_in_fan_out=name == "GPT-2"
    )

    def results(model, inputs):
        model.zero_grad()
        out = model(**inputs)
        out.loss.backward()
        grads = {f"{name.split('.')[-3]}:{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"logits": out.logits.detach().clone(), **grads}

    draws = []
    for seed in range(3):
        base, inputs = family.build(seed)
        plain = get_peft_model(base, config)
        fill_adapters(plain, seed)
        ours = accelerate(copy.deepcopy(plain), verbose=False, group=False)  # no gated MLP whole
        found = form_groups(ours)
        double = {key: v.double() if v.is_floating_point() else v for key, v in inputs.items()}
        truth, expected = results(copy.deepcopy(plain).double(), double), results(plain, inputs)
        for _ in range(2):  # layer by layer, then together
            draws.append(errors(results(ours, inputs), expected, truth, torch.float32))
            assert groups._aside.made is None
    assert fault(draws, torch.float32) is None, fault(draws, torch.float32)
    assert sorted({" + ".join(run) for group in found for run in group.together()}) == TOGETHER[name]


def test_a_forward_shows_who_reads_what_and_the_next_ones_run_together(counted):
    model = adapted()
    first = gradients(model, example())
    assert counted == [1] * 8
    assert all("one by one" in group.describe() for group in groups_of(model))
    counted.clear()
    same(gradients(model, example()), first)
    assert counted == [3, 1, 3, 1]
    assert groups_of(model)[0].together() == (("q", "k", "v"),)
    assert groups_of(model)[0].describe().endswith("layers.0: q + k + v in one call")


@pytest.mark.parametrize("order", ["vkq", "kqv"])
def test_any_order(counted, order):
    model = learned(adapted())
    expected = gradients(model, example())
    for layer in model.base_model.model.layers:
        layer.order = order
    counted.clear()
    same(gradients(model, example()), expected)
    assert counted == [3, 1, 3, 1]


def test_one_mask_for_all_siblings_and_the_gradients_of_that_mask():
    p, rows = 0.4, 512
    model = learned(adapted(Stack(1), p=p, r=8))
    block, x = attention(model), example(rows=rows)
    torch.manual_seed(3)
    outputs = [block.q(x), block.k(x), block.v(x)]
    torch.manual_seed(3)
    keep = generator_keep_mask(dropout_seed(None, x.device), p, rows, K)
    assert abs(keep.mean() - (1 - p)) < 4 * (p * (1 - p) / keep.numel()) ** 0.5
    upstream = [torch.randn(y.shape, generator=torch.Generator().manual_seed(5)) for y in outputs]

    def explicit(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *(w for n in "qkv" for w in adapter(block, n)))]
        made = []
        for i, name in enumerate("qkv"):
            base, (A, B) = getattr(block, name).base_layer, leaves[1 + 2 * i : 3 + 2 * i]
            XA = (leaves[0] * keep.to(dtype) / (1 - p)) @ A.t()
            made.append(
                nn.functional.linear(leaves[0], base.weight.to(dtype), base.bias.to(dtype)) + XA @ B.t() * (8 / 8)
            )
        grads = torch.autograd.grad(made, leaves, [u.to(dtype) for u in upstream])
        return [*(y.detach() for y in made), *grads]

    leaves = [x, *(w for name in "qkv" for w in adapter(block, name))]
    got = [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, upstream)]
    for i, (ours, plain, truth) in enumerate(zip(got, explicit(torch.float32), explicit(torch.float64), strict=True)):
        assert_close(ours, plain, truth, what=str(i))


def adapter(block, name):
    layer = getattr(block, name)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def test_masks_of_many_calls_average_to_no_dropout():
    model = learned(adapted(Stack(1), p=0.3))
    block, x = attention(model), example(rows=1)
    with torch.no_grad():
        drawn = torch.stack([torch.cat([block.q(x), block.k(x), block.v(x)], 1)[0] for _ in range(2000)])
        expected = torch.cat([layer(x) for layer in (block.eval().q, block.k, block.v)], 1)[0]
    error = (drawn.mean(0) - expected) / (drawn.std(0) / 2000**0.5)
    assert error.abs().max() < 5
    assert drawn.std(0).min() > 1e-3


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


def with_another(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q", "v", "k"]))
    fill_adapters(model)


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


@pytest.mark.parametrize("case", ["merged", "disabled", "hook", "pre_hook", "patched", "deep_hook"])
def test_a_sibling_in_another_state_goes_alone(counted, case):
    model, twin = twins()
    seen = []
    for m in (model, twin):
        layer = attention(m).k
        if case == "merged":
            layer.merge()
        elif case == "disabled":
            layer.enable_adapters(False)
        elif case == "hook":
            layer.register_forward_hook(lambda module, args, y: 2 * y)
        elif case == "pre_hook":
            layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        elif case == "patched":
            layer.forward = lambda x, old=layer.forward: old(x) + 1
        else:
            layer.lora_A["default"].register_forward_hook(lambda module, args, y: seen.append(1))
    counted.clear()
    same(gradients(model, example()), gradients(twin, example()))
    assert counted[:2] == [2, 1]
    assert bool(seen) == (case == "deep_hook")


def test_only_siblings_of_one_dropout_share_a_mask(counted):
    model = learned(adapted(p=0.3))
    attention(model).k.eval()
    counted.clear()
    model(example())
    assert counted == [2, 1, 1, 3, 1]
    attention(model).k.train().lora_dropout["default"].p = 0.4
    counted.clear()
    model(example())
    assert counted == [2, 1, 1, 3, 1]


def test_adapters_of_their_own_rank_and_dtype(counted):
    model, twin = twins(rank_pattern={"k": 2}, alpha_pattern={"v": 3})
    counted.clear()
    same(gradients(model, example()), gradients(twin, example()))
    assert counted[0] == 3
    for m in (model, twin):
        for part in (attention(m).v.lora_A, attention(m).v.lora_B):
            part["default"].double()
    counted.clear()
    same(gradients(model, example()), gradients(twin, example()))
    assert counted[:2] == [2, 1]


def test_several_active_adapters_run_together(counted):
    def both(model):
        with_another(model)
        model.base_model.set_adapter(["default", "other"])

    model, twin = twins(both)
    counted.clear()
    same(gradients(model, example()), gradients(twin, example()))
    assert counted[:4] == [3, 1, 3, 1]


def test_a_layer_that_is_two_siblings_at_once(counted):
    """Values that are the keys: one module, called twice with one tensor."""
    model, twin = adapted(), adapted(group=False)
    for m in (model, twin):
        for layer in m.base_model.model.layers:
            layer.order = "qkkv"
    for _ in range(4):
        counted.clear()
        same(gradients(model, example()), gradients(twin, example()))
    assert counted[:4] == [2, 1, 1, 1]  # q with v; k alone, twice; o


def test_siblings_under_two_parents_have_one_group():
    def share(model):
        blocks = model.base_model.model.layers
        blocks[1].q = blocks[0].q
        form_groups(model)

    model, twin = twins(share)
    assert [group.names for group in groups_of(model)] == [("q", "k", "v", "o"), ("k", "v", "o")]
    for _ in range(4):
        same(gradients(model, example()), gradients(twin, example()))


def test_inputs_that_are_not_shared_are_not_grouped(counted):
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(K, K), nn.Linear(K, K)

        def forward(self, x):
            return self.k(self.q(x))

    model = adapted(Apart())
    for _ in range(6):
        model(example())
    assert set(counted) == {1}
    assert groups_of(model)[0].describe().endswith("read inputs apart")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_checkpointing_repeats_what_ran(reentrant, p, counted):
    model, twin = adapted(p=p), adapted(p=p)
    model.base_model.model.reentrant = reentrant
    for step in range(4):
        counted.clear()
        x = example(step)
        if p and reentrant and step == 1:  # the last round runs with dropout, as the first one did
            assert groups_of(model)[0].reads.partners is None
        same(gradients(model, x, step), gradients(twin, x, step))
    assert 3 in counted
    assert groups._aside.made is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forwards_before_the_first_backward_with_checkpointing(reentrant):
    """Nothing may be learned between a forward and its recomputation: the masks would be others."""
    model, twin = adapted(p=0.4), adapted(p=0.4, group=False)
    for m in (model, twin):
        m.base_model.model.reentrant = reentrant
    for round_ in range(3):
        results = []
        for m in (model, twin) if round_ == 0 else (model,):
            m.zero_grad()
            torch.manual_seed(round_)
            (m(example(1)).square().sum() + 2 * m(example(2)).square().sum()).backward()
            results.append({name: q.grad.clone() for name, q in m.named_parameters() if q.grad is not None})
        same(results[0], results[-1], 0)
    assert groups_of(model)[0].together()


def test_compiled_in_one_graph_without_recompiling():
    from torch._dynamo.testing import CompileCounterWithBackend

    model = learned(adapted())
    expected = gradients(model, example())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            same({k.removeprefix("_orig_mod."): v for k, v in gradients(compiled, example()).items()}, expected)
    names = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert sum("autograd_function_apply" in name for name in names) == 4  # q + k + v, and o, of two blocks
    assert all(group.traced is None for group in groups_of(model))
    with torch.no_grad():
        torch.testing.assert_close(compiled(example()), expected["y"])


def test_compiled_scalings_and_inputs_that_differ_from_what_was_learned():
    from torch._dynamo.testing import CompileCounterWithBackend

    model = learned(adapted(Stack(1)))
    block = attention(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for scaling in (0.5, 0.7, 0.9, 1.1):
        for layer in (block.q, block.k, block.v, block.o):
            layer.scaling["default"] = scaling
        torch.testing.assert_close(compiled(example()), model(example()))
    assert counter.frame_count == 2
    x, context = example(), example(1)
    torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x, context), block(x, context))


def test_compiled_before_anything_was_learned():
    model = adapted()
    expected = gradients(adapted(group=False), example())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        got = gradients(compiled, example())
        same({k.removeprefix("_orig_mod."): v for k, v in got.items()}, expected)
    learned(model)
    same({k.removeprefix("_orig_mod."): v for k, v in gradients(compiled, example()).items()}, expected)


def test_a_graph_break_between_siblings():
    model = learned(adapted())
    expected = gradients(model, example())
    for layer in model.base_model.model.layers:
        layer.between = lambda x: torch._dynamo.graph_break()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for seed in (0, 1, 0):
        got = gradients(compiled, example(seed))
        if seed == 0:
            same({k.removeprefix("_orig_mod."): v for k, v in got.items()}, expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("knows", [True, False])
def test_copies_are_whole_and_independent(how, knows, counted):
    model = learned(adapted()) if knows else adapted()
    expected = gradients(adapted(group=False), example())
    for layer in model.base_model.model.layers:
        del layer.between  # a lambda does not pickle
    twin = copied(model, how)
    for m in (model, twin):
        for layer in m.base_model.model.layers:
            layer.between = lambda x: None
    pairs = list(zip(groups_of(model), groups_of(twin), strict=True))
    assert len(pairs) == 2
    for old, new in pairs:
        assert old is not new
        assert old.reads.partners == new.reads.partners
        assert all(a() is not b() for a, b in zip(old.layers, new.layers, strict=True))
    with torch.no_grad():
        for q in model.parameters():
            q.zero_()
    counted.clear()
    for _ in range(2):
        same(gradients(twin, example()), expected)
    assert counted[:4] == ([3, 1, 3, 1] if knows else [1, 1, 1, 1])
    assert counted[-4:] == [3, 1, 3, 1]
    assert len(form_groups(twin)) == 2


def copied(thing, how):
    if how == "deepcopy":
        return copy.deepcopy(thing)
    if how == "pickle":
        return pickle.loads(pickle.dumps(thing))
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_layer_does_not_drag_its_siblings_along(how, counted):
    model = learned(adapted())
    layer = attention(model).k
    twin = copied(layer, how)
    assert sum(ref is not None for ref in twin.__dict__["_lora_group"].group.layers) == 1
    counted.clear()
    torch.testing.assert_close(twin(example()), layer(example()))
    assert counted == [1, 3]


def test_a_replica_goes_alone(counted):
    model = learned(adapted())
    block = attention(model)
    replica = block.k._replicate_for_data_parallel()
    replica._modules, replica._parameters = dict(block.k._modules), dict(block.k._parameters)
    counted.clear()
    torch.testing.assert_close(replica(example()), copy.copy(block.k)(example()))
    assert counted == [1, 1]


def test_a_sibling_taken_out_of_the_model(counted):
    model = learned(adapted())
    block = attention(model)
    block.k = nn.Linear(K, 8)
    gc.collect()
    counted.clear()
    model(example())
    assert counted == [2, 1, 3, 1]
    assert form_groups(model)[0].names == ("q", "v", "o")


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


def test_a_recomputation_that_stops_early_is_no_sign_of_other_readers(counted):
    model = learned(adapted())
    block = attention(model)

    def body(x):
        h = x.tanh()
        return block.q(h).sin().sum() + block.k(h).sum() + block.v(h).sum()

    for _ in range(3):
        counted.clear()
        (
            checkpoint(body, example(), use_reentrant=False) + checkpoint(body, example(1), use_reentrant=False)
        ).backward()
        assert counted == [3, 3, 3, 3]


def test_generate_with_a_cache(counted):
    for name in ("Llama", "T5"):
        family = FAMILIES[name]
        base, inputs = family.build()
        plain = get_peft_model(base, LoraConfig(r=4, target_modules=list(family.linear), task_type=family.task))
        fill_adapters(plain)
        ours = accelerate(copy.deepcopy(plain), verbose=False)
        form_groups(ours)
        inputs.pop("labels")
        for m in (plain.eval(), ours.eval()):
            m.generation_config.pad_token_id = 0
        expected = plain.generate(**inputs, max_new_tokens=6, do_sample=False)
        for _ in range(2):
            assert torch.equal(ours.generate(**inputs, max_new_tokens=6, do_sample=False), expected)
        assert set(counted) == {1}  # on a CPU nothing is saved without gradients and without dropout
        inputs["labels"] = inputs["input_ids"]
        ours(**inputs)
        assert 3 in counted
        counted.clear()


def test_formed_again_dissolved_and_late_layers():
    model = adapted()
    before = groups_of(model)
    assert [g is h for g, h in zip(form_groups(learned(model)), before, strict=True)] == [True, True]
    assert before[0].reads.partners is not None
    dissolve(model)
    assert groups_of(model) == []
    assert all("_lora_group" not in vars(module) for module in model.modules())
    part = get_peft_model(Stack(), LoraConfig(target_modules=["q"]))
    accelerate(part, verbose=False)
    assert form_groups(part) == []
    part.add_adapter("more", LoraConfig(target_modules=["v", "k"]))
    part.base_model.set_adapter(["default", "more"])
    accelerate(part, verbose=False)
    assert [group.names for group in form_groups(part)] == [("q", "k", "v")] * 2
    block = attention(part)
    block.k, block.v = nn.Linear(K, 8), nn.Linear(K, 8)
    assert [group.names for group in form_groups(part)] == [("q", "k", "v")]
    assert "_lora_group" not in vars(block.q)
