"""Tests second derivatives, forward mode, batched gradients and torch.func of accelerated models, beside PEFT's own."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk

D = 6


class Gated(nn.Module):
    """A gated MLP, which runs as one call."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, 9), nn.Linear(D, 9), nn.Linear(9, D)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """q, k and v of one x, and a gated MLP."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.mlp = Gated()

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + self.o(torch.softmax(q @ k.mT, -1) @ v)
        return x + self.mlp(x)


class Net(nn.Module):
    """Embeddings (for ids), two blocks, a convolution."""

    def __init__(self):
        super().__init__()
        self.emb, self.conv = nn.Embedding(11, D), nn.Conv1d(D, D, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x):
        x = self.emb(x) if x.dtype == torch.int64 else x
        return self.conv(self.blocks(x).mT).mT


LINEAR = ["q", "k", "v", "o", "gate", "up", "down"]
X = torch.randn(2, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
IDS = torch.tensor([[1, 10, 3], [0, 3, 3]])


@pytest.fixture(scope="module", params=["lora", "dora"])
def models(request):
    """Return PEFT's model, and an accelerated copy whose groups and blocks are known."""
    torch.manual_seed(0)
    dora = request.param == "dora"
    targets = LINEAR if dora else [*LINEAR, "emb", "conv"]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, use_dora=dora, init_lora_weights=False)
    plain = peft.get_peft_model(Net().double(), config).train()
    fused = lk.accelerate(copy.deepcopy(plain), verbose=False)
    for _ in range(3):
        fused(X.detach().clone().requires_grad_()).sum().backward()
        fused(IDS)
    fused.zero_grad()
    return plain, fused


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def by(y, wanted, **how):
    found = torch.autograd.grad(y, wanted, allow_unused=True, materialize_grads=not how.get("is_grads_batched"), **how)
    return [T if T is not None else torch.zeros(()) for T in found]


def penalty(model, run=lambda model: model(X)):
    (dX,) = torch.autograd.grad(run(model).sum(), X, create_graph=True)
    return by(dX.square().sum(), [X, *trained(model).values()])


def two_steps(model):
    params = trained(model)
    fast = dict(params)
    for _ in range(2):
        loss = functional_call(model, fast, (IDS,)).square().mean()
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {name: p - 1e-3 * grad for (name, p), grad in zip(fast.items(), grads, strict=True)}
    return by(functional_call(model, fast, (X,)).square().mean(), list(params.values()))


def hessian_vector(model):
    params = list(trained(model).values())
    grads = torch.autograd.grad(model(IDS).square().sum(), params, create_graph=True, allow_unused=True)
    return by(sum(grad.sin().sum() for grad in grads if grad is not None), params)


def batched(model, x):
    y, wanted = model(x), list(trained(model).values())
    basis = torch.eye(y.numel(), dtype=y.dtype)[:4].reshape(4, *y.shape)
    return by(y, wanted, grad_outputs=basis, is_grads_batched=True)


def tangent(model, quiet):
    with forward_ad.dual_level(), torch.set_grad_enabled(not quiet):
        return [forward_ad.unpack_dual(model(forward_ad.make_dual(X.detach(), X.detach().cos()))).tangent]


def tangent_of_parameters(model):
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(p.detach(), p.detach().cos()) for name, p in trained(model).items()}
        return [forward_ad.unpack_dual(functional_call(model, dual, (IDS,))).tangent]


def ensemble(model):
    stacked = {name: torch.stack([p.detach(), 1.1 * p.detach()]) for name, p in trained(model).items()}
    return [torch.func.vmap(lambda params: functional_call(model, params, (IDS,)))(stacked)]


def under_hooks(model):
    with torch.autograd.graph.save_on_cpu():
        return penalty(model)


def again_and_again(model):
    loss = model(X).square().sum()
    first = torch.autograd.grad(loss, X, create_graph=True)
    return [*first, *torch.autograd.grad(loss, X, retain_graph=True), *torch.autograd.grad(loss, X)]


def reentrant(model):
    X.grad = None
    model.zero_grad()
    checkpoint(model, X, use_reentrant=True).square().sum().backward()
    return [X.grad, *(p.grad for p in trained(model).values() if p.grad is not None)]


WAYS = {
    "gradient penalty": penalty,
    "two steps of MAML": two_steps,
    "Hessian-vector product": hessian_vector,
    "is_grads_batched": lambda model: batched(model, X),
    "is_grads_batched of ids": lambda model: batched(model, IDS),
    "jacobian(vectorize=True)": lambda model: [torch.autograd.functional.jacobian(model, X, vectorize=True)],
    "forward mode": lambda model: tangent(model, False),
    "forward mode under no_grad": lambda model: tangent(model, True),
    "forward mode by parameters": tangent_of_parameters,
    "vmap over parameters": ensemble,
    "jacfwd": lambda model: [torch.func.jacfwd(model)(X.detach())],
    "jacrev": lambda model: [torch.func.jacrev(model)(X.detach())],
    "vmap over x": lambda model: [torch.func.vmap(model)(X.detach()[:, None])],
    "penalty with saved tensors on the CPU": under_hooks,
    "penalty through a checkpoint": lambda model: penalty(model, lambda m: checkpoint(m, X, use_reentrant=False)),
    "gradients of a reentrant checkpoint": reentrant,
    "three times through one graph": again_and_again,
}


@pytest.mark.parametrize("way", WAYS)
def test_what_pefts_own_layers_give(models, way):
    plain, fused = models
    want, got = WAYS[way](plain), WAYS[way](fused)
    assert any(T.abs().max() > 0 for T in want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_penalty_in_anomaly_mode(models):
    plain, fused = models
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        got = penalty(fused)
    torch.testing.assert_close(got, penalty(plain), rtol=1e-9, atol=1e-11)


def test_siblings_of_one_x_before_and_in_a_dual_level(models):
    plain, fused = models
    block, twin = fused.base_model.model.blocks[0], plain.base_model.model.blocks[0]
    x = X.detach().clone().requires_grad_()
    block.q(x)  # its siblings run in the same call
    with forward_ad.dual_level():
        name = "lora_A.default.weight"
        weight = {name: block.k.get_parameter(name).detach()}
        dual = {name: forward_ad.make_dual(weight[name], torch.ones_like(weight[name]))}
        got, want = (forward_ad.unpack_dual(functional_call(m.k, dual, (x,))).tangent for m in (block, twin))
        assert got is not None
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(block.v(x), twin.v(x))


def test_dropout_has_one_mask_in_every_derivative():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=LINEAR, lora_dropout=0.4, init_lora_weights=False)
    fused = lk.accelerate(peft.get_peft_model(Net().double(), config), verbose=False).train()
    for _ in range(3):
        fused(X)

    def gradient(x):
        torch.manual_seed(1)
        return torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)[0]

    torch.testing.assert_close(gradient(X), torch.autograd.grad(_seeded(fused).square().sum(), X)[0])
    assert torch.autograd.gradcheck(gradient, X)


def _seeded(model):
    torch.manual_seed(1)
    return model(X)
