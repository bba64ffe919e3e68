"""LoRAQKV and LoRAGateUp: children under their own names, weights in one buffer, one call for all."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.errors import ConfigError
from lora_kernels.formats.side_by_side import as_one

CONFIG = lk.LoRAConfig(r=4, lora_alpha=6, init_lora_weights=False)


def linears():
    torch.manual_seed(0)
    return nn.Linear(24, 32), nn.Linear(24, 8), nn.Linear(24, 8, bias=False)


@pytest.fixture
def qkv():
    return lk.LoRAQKV.from_linears(*linears(), CONFIG)


def separately(module, x):
    return [layer(x) for layer in module.children_in_order()]


def is_packed(module):
    return as_one([layer.weight for layer in module.children_in_order()[: module.STACKED]]) is not None


def test_forward_and_gradients_are_those_of_the_children(qkv):
    x = torch.randn(2, 3, 24, requires_grad=True)
    parameters = [x, *(p for p in qkv.parameters() if p.requires_grad)]
    assert len(parameters) == 7
    results = []
    for ys in (qkv(x), separately(qkv, x)):
        loss = sum(y.square().sum() for y in ys)
        results.append([*ys, *torch.autograd.grad(loss, parameters)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_one_call_for_all(qkv, monkeypatch):
    from lora_kernels.layers import qkv as module

    calls = []
    together = module.lora_linear_stacked
    monkeypatch.setattr(module, "lora_linear_stacked", lambda *a, **k: calls.append(len(a[1])) or together(*a, **k))
    qkv(torch.randn(3, 24))
    assert calls == [3]


def test_names_and_parameters_are_the_callers():
    q, k, v = linears()
    module = lk.LoRAQKV.from_linears(query=q, key=k, value=v, config=CONFIG)
    assert [name for name, _ in module.named_children()] == ["query", "key", "value"]
    assert module.query.weight is q.weight
    assert list(module.state_dict())[:4] == ["query.weight", "query.bias", "query.lora_A", "query.lora_B"]
    gate, up = nn.Linear(24, 16), nn.Linear(24, 16)
    assert [name for name, _ in lk.LoRAGateUp.from_linears(gate, up, CONFIG).named_children()] == [
        "gate_proj",
        "up_proj",
    ]
    layers = [lk.LoRALinear.from_linear(linear, CONFIG) for linear in linears()]
    assert lk.LoRAQKV.from_linears(*layers).q_proj is layers[0]


def test_weights_lie_in_one_buffer_with_their_values():
    sources = linears()
    values = [linear.weight.detach().clone() for linear in sources]
    module = lk.LoRAQKV.from_linears(*sources, CONFIG)
    assert is_packed(module)
    assert all(torch.equal(linear.weight, value) for linear, value in zip(sources, values, strict=True))
    assert not is_packed(lk.LoRAQKV.from_linears(*linears(), CONFIG, pack=False))


def test_moves_copies_and_pickles_packed(qkv):
    x = torch.randn(5, 24)
    expected = qkv(x)
    for other in (copy.deepcopy(qkv), pickle.loads(pickle.dumps(qkv))):
        assert is_packed(other)
        assert other.q_proj.weight.data_ptr() != qkv.q_proj.weight.data_ptr()
        for a, b in zip(other(x), expected, strict=True):
            assert torch.equal(a, b)
        other.q_proj.lora_A.data.zero_()
    assert torch.equal(qkv(x)[0], expected[0])
    assert is_packed(qkv.double())
    assert qkv(x.double())[2].dtype == torch.float64
    holder = nn.ModuleList([qkv]).to(torch.bfloat16)  # from the outside, as a model is moved
    assert is_packed(holder[0])
    assert is_packed(qkv.to("meta"))


def test_state_dict_goes_out_and_in(qkv):
    other = lk.LoRAQKV.from_linears(
        *(nn.Linear(24, n, bias=n == 32 or i == 1) for i, n in enumerate((32, 8, 8))), CONFIG
    )
    other.load_state_dict(qkv.state_dict())
    x = torch.randn(5, 24)
    assert is_packed(other)
    assert all(torch.equal(a, b) for a, b in zip(other(x), qkv(x), strict=True))
    other.load_state_dict(copy.deepcopy(qkv.state_dict()), assign=True)
    assert all(torch.equal(a, b) for a, b in zip(other(x), qkv(x), strict=True))
    other.pack()
    assert is_packed(other)


def test_merged_children_run_on_their_own_and_come_back(qkv):
    x = torch.randn(5, 24)
    before = qkv(x)
    lk.merge_lora(qkv)
    for a, b in zip(qkv(x), before, strict=True):
        torch.testing.assert_close(a, b)
    qkv.double().float()  # merged weights move on their own
    lk.unmerge_lora(qkv)
    qkv.pack()
    assert is_packed(qkv)
    for a, b in zip(qkv(x), before, strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_of_children_are_called(qkv):
    seen = []
    qkv.k_proj.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    qkv(torch.randn(3, 24))
    assert seen == [(3, 8)]


def test_one_mask_for_all_and_none_in_eval():
    module = lk.LoRAQKV.from_linears(*linears(), lk.LoRAConfig(r=4, lora_dropout=0.5, init_lora_weights=False))
    x = torch.randn(5, 24)
    torch.manual_seed(3)
    first = module(x)
    torch.manual_seed(3)
    assert torch.equal(first[0], module(x)[0])
    assert not torch.equal(first[0], module(x)[0])
    with torch.no_grad():  # the same adapter, the same mask: the same update
        for name in ("lora_A", "lora_B"):
            getattr(module.v_proj, name).copy_(getattr(module.k_proj, name))
    base = nn.functional.linear(x, module.k_proj.weight, module.k_proj.bias), x @ module.v_proj.weight.T
    _, k, v = module(x)
    torch.testing.assert_close(k - base[0], v - base[1])
    module.eval()
    assert all(torch.equal(a, b) for a, b in zip(module(x), module(x), strict=True))


def test_compiles_whole(qkv):
    x = torch.randn(5, 24)
    torch._dynamo.reset()
    compiled = torch.compile(qkv, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x), qkv(x), strict=True):
        torch.testing.assert_close(a, b)


def test_what_does_not_fit_is_refused(qkv):
    q, k, v = linears()
    with pytest.raises(ConfigError, match="takes 3 linears"):
        lk.LoRAQKV.from_linears(q, k, CONFIG)
    with pytest.raises(ConfigError, match="takes 3 layers"):
        lk.LoRAQKV.from_linears(query=q, config=CONFIG)
    with pytest.raises(ConfigError, match="by position or by keyword"):
        lk.LoRAQKV.from_linears(q, k, v, value=v)
    with pytest.raises(ConfigError, match="given are Identity"):
        lk.LoRAGateUp.from_linears(nn.Identity(), k)
    with pytest.raises(ConfigError, match="in_features differ"):
        lk.LoRAGateUp.from_linears(q, nn.Linear(8, 8))
    with pytest.raises(ConfigError, match="dtype or device"):
        lk.LoRAGateUp.from_linears(q, nn.Linear(24, 8, dtype=torch.bfloat16))
    other = lk.LoRALinear.from_linear(k, lk.LoRAConfig(r=4, lora_dropout=0.3))
    with pytest.raises(ConfigError, match="lora_dropout differs"):
        lk.LoRAGateUp.from_linears(q, other)
    qkv.k_proj.lora_dropout = 0.2
    with pytest.raises(ConfigError, match="lora_dropout differs"):
        qkv(torch.randn(3, 24))


def test_repr_names_what_is_inside(qkv):
    assert "LoRAQKV(\n  packed=True\n  (q_proj): LoRALinear(" in repr(qkv)
