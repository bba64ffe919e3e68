"""A small model whose layers read one x, with adapters as large as the base, and functions that its tests share."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels.check.compat.families import fill_adapters
from lora_kernels.integrations.peft import accelerate
from lora_kernels.integrations.peft.groups import dissolve, form_groups

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
            else:  # the siblings' input is computed inside, so that a recomputation makes another tensor
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
    """Return the output and every gradient of a forward after torch.manual_seed(seed)."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    y = model(x)
    y.square().sum().backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **named}


def twins(prepare=lambda model: None, **config):
    """Return a model whose siblings run together and an equal one whose layers run alone."""
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


def same(got, expected, limit=2e-5):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp_min(1e-3)
        assert (got[name] - value).abs().max() <= limit * scale, name


def adapter(block, name):
    layer = getattr(block, name)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def with_another(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q", "v", "k"]))
    fill_adapters(model)
