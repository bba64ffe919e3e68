"""DoRALinear and use_dora through apply_lora, files, merging and PEFT."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lora_kernels as lk
from lora_kernels.check.compat.families import fill_adapters
from lora_kernels.reference import weight_norm as norms
from lora_kernels.testing import Pool, assert_close

X = torch.randn(300, 48, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(48, 64), nn.Linear(64, 40, bias=False)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def settings(**more):
    return {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["first", "second"], **more}


def stir(model, seed=0):
    """Adapters as large as the base and magnitudes that differ from the norms, in PEFT's model or ours."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=gen) * 0.2)
            if "magnitude" in name:
                parameter.mul_(torch.rand(parameter.shape, generator=gen) * 1.5 + 0.5)
    return model


def ours(**more):
    return stir(lk.apply_lora(Net(), lk.LoRAConfig(**settings(**more))))


def test_starts_as_its_base():
    linear = nn.Linear(20, 30)
    x = torch.randn(5, 20)
    for init in (True, "gaussian", "pissa", "olora"):
        layer = lk.DoRALinear.from_linear(copy.deepcopy(linear), lk.LoRAConfig(init_lora_weights=init))
        torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)
    layer = lk.DoRALinear(20, 30, r=4)
    torch.testing.assert_close(layer.lora_magnitude_vector.detach(), layer.weight.norm(dim=1))
    stir(layer).reset_lora_parameters()
    torch.testing.assert_close(layer.lora_magnitude_vector.detach(), layer.weight.norm(dim=1))


@pytest.mark.parametrize("init", [True, "gaussian", "pissa", "olora"])
def test_peft_reads_what_we_write(tmp_path, init):
    model = ours(init_lora_weights=init, rank_pattern={"second": 3}).eval()
    lk.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(Net(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(X), theirs(X), rtol=1e-4, atol=1e-5)
        again = lk.load_adapter(Net(), tmp_path).eval()
        assert isinstance(again.first, lk.DoRALinear)
        assert torch.equal(again(X), model(X))


def test_we_read_what_peft_writes_and_learn_the_same(tmp_path):
    theirs = get_peft_model(Net(), LoraConfig(**settings(use_rslora=True)))
    fill_adapters(theirs)
    stir(theirs).save_pretrained(tmp_path)
    model = lk.load_adapter(Net(), tmp_path, trainable=True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{path}.{name}" for path in ("first", "second") for name in lk.DoRALinear.adapter_parameters
    }

    def run(model, x):
        y = model(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
        short = {n.replace("base_model.model.", "").replace(".default", "").removesuffix(".weight"): p.grad
                 for n, p in model.named_parameters() if p.grad is not None}  # fmt: skip
        return {"y": y.detach(), **short}

    truth, plain = run(copy.deepcopy(theirs).double(), X.double()), run(theirs, X)
    got, pool = run(model, X), Pool()
    assert got.keys() == plain.keys()
    for name, true in truth.items():
        pool.assert_close(got[name], plain[name], true, what="magnitude" if "magnitude" in name else name)
    pool.close()


def test_merging_folds_the_magnitude_in_and_comes_back_to_the_bit():
    model = ours().eval()
    weight = model.first.weight
    with torch.no_grad():
        before = model(X)
        lk.merge_lora(model)
        torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-4)
        assert nn.functional.linear(X, model.first.weight, model.first.bias).shape == (300, 64)
        lk.unmerge_lora(model)
        assert model.first.weight is weight
        assert torch.equal(model(X), before)


def test_a_merge_rounds_once():
    layer = stir(lk.DoRALinear(40, 60, r=4, dtype=torch.bfloat16))
    W, A, B, m = (t.detach().double() for t in (layer.weight, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    V = W + layer.scaling * B @ A
    exact = V * (m / V.norm(dim=1))[:, None]
    assert_close(layer.merged_weight(), exact.bfloat16(), exact)


def test_a_merge_that_is_not_finite_is_refused():
    layer = lk.DoRALinear(8, 6, r=2)
    with torch.no_grad():
        layer.lora_magnitude_vector[2] = float("inf")
    with pytest.raises(lk.MergeError, match="holds NaN or infinity"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(again):
    model = ours()
    model(X)
    other = again(model)
    assert torch.equal(other(X), model(X))
    stir(other, seed=3)
    assert not torch.equal(other(X), model(X))
    assert torch.equal(other(X), again(other)(X))


def test_moves_and_dtypes():
    model = ours().double()
    assert model(X.double()).dtype == torch.float64
    half = ours().bfloat16()
    assert half(X.bfloat16()).dtype == torch.bfloat16


def test_compiles_and_drops_out():
    model = ours(lora_dropout=0.5)
    torch.manual_seed(3)
    first = model(X)
    assert not torch.equal(first, model(X))
    torch.manual_seed(3)
    assert torch.equal(first, model(X))
    evaluated = model.eval()(X)
    assert torch.equal(evaluated, model(X))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), evaluated)


def test_explain_names_it():
    assert "DoRA: reference" in str(lk.explain(ours()))


def test_kinds_are_not_mixed_up(tmp_path):
    with pytest.raises(lk.ConfigError, match="DoRALinear"):
        lk.LoRALinear.from_linear(nn.Linear(4, 4), lk.LoRAConfig(use_dora=True))
    with pytest.raises(lk.ConfigError, match="DoRALinear"):
        lk.LoRAQKV.from_linears(*(nn.Linear(4, 4) for _ in "qkv"), lk.LoRAConfig(use_dora=True))
    with pytest.raises(lk.ConfigError, match="use_dora"):
        lk.LoRAConfig(use_dora="yes")
    lk.save_adapter(ours(), tmp_path)
    plain = lk.apply_lora(Net(), lk.LoRAConfig(**settings(use_dora=False)))
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(lk.AdapterFormatError, match="use_dora=True"):
        lk.load_adapter(plain, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_a_layer_that_was_exchanged_is_not_saved_as_dora(tmp_path):
    model = ours()
    model.first = lk.LoRALinear.from_linear(nn.Linear(48, 64), r=4, lora_alpha=6)
    with pytest.raises(lk.ConfigError, match="first is no longer the layer"):
        lk.save_adapter(model, tmp_path)


def test_norms_are_kept_while_nothing_changes(monkeypatch):
    layer, computed, whole = stir(lk.DoRALinear(8, 6, r=2)), [], norms.weight_norm
    monkeypatch.setattr(norms, "weight_norm", lambda *args: computed.append(1) or whole(*args))
    for _ in range(3):
        layer(torch.randn(4, 8))
    assert len(computed) == 1
    stir(layer)
    layer(torch.randn(4, 8))
    assert len(computed) == 1  # the same numbers again
    stir(layer, seed=1)
    layer(torch.randn(4, 8))
    assert len(computed) == 2


def test_together_with_others_each_runs_its_own_forward():
    layers = [stir(lk.DoRALinear(16, 12, r=2), seed) for seed in range(3)]
    x = torch.randn(5, 16)
    want = [layer(x) for layer in layers]
    together = lk.LoRAQKV.from_linears(*layers)(x)
    assert all(torch.equal(a, b) for a, b in zip(together, want, strict=True))
