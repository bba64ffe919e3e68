"""Gated MLPs that run whole: which blocks are found and which are not, PEFT's numbers, and what is kept."""

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from torch.nn.functional import dropout, gelu, silu
from torch.utils.checkpoint import checkpoint
from transformers.activations import SiLUActivation

import lora_kernels as lk
from lora_kernels.integrations.families import FAMILIES, fill_adapters
from lora_kernels.integrations.peft import accelerate, decelerate, mlp
from lora_kernels.integrations.peft.linear import BLOCK, projection_of
from lora_kernels.integrations.peft.mlp import GatedMLP, Names, dissolve_mlps, form_mlps, mlps_of
from lora_kernels.testing import Pool

K, F = 16, 40
TARGETS = ["a", "b", "c"]


class Gated(nn.Module):
    """c(silu(a(x)) * b(x)) under names that say nothing."""

    def __init__(self, K=K, F=F, bias=False):
        super().__init__()
        self.c, self.b, self.a = nn.Linear(F, K, bias), nn.Linear(K, F, bias), nn.Linear(K, F, bias)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.c(self.act(self.a(x)) * self.b(x))


class Swapped(Gated):
    def forward(self, hidden):
        gate = self.a(hidden)
        return self.c(gate * self.act(self.b(hidden)))


class ByHand(Gated):
    def __init__(self):
        super().__init__()
        self.act = SiLUActivation()

    def forward(self, x):
        return self.c(silu(self.a(x)) * self.b(x))


class NoActivation(Gated):
    def forward(self, x):
        return self.c(self.a(x) * self.b(x))


class Scaled(Gated):
    def forward(self, x):
        return self.c(self.act(self.a(x)) * self.b(x) * 1.0001)


class Clamped(Gated):
    def forward(self, x):
        return self.c(self.act(self.a(x).clamp(max=100.0)) * self.b(x))


class Drops(Gated):
    def forward(self, x):
        return self.c(dropout(self.act(self.a(x)) * self.b(x), 0.3, self.training))


class Residual(Gated):
    def forward(self, x):
        return x + super().forward(x)


class OnEitherSide(Gated):
    def forward(self, x):
        return self.c(self.act(self.a(x)) * self.act(self.b(x)))


class AnotherActivation(Gated):
    def forward(self, x):
        return self.c(gelu(self.a(x)) * self.b(x))


class TwoInputs(Gated):
    def forward(self, x, scale=1.0):
        return self.c(self.act(self.a(x)) * self.b(x)) * scale


class TwoOutputs(Gated):
    def forward(self, x):
        return super().forward(x), None


class Raises(Gated):
    def forward(self, x):
        raise KeyError("x")


class OwnParameter(Gated):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))


class Square(Gated):
    def __init__(self):
        super().__init__(K, K)


class Alike(Gated):
    def __init__(self):
        super().__init__()
        self.b.load_state_dict(self.a.state_dict())


class MoreChildren(Gated):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(K)


class ReadsWeight(Gated):
    def forward(self, x):
        return self.c(self.act(nn.functional.linear(x, self.a.weight)) * self.b(x))


class HalfClamped(Gated):
    def forward(self, x):
        H = self.act(self.a(x)) * self.b(x)
        return self.c(H.clamp(-10.0, 10.0) if x.dtype is torch.bfloat16 else H)


class GELU(Gated):
    def __init__(self):
        super().__init__()
        self.act = nn.GELU()


class Net(nn.Module):
    """Two blocks with residuals."""

    def __init__(self, kind=Gated, **sizes):
        super().__init__()
        self.blocks = nn.ModuleList(kind(**sizes) for _ in range(2))
        self.reentrant = None

    def forward(self, x):
        for block in self.blocks:
            y = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
            x = x + y
        return x


def plain_model(kind=Gated, p=0.0, r=4, net=None, fill=True, **config):
    torch.manual_seed(0)
    model = get_peft_model(net or Net(kind), LoraConfig(r=r, lora_dropout=p, target_modules=TARGETS, **config))
    if fill:
        fill_adapters(model)
    return model.train()


def adapted(*args, group=True, **kwargs):
    return accelerate(plain_model(*args, **kwargs), verbose=False, group=group)


def twins(*args, **kwargs):
    """A model whose blocks run whole, and one like it whose layers run one by one."""
    model = adapted(*args, **kwargs)
    assert len(mlps_of(model)) == 2
    return model, accelerate(copy.deepcopy(model), verbose=False, group=False)


def blocks(model):
    return model.base_model.model.blocks


def example(*shape):
    return torch.randn(*(shape or (3, 5)), K, generator=torch.Generator().manual_seed(1))


def gradients(model, x=None, seed=7):
    model.zero_grad()
    x = (example() if x is None else x).detach().clone().requires_grad_()
    torch.manual_seed(seed)
    y = model(x)
    (y * torch.arange(1.0, K + 1).to(y) / K).sum().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    }


def same(got, expected, limit=2e-5):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(value.abs().max().item(), 1e-3) if value.numel() else 1.0
        torch.testing.assert_close(got[name], value, rtol=0.0, atol=limit * scale, msg=name)


def by_rule(got, plain, truth, dtype=None):
    assert got.keys() == plain.keys() == truth.keys()
    pool = Pool()
    for name, value in truth.items():
        pool.assert_close(got[name], plain[name], value, what=name.rpartition("lora_")[2], dtype=dtype)
    pool.close()


@pytest.fixture
def whole(monkeypatch):
    """Dropout's p at each call for a whole block, in order."""
    seen = []

    def call(*args, dropout_p):
        seen.append(dropout_p)
        return lk.lora_mlp(*args, dropout_p=dropout_p)

    monkeypatch.setattr(mlp, "lora_mlp", call)
    return seen


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Mistral", "Gemma 2", "Phi-3", "BERT"])
def test_families_compute_what_peft_computes(name, whole):
    family = FAMILIES[name]
    base, inputs = family.build()
    config = LoraConfig(r=4, target_modules=list(family.linear), task_type=family.task)
    plain = get_peft_model(base, config)
    fill_adapters(plain)
    ours = accelerate(copy.deepcopy(plain), verbose=False)
    expected = ["gate_proj + up_proj + down_proj in one call"] * 2 * (name in ("Llama", "Qwen2", "Mistral"))
    assert [names.describe() for names in mlps_of(ours).values()] == expected

    def results(model, inputs):
        model.zero_grad()
        out = model(**inputs)
        out.loss.backward()
        return {"logits": out.logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    if expected:
        truth = results(copy.deepcopy(plain).double(), inputs)
        by_rule(results(ours, inputs), results(plain, inputs), truth)
    assert len(whole) == len(expected)


NAMES = {Gated: ("a", "b", "c", "act"), Swapped: ("b", "a", "c", "act"), ByHand: ("a", "b", "c", "act")}


@pytest.mark.parametrize(("kind", "names"), NAMES.items())
@pytest.mark.parametrize("bias", [False, True])
def test_the_gate_is_found_whatever_the_names(kind, names, bias, whole):
    net = Net(kind) if kind is ByHand else Net(kind, bias=bias)
    plain = plain_model(net=net, rank_pattern={"b": 2}, alpha_pattern={"c": 3}, lora_bias=bias)
    ours = accelerate(copy.deepcopy(plain), verbose=False)
    assert list(mlps_of(ours).values()) == [Names(*names)] * 2
    got = gradients(ours)
    assert whole == [0.0, 0.0]
    by_rule(got, gradients(plain), gradients(copy.deepcopy(plain).double(), example().double()))


DECOYS = [
    NoActivation, Scaled, Clamped, Drops, Residual, OnEitherSide, AnotherActivation, TwoInputs, TwoOutputs, Raises,
    OwnParameter, Square, MoreChildren, ReadsWeight, GELU,
]  # fmt: skip


@pytest.mark.parametrize("kind", DECOYS)
def test_what_computes_something_else_is_left_as_it_is(kind):
    model = adapted(kind)
    assert mlps_of(model) == {}
    assert {type(block) for block in blocks(model)} == {kind}
    assert not any(BLOCK in module.__dict__ for module in model.modules())


def test_what_depends_on_the_dtype_is_seen_in_the_dtype_of_the_layers():
    assert len(mlps_of(adapted(HalfClamped))) == 2
    assert mlps_of(adapted(net=Net(HalfClamped).bfloat16())) == {}


def test_gate_and_up_are_told_apart_by_the_source_not_by_their_weights():
    model = adapted(Alike, fill=False)
    assert list(mlps_of(model).values()) == [Names("a", "b", "c", "act")] * 2
    assert len(mlps_of(adapted(net=Net().to("meta"), fill=False))) == 2


def test_a_patched_block_is_left_as_it_is():
    model = plain_model()
    blocks(model)[1].forward = lambda x: x
    assert list(mlps_of(accelerate(model, verbose=False))) == ["base_model.model.blocks.0"]


def test_a_trial_leaves_no_trace():
    model = adapted(p=0.3, group=False)
    model.disable_adapter_layers()
    blocks(model)[0].a.eval()
    held = [dict(vars(module)) for module in model.modules()]
    drops = adapted(Drops, group=False)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert len(form_mlps(model)) == 2
    assert form_mlps(drops) == {}
    assert torch.equal(torch.get_rng_state(), state)
    dissolve_mlps(model)
    assert [dict(vars(module)) for module in model.modules()] == held
    assert {type(block) for block in blocks(model)} == {Gated}


def test_the_class_passes_for_the_blocks_own():
    model = adapted()
    block = blocks(model)[0]
    kind = type(block)
    assert isinstance(block, Gated)
    assert isinstance(block, GatedMLP)
    assert (kind.__name__, kind.__qualname__, kind.__module__) == ("Gated", Gated.__qualname__, Gated.__module__)
    assert kind is type(blocks(model)[1])
    assert [*model.state_dict()] == [*plain_model().state_dict()]
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain_model().named_modules()]
    assert accelerate(model, verbose=False) is model
    assert type(block) is kind


def test_group_false_and_decelerate_take_it_back(capsys):
    model = accelerate(plain_model())
    told = "lora_kernels: 2 gated MLPs run whole in training, a + b + c in one call\n"
    assert capsys.readouterr().out.endswith(told)
    assert "fused; in training a + b + c in one call" in lk.explain(model)
    for undo in (lambda m: accelerate(m, verbose=False, group=False), decelerate):
        accelerate(model, verbose=False)
        assert len(mlps_of(model)) == 2
        undo(model)
        assert mlps_of(model) == {}
        assert {type(block) for block in blocks(model)} == {Gated}
        assert "in one call" not in lk.explain(model)


def kept(model, x):
    """Bytes kept for the backward besides parameters, each storage once."""
    sizes, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    y.sum().backward()
    return sum(sizes.values())


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_half_is_kept_of_what_separate_layers_keep(p):
    model, twin = twins(p=p)
    M, r = 4096, 4
    x = example(M).requires_grad_()
    seeds = 32 * (p > 0)
    assert kept(model, x) - 4 * M * (K + 2 * F + 3 * r) * 2 <= 2 * (seeds + 16)
    assert kept(model, x) < 0.6 * kept(twin, x)
    without = accelerate(copy.deepcopy(model), verbose=False)
    dissolve_mlps(without)
    with torch.no_grad():
        for _ in range(2):
            without(x)
    assert kept(model, x) < 0.6 * kept(without, x)


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle 0": lambda model: pickle.loads(pickle.dumps(model, 0)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_run_whole_too(how, whole):
    model = adapted()
    expected = gradients(model)
    made = COPIES[how](model)
    assert type(blocks(made)[0]) is type(blocks(model)[0])
    whole.clear()
    same(gradients(made), expected, 0)
    assert whole == [0.0, 0.0]
    decelerate(made)
    assert {type(block) for block in blocks(made)} == {Gated}
    assert len(mlps_of(model)) == 2


def test_dropout_is_that_of_lora_mlp():
    model = adapted(p=0.3, net=Net())
    block, x = blocks(model)[0], example(64)
    gate, up, down = (projection_of(layer)[0] for layer in (block.a, block.b, block.c))
    torch.manual_seed(5)
    expected = lk.lora_mlp(x, gate, up, down, dropout_p=0.3)
    torch.manual_seed(5)
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_checkpoints_draw_the_same_masks_again(reentrant, p, whole):
    model = adapted(p=p)
    expected = gradients(model)
    model.base_model.model.reentrant = reentrant
    for _ in range(2):
        same(gradients(model), expected)
    assert set(whole) == {p}


def test_without_gradients_only_where_masks_are_drawn(whole):
    model, twin = twins(p=0.3)
    with torch.no_grad():
        model(example())
        assert whole == [0.3, 0.3]
        whole.clear()
        same({"y": model.eval()(example())}, {"y": twin.eval()(example())})
        assert whole == []
    model(example())
    assert whole == [0.0, 0.0]


def merged(model):
    blocks(model)[0].c.merge()


def disabled(model):
    blocks(model)[0].b.enable_adapters(False)


def another_dropout(model):
    blocks(model)[0].b.lora_dropout["default"] = nn.Dropout(1.0)
    blocks(model)[0].a.lora_A["default"].weight.data.zero_()


def another_dtype(model):
    for part in (blocks(model)[0].b.lora_A, blocks(model)[0].b.lora_B):
        part["default"].double()


def late_hook(model):
    blocks(model)[0].b.register_forward_hook(lambda module, args, y: 2 * y)


def late_hook_on_the_activation(model):
    blocks(model)[0].act.register_forward_hook(lambda module, args, y: 2 * y)


def late_hook_inside(model):
    blocks(model)[0].c.base_layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def another_activation(model):
    blocks(model)[0].act = nn.Tanh()


def replaced(model):
    blocks(model)[0].b = nn.Linear(K, F)


def parametrized(model):
    nn.utils.parametrizations.weight_norm(blocks(model)[0].a.base_layer)


def trained_base(model):
    blocks(model)[0].c.base_layer.weight.requires_grad_(True)


STATES = [merged, disabled, another_dropout, another_dtype, late_hook, late_hook_on_the_activation, late_hook_inside]


@pytest.mark.parametrize(
    "change", [*STATES, another_activation, replaced, parametrized, trained_base], ids=lambda f: f.__name__
)
def test_a_block_in_another_state_takes_its_own_forward(change, whole):
    model, twin = twins()
    for m in (model, twin):
        torch.manual_seed(4)
        change(m)
    same(gradients(model), gradients(twin))
    assert len(whole) == 1


def test_hooks_on_the_block_itself_and_calls_by_keyword(whole):
    model, twin = twins()
    for m in (model, twin):
        blocks(m)[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
        blocks(m)[0].register_forward_hook(lambda module, args, y: y + 1)
        blocks(m)[1].register_full_backward_hook(lambda module, got, given: (got[0] * 3,))
    same(gradients(model), gradients(twin))
    assert len(whole) == 2
    torch.testing.assert_close(blocks(model)[1](x=example()), blocks(twin)[1](x=example()))
    block = blocks(model)[0]
    block.forward = lambda x: x
    assert torch.equal(block(example()), 2 * example() + 1)
    assert len(whole) == 2


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (7,), (1, 1, 2)])
def test_any_number_of_rows_and_dimensions(shape, whole):
    model, twin = twins()
    x = torch.randn(*shape, K, generator=torch.Generator().manual_seed(1))
    same(gradients(model, x), gradients(twin, x))
    assert len(whole) == 2


def test_rows_that_are_not_contiguous(whole):
    model, twin = twins()
    same(gradients(model, example().mT.contiguous().mT), gradients(twin))
    assert len(whole) == 2


@pytest.mark.parametrize("case", ["all of it", "the base", "autocast"])
def test_bfloat16(case, whole):
    plain = plain_model(r=16)
    for layer in (child for block in blocks(plain) for child in (block.a, block.b, block.c)):
        {"all of it": layer, "the base": layer.base_layer, "autocast": nn.Module()}[case].to(torch.bfloat16)
    ours = accelerate(copy.deepcopy(plain), verbose=False)
    x = example(96) if case == "autocast" else example(96).bfloat16()
    truth = gradients(copy.deepcopy(plain).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        got = gradients(ours, x)
    with torch.autocast(
        "cpu", torch.bfloat16, enabled=case != "all of it"
    ):  # as fp32 adapters over 16 bits are computed
        expected = gradients(plain, x)
    assert whole == [0.0, 0.0]
    assert got["y"].dtype is expected["y"].dtype
    by_rule(got, expected, truth, dtype=torch.bfloat16)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiles_whole_and_once(p):
    torch.compiler.reset()
    model, twin = twins(p=p)
    graphs = []

    def count(graph, inputs):
        graphs.append(str(graph.code))
        return graph

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if p == 0.0:
        same(gradients(compiled), {f"_orig_mod.{n}" if "." in n else n: g for n, g in gradients(twin).items()})
    assert gradients(compiled)["y"].isfinite().all()
    counted = torch.compile(model, fullgraph=True, backend=count)
    for scaling in (2.0, 3.0, 4.0, 5.0):
        blocks(model)[0].b.scaling["default"] = scaling
        counted(example())
    assert len(graphs) <= 2
    assert len(whole_calls(graphs[0])) == 2
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(example()), model.eval()(example()))


def whole_calls(code):
    """The lines of a graph that call the fused block."""
    return [line for line in code.splitlines() if "ops.higher_order.autograd_function_apply(" in line]


def test_transforms_take_the_layers_own_forward():
    model, twin = twins()
    x = example(4)
    torch.testing.assert_close(torch.func.vmap(model)(x[:, None]), twin(x)[:, None])
    got, expected = (torch.func.grad(lambda x, m=m: m(x).sum())(x) for m in (model, twin))
    torch.testing.assert_close(got, expected)


def test_the_output_may_be_changed_in_place():
    model, twin = twins()
    x = example().requires_grad_()
    y = blocks(model)[0](x)
    y += x
    expected = blocks(twin)[0](x) + x
    torch.testing.assert_close(y, expected)
    got, want = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
    torch.testing.assert_close(got, want)


def test_adapters_that_come_and_go(whole):
    model = adapted()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["a", "c"]))
    fill_adapters(model)
    twin = accelerate(copy.deepcopy(model), verbose=False, group=False)
    steps = (
        (lambda m: m.set_adapter("other"), 0),  # up has none
        (lambda m: m.base_model.set_adapter(["default", "other"]), 2),
        (lambda m: m.set_adapter("default"), 2),
        (lambda m: m.delete_adapter("other"), 2),
    )
    for step, expected in steps:
        whole.clear()
        for m in (model, twin):
            step(m)
        same(gradients(model), gradients(twin))
        assert len(whole) == expected
    base = model.merge_and_unload()
    torch.testing.assert_close(base(example()), twin.merge_and_unload()(example()))


def test_layers_that_come_later_are_picked_up(whole):
    model = accelerate(get_peft_model(Net(), LoraConfig(r=4, target_modules=["a"])), verbose=False)
    assert mlps_of(model) == {}
    model.add_adapter("all", LoraConfig(r=4, target_modules=TARGETS))
    model.set_adapter("all")
    fill_adapters(model)
    twin = accelerate(copy.deepcopy(model), verbose=False, group=False)
    same(gradients(model), gradients(twin))
    assert len(whole) == 2


def test_distributed_data_parallel(whole):
    model, twin = twins()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        got = {name.removeprefix("module."): value for name, value in gradients(wrapped).items()}
    finally:
        distributed.destroy_process_group()
    same(got, gradients(twin))
    assert len(whole) == 2


def test_a_block_that_changed_is_given_back_at_the_next_accelerate():
    model = adapted()
    another_activation(model)
    assert list(mlps_of(accelerate(model, verbose=False))) == ["base_model.model.blocks.1"]
    assert type(blocks(model)[0]) is Gated
    assert "in one call" not in "".join(blocks(model)[0].a.describe())
