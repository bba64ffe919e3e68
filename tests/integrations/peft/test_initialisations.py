"""Tests every initialisation of an adapter by PEFT: the accelerated model equals plain PEFT, forward and gradients."""

import copy

import peft
import pytest
import torch
from peft import EvaConfig, LoftQConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk
from lora_kernels.check.compat.families import fill_adapters
from lora_kernels.testing import Pool

TARGETS = ["first", "second", "third"]
X = torch.randn(300, 96, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(96, 128), nn.Linear(128, 64, bias=False), nn.Linear(64, 80)

    def forward(self, x):
        return self.third(self.second(self.first(x).tanh()).tanh())


class ConvNet(Net):
    """The same with transformers' Conv1D, which stores its weight transposed."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Conv1D(128, 96), Conv1D(64, 128)
        nn.init.normal_(self.first.weight, std=0.1)
        nn.init.normal_(self.second.weight, std=0.1)


def config(init=True, **settings):
    return LoraConfig(**{"r": 8, "lora_alpha": 12, "target_modules": TARGETS, **settings}, init_lora_weights=init)


def simply(init=True, **settings):
    return lambda net: get_peft_model(net, config(init, **settings))


def eva(net):
    batches = [{"x": X * torch.linspace(2, 0.1, 96)}]  # iterates over it until the directions converge
    model = get_peft_model(net, config("eva", eva_config=EvaConfig(rho=1.5, tau=0.9)))
    initialize_lora_eva_weights(
        model,
        batches,
        forward_fn=lambda model, batch: model(**batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    return model


def on_the_cpu(weight, num_bits, reduced_rank, num_iter=1):
    """Run LoftQ's iterations over 16 even levels per row; PEFT's own, over nf4, run on a GPU only."""
    step = weight.abs().amax(1, keepdim=True) / 7
    low_rank = torch.zeros_like(weight)
    for _ in range(num_iter):
        quantized = ((weight - low_rank) / step).round().clamp(-8, 7) * step
        U, S, Vh = torch.linalg.svd(weight - quantized, full_matrices=False)
        B, A = U[:, :reduced_rank] * S[:reduced_rank].sqrt(), S[:reduced_rank].sqrt()[:, None] * Vh[:reduced_rank]
        low_rank = B @ A
    assert num_bits == 4
    return quantized.to(weight.dtype), A.contiguous(), B.contiguous()


# how the model is built, and whether its adapter starts at zero and must be filled to have an effect
STARTS = {
    "default": (Net, simply(), True),
    "random": (Net, simply(False), False),
    "gaussian": (Net, simply("gaussian"), True),
    "rsLoRA": (Net, simply(use_rslora=True), True),
    "rsLoRA with patterns": (
        Net,
        simply(use_rslora=True, rank_pattern={"second": 5}, alpha_pattern={"third": 30}),
        True,
    ),
    "PiSSA": (Net, simply("pissa"), False),
    "PiSSA, Conv1D": (ConvNet, simply("pissa"), False),
    "PiSSA, fast SVD": (Net, simply("pissa_niter_4"), False),
    "OLoRA": (Net, simply("olora"), False),
    "orthogonal": (Net, simply("orthogonal"), False),
    "LoftQ": (Net, simply("loftq", loftq_config=LoftQConfig(loftq_bits=4)), False),
    "LoftQ, three iterations": (Net, simply("loftq", loftq_config=LoftQConfig(loftq_bits=4, loftq_iter=3)), False),
    "EVA": (Net, eva, True),
    "DoRA": (Net, simply(use_dora=True), True),
    "DoRA, Conv1D": (ConvNet, simply(use_dora=True), True),
    "DoRA with rsLoRA": (Net, simply(use_dora=True, use_rslora=True), True),
    "DoRA from PiSSA": (Net, simply("pissa", use_dora=True), False),
    "DoRA from OLoRA": (Net, simply("olora", use_dora=True), False),
}


def results(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return {"y": y.detach(), "dx": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize(("net", "start", "fill"), STARTS.values(), ids=STARTS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_equals_peft_by_the_rule(net, start, fill, monkeypatch):
    monkeypatch.setattr(peft.tuners.lora.layer, "loftq_init", on_the_cpu)
    model = start(net())
    if fill:
        fill_adapters(model)
    plain, truth = results(copy.deepcopy(model), X), results(copy.deepcopy(model).double(), X.double())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    lk.accelerate(model, strict=True, verbose=False)
    got = results(model, X)
    assert got.keys() == plain.keys()
    assert sum("lora_" in name for name in got) >= (4 if start is eva else 6)  # EVA may leave a layer without ranks
    pool = Pool()
    for name, true in truth.items():
        pool.assert_close(got[name], plain[name], true, what="magnitude" if "magnitude" in name else name)
    pool.close()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
