"""A model of gated MLPs with meaningless names, and functions that its tests share."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels.check.compat.families import fill_adapters
from lora_kernels.integrations.peft import accelerate
from lora_kernels.integrations.peft.mlp import mlps_of
from lora_kernels.testing import Pool

K, F = 16, 40
TARGETS = ["a", "b", "c"]


class Gated(nn.Module):
    """c(silu(a(x)) * b(x)), with meaningless names."""

    def __init__(self, K=K, F=F, bias=False):
        super().__init__()
        self.c, self.b, self.a = nn.Linear(F, K, bias), nn.Linear(K, F, bias), nn.Linear(K, F, bias)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.c(self.act(self.a(x)) * self.b(x))


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
    """Return a model whose blocks run as one call, and an equal one whose layers run one by one."""
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
