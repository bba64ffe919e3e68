"""Compares the fused DoRA forward with PEFT's own, in models and layers, and after PEFT's changes of adapters."""

import copy
import gc
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels.autograd import dora_linear as autograd
from lora_kernels.check.compat.families import FAMILIES, fill_adapters
from lora_kernels.integrations.peft import dora
from lora_kernels.integrations.peft.dora import dora_forward, is_dora, why_not_dora
from lora_kernels.ops.weight_norm import NormCache
from lora_kernels.reference import generator_keep_mask
from lora_kernels.reference import weight_norm as norms
from lora_kernels.testing import Pool, assert_close

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT sets it for Conv1D, with a warning


class Fused(Linear):
    """Run the fused forward only."""

    def forward(self, x, *args, **kwargs):
        (name,) = self.active_adapters
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        assert is_dora(self, name)
        assert why_not_dora(self, name) is None
        return dora_forward(self, name, x)


def fuse(model):
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = Fused
    return model


def fill(model, seed=0):
    """Adapters as large as the base, magnitudes from half to twice the norm."""
    fill_adapters(model, seed)
    gen = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, DoraLinearLayer):
            weight = module.weight.data
            weight.mul_((torch.rand(weight.shape, generator=gen) * 1.5 + 0.5).to(weight.dtype))
    return model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(96, 128), nn.Linear(128, 64, bias=False)
        self.third = Conv1D(80, 64)

    def forward(self, x):
        return self.third(self.second(self.first(x).tanh()).tanh())


def net(p=0.0, dtype=torch.float32, autocast_adapter_dtype=True, **settings):
    torch.manual_seed(0)
    config = LoraConfig(
        **{"r": 8, "lora_alpha": 12, "use_dora": True, "target_modules": ["first", "second", "third"], **settings},
        lora_dropout=p,
    )
    model = get_peft_model(Net().to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
    return fill(model)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def results(model, x, autocast=None):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return {"y": y.detach(), "dx": x.grad, **gradients(model)}


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "T5"])
def test_models_by_the_rule(name):
    family = FAMILIES[name]
    model, inputs = family.build()
    config = LoraConfig(use_dora=True, target_modules=list(family.linear), task_type=family.task, r=4, lora_alpha=6)
    model = fill(get_peft_model(model, config))

    def run(model, dtype):
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        out = model(**given)
        out.loss.backward()
        return {"logits": out.logits.detach(), **gradients(model)}

    fused = run(fuse(copy.deepcopy(model)), torch.float32)
    plain = run(copy.deepcopy(model), torch.float32)
    truth = run(copy.deepcopy(model).double(), torch.float64)
    assert fused.keys() == plain.keys()
    assert sum("magnitude" in key for key in fused) > 3
    pool = Pool()
    for key, true in truth.items():
        kind = next((part for part in ("lora_A", "lora_B", "magnitude") if part in key), key)
        pool.assert_close(fused[key], plain[key], true, what=kind)
    pool.close()


CASES = {
    "float32": (torch.float32, True, None),
    "bfloat16": (torch.bfloat16, False, None),
    "float16": (torch.float16, False, None),
    "float32 adapters on bfloat16": (torch.bfloat16, True, None),
    "autocast to bfloat16": (torch.float32, True, torch.bfloat16),
    "autocast of a bfloat16 base": (torch.bfloat16, True, torch.bfloat16),
}


@pytest.mark.parametrize(("dtype", "cast_adapters", "autocast"), CASES.values(), ids=CASES)
def test_dtypes_by_the_rule(dtype, cast_adapters, autocast):
    model = net(dtype=dtype, autocast_adapter_dtype=cast_adapters)
    x = torch.randn(400, 96).to(dtype)
    plain = copy.deepcopy(model) if autocast else copy.deepcopy(model).to(dtype)  # one dtype for all, as under autocast
    fused, plain = results(fuse(copy.deepcopy(model)), x, autocast), results(plain, x, autocast)
    truth = results(copy.deepcopy(model).double(), x.double())
    parameters = dict(model.named_parameters())
    pool = Pool()
    for key, true in truth.items():
        assert fused[key].dtype == (parameters[key].dtype if key in parameters else plain[key].dtype)
        kind = "magnitude" if "magnitude" in key else key
        pool.assert_close(fused[key], plain[key].to(fused[key].dtype), true, what=kind, dtype=autocast or dtype)
    pool.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_with_the_same_mask_by_the_rule(dtype, monkeypatch):
    """PEFT's model uses, by a patched dropout, the mask that is drawn here."""
    p, seed = 0.3, torch.tensor([7, 0])
    model = net(p, dtype, autocast_adapter_dtype=False)
    monkeypatch.setattr(autograd, "dropout_seed", lambda *_: seed)

    def dropout(x, p=p, training=True, inplace=False):
        return x * generator_keep_mask(seed, p, *x.shape, x.dtype) / (1 - p) if training else x

    monkeypatch.setattr(nn.functional, "dropout", dropout)
    x = torch.randn(400, 96).to(dtype)
    plain, truth = results(copy.deepcopy(model), x), results(copy.deepcopy(model).double(), x.double())
    pool = Pool()
    for key, got in results(fuse(copy.deepcopy(model)), x).items():
        pool.assert_close(got, plain[key], truth[key], what="magnitude" if "magnitude" in key else key)
    pool.close()
    for dropping in (False, True):  # PEFT applies dropout if the layer and its dropout are both in training mode
        fused = fuse(copy.deepcopy(model)).train(not dropping)
        for module in fused.modules():
            if isinstance(module, nn.Dropout):
                module.train(dropping)
        x, truth_y = torch.randn(9, 96).to(dtype), copy.deepcopy(model).double().eval()
        assert_close(fused(x).detach(), copy.deepcopy(model).eval()(x).detach(), truth_y(x.double()).detach())


def _merge_and_back(model):
    model.merge_adapter()
    model.unmerge_adapter()


def _safe_merge_and_back(model):
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()


def _train(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.enable_grad():
            model(torch.randn(8, 96)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _scale(model):
    for module in model.modules():
        if isinstance(module, Linear):
            module.set_scale("default", 3.0)


def _load(model):
    state = {name: value * 1.1 for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def _second_adapter(model):
    torch.manual_seed(4)
    model.add_adapter("other", LoraConfig(r=4, use_dora=True, target_modules=["first", "second", "third"]))
    fill(model, seed=4)
    model.set_adapter("other")


def _disable(model):
    with model.disable_adapter():
        model(torch.randn(4, 96))


CHANGES = {
    "nothing": lambda model: None,
    "merge and unmerge": _merge_and_back,
    "safe merge and unmerge": _safe_merge_and_back,
    "training": _train,
    "set_scale": _scale,
    "load_state_dict": _load,
    "another adapter": _second_adapter,
    "disabling for a while": _disable,
    "double and back": lambda model: model.double().float(),
    "bfloat16 and back": lambda model: model.bfloat16().float(),
    "written through .data": lambda model: [fill(model, seed=9), model.base_model.model.first.weight.data.mul_(1.5)],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("caching", [False, True])
def test_after_all_that_peft_does_the_same_output(change, caching, monkeypatch):
    def peft_caches(on):  # PEFT's switch since 0.19; its own stale norms must not enter the comparison
        monkeypatch.setattr("peft.tuners.lora.dora.ENABLE_DORA_CACHING", on, raising=False)

    plain = net().eval()
    fused = fuse(copy.deepcopy(plain))
    x = torch.randn(16, 96)
    for model in (plain, fused):
        peft_caches(caching and model is fused)
        with torch.no_grad():
            model(x)
            model(x)  # from the cache
            change(model)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        peft_caches(caching)
        with mode():
            got = fused(x)
        peft_caches(False)
        with torch.no_grad():
            torch.testing.assert_close(got, plain(x), rtol=1e-4, atol=1e-4)


def test_merging_is_pefts_and_agrees():
    model = fuse(net().eval())
    x = torch.randn(16, 96)
    with torch.no_grad():
        before = model(x)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), before, rtol=1e-4, atol=1e-4)


def test_norms_are_computed_once_where_nothing_changes(monkeypatch):
    model, computed, whole = fuse(net().eval()), [], norms.weight_norm

    def counted(*args):
        computed.append(1)
        return whole(*args)

    monkeypatch.setattr(norms, "weight_norm", counted)
    x = torch.randn(4, 96)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            model(x)
    assert len(computed) == 3  # one for each layer
    model.train()
    model(x)
    assert len(computed) == 3


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("on", [False, True])
def test_pefts_caching_switch_vouches_for_the_contents_in_eval_mode(on, training, monkeypatch):
    monkeypatch.setattr("peft.tuners.lora.dora.ENABLE_DORA_CACHING", on, raising=False)
    seen = []
    monkeypatch.setattr(dora, "dora_linear", lambda x, W, *_, trust, **__: seen.append(trust) or x @ W.t())
    fuse(net()).train(training)(torch.randn(4, 96))
    assert seen == [on and not training] * 3


def test_nothing_of_ours_is_left_on_the_model():
    model = fuse(net())
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    gc.collect()
    held = len(dora._norms)
    model(torch.randn(4, 96))
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    assert len(dora._norms) == held + 3
    copied = copy.deepcopy(model)
    assert len(dora._norms) == held + 3
    torch.testing.assert_close(pickle.loads(pickle.dumps(model.state_dict())), dict(copied.state_dict()))
    del model, copied
    gc.collect()
    assert len(dora._norms) == held


def test_compiles_in_one_graph():
    model = net()
    layer = model.base_model.model.second
    x = torch.randn(12, 128)
    plain = layer(x)
    layer.__class__ = Fused
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain, rtol=1e-4, atol=1e-4)
    layer.lora_B["default"].weight.data.mul_(0.5)
    torch.testing.assert_close(compiled(x), Linear.forward(layer, x), rtol=1e-4, atol=1e-4)


def refused(**settings):
    model = net(**settings)
    return model, model.base_model.model.first


def test_what_is_refused_says_why():
    model, layer = refused()
    assert why_not_dora(layer, "default") is None
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: None)
    assert "lora_magnitude_vector has forward hooks" in why_not_dora(layer, "default")

    model, layer = refused()
    _second_adapter(model)
    model.base_model.set_adapter(["default", "other"])
    assert "active together" in why_not_dora(layer, "default")

    model, layer = refused()
    layer.ephemeral_gpu_offload = True
    assert "ephemeral_gpu_offload" in why_not_dora(layer, "default")

    model, layer = refused()
    layer.fan_in_fan_out = True
    assert "fan_in_fan_out" in why_not_dora(layer, "default")

    model, layer = refused()
    layer.lora_B["default"].bias = nn.Parameter(torch.zeros(128))
    assert "lora_bias" in why_not_dora(layer, "default")

    model, layer = refused()
    layer.lora_magnitude_vector["default"].__class__ = type("Other", (DoraLinearLayer,), {})
    assert "magnitude is a Other" in why_not_dora(layer, "default")

    model, layer = refused()
    layer.lora_magnitude_vector["default"].weight = nn.Parameter(torch.ones(128, device="meta"))
    assert "meta device" in why_not_dora(layer, "default")


def test_only_dora_itself_is_taken_for_dora():
    _, layer = refused()
    assert is_dora(layer, "default")
    assert not is_dora(layer, "another")
    derived = type("Derived", (type(layer.lora_variant["default"]),), {})
    layer.lora_variant["default"] = derived()
    assert not is_dora(layer, "default")
    _, plain = refused(use_dora=False)
    assert not is_dora(plain, "default")


def test_training_goes_the_same_way():
    plain = net()
    fused = fuse(copy.deepcopy(plain))
    losses = []
    for model in (plain, fused):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        x = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
        curve = []
        for _ in range(30):
            loss = (model(x) - x[:, :80]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(float(loss.detach()))
        losses.append(curve)
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_cache_is_one_of_ours():
    model = fuse(net())
    model(torch.randn(4, 96))
    assert isinstance(dora._norms[model.base_model.model.first.lora_magnitude_vector["default"]], NormCache)
