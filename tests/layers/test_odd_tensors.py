"""The package's own layers over weights of inference mode and of the meta device, and inputs of other layouts."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.errors import ShapeError


def linear(N=8, K=16):
    return nn.Linear(K, N)


BUILD = {
    "LoRALinear": lambda p=0.0: lk.LoRALinear.from_linear(linear(), lk.LoRAConfig(r=2, lora_dropout=p)),
    "DoRALinear": lambda p=0.0: lk.DoRALinear.from_linear(linear(), lk.LoRAConfig(r=2, lora_dropout=p)),
    "LoRAQKV": lambda p=0.0: lk.LoRAQKV.from_linears(linear(), linear(), linear(), lk.LoRAConfig(r=2, lora_dropout=p)),
    "unpacked": lambda p=0.0: lk.LoRAGateUp.from_linears(
        linear(), linear(), lk.LoRAConfig(r=2, lora_dropout=p), pack=False
    ),
    "LoRAMLP": lambda p=0.0: lk.LoRAMLP.from_linears(
        linear(40), linear(40), linear(16, 40), lk.LoRAConfig(r=2, lora_dropout=p)
    ),
    "pissa": lambda p=0.0: lk.LoRALinear.from_linear(
        linear(), lk.LoRAConfig(r=2, lora_dropout=p, init_lora_weights="pissa")
    ),
    "apply_lora": lambda p=0.0: lk.apply_lora(
        nn.Sequential(linear()), lk.LoRAConfig(r=2, lora_dropout=p, target_modules=["0"])
    ),
}


def total(y):
    return y.square().sum() if isinstance(y, torch.Tensor) else sum(one.square().sum() for one in y)


def normal(layer):
    """The layer with every Parameter a clone made outside of inference mode."""
    other = copy.deepcopy(layer)
    for module, twin in zip(layer.modules(), other.modules(), strict=True):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                twin._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    return other


@pytest.mark.parametrize("where", ["the base", "all of it"])
@pytest.mark.parametrize("name", BUILD)
def test_weights_of_inference_mode(name, where, monkeypatch):
    """Training, inference and every method of the layer, as with any other weights."""
    torch.manual_seed(0)
    if where == "the base":
        monkeypatch.setitem(globals(), "linear", torch.inference_mode()(linear))
    with torch.inference_mode(where == "all of it"):
        layer = BUILD[name]()
    for parameter in layer.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(0.1)
    twin = normal(layer)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    for wants in (True, False):
        results = []
        for one in (layer, twin):
            one.zero_grad()
            X = x.clone().requires_grad_(wants)
            loss = total(one(X))
            loss.backward()
            results.append([loss.detach(), X.grad, *(p.grad for p in one.parameters() if p.requires_grad)])
        for got, expected in zip(*results, strict=True):
            assert got is expected is None or torch.equal(got, expected)
    with torch.no_grad():
        assert torch.equal(total(layer(x)), total(twin(x)))
    with torch.inference_mode():
        assert torch.equal(total(layer(x)), total(twin(x)))
    for module in [m for m in layer.modules() if isinstance(m, lk.LoRALinear)]:
        module.merge()
        module.unmerge()
    layer.load_state_dict(twin.state_dict())
    assert torch.equal(total(copy.deepcopy(layer)(x)), total(twin(x)))
    layer.double()(x.double())


def test_the_memory_of_a_base_of_inference_mode_is_shared():
    with torch.inference_mode():
        base = nn.Linear(16, 8)
    layer = lk.LoRALinear.from_linear(base, r=2)
    assert layer.weight.data_ptr() == base.weight.data_ptr()
    assert layer.bias.data_ptr() == base.bias.data_ptr()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize("name", [name for name in BUILD if name != "pissa"])
def test_on_the_meta_device(name, default, p):
    """Shapes and gradients' shapes come out; to_empty gives a layer that runs."""
    if default:
        torch.set_default_device("meta")
    try:
        with torch.device("meta"):
            layer = BUILD[name](p)
        x = torch.randn(3, 16, device="meta")
        y = layer(x)
        total(y).backward()
        with torch.no_grad():
            layer(x)
        shapes = [p.grad.shape for p in layer.parameters() if p.requires_grad]
        assert shapes == [p.shape for p in layer.parameters() if p.requires_grad]
        real = copy.deepcopy(layer).to_empty(device="cpu")
        for parameter in real.parameters():
            parameter.data.fill_(0.1)
        found = real(torch.ones(3, 16, device="cpu"))
    finally:
        torch.set_default_device(None)
    for one, other in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (y, found)), strict=True):
        assert (one.device.type, other.device.type) == ("meta", "cpu")
        assert one.shape == other.shape
    total(found).backward()


@pytest.mark.parametrize("name", BUILD)
def test_layers_of_the_cpu_while_another_device_is_the_default(name):
    torch.manual_seed(0)
    layer, x = BUILD[name](0.5), torch.randn(3, 16)
    torch.set_default_device("meta")
    try:
        loss = total(layer(x))
        loss.backward()
    finally:
        torch.set_default_device(None)
    assert loss.device.type == "cpu"


ODD = {
    "nested": lambda: torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(2, 16)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(2, 16)], layout=torch.jagged),
    "coo": lambda: torch.randn(3, 16).relu().to_sparse(),
    "csr": lambda: torch.randn(3, 16).relu().to_sparse_csr(),
    "mkldnn": lambda: torch.randn(3, 16).to_mkldnn(),
    "scalar": lambda: torch.tensor(1.0),
    "complex": lambda: torch.randn(3, 16, dtype=torch.complex64),
    "integers": lambda: torch.ones(3, 16, dtype=torch.int64),
    "quantised": lambda: torch.quantize_per_tensor(torch.randn(3, 16), 0.1, 0, torch.qint8),
    "float8": lambda: torch.randn(3, 16).to(torch.float8_e4m3fn),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR", "ignore:.*quantize")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", BUILD)
def test_inputs_of_other_kinds_are_refused_in_a_sentence(name, odd, grad):
    layer = BUILD[name]()
    with torch.set_grad_enabled(grad), pytest.raises(ShapeError, match=r"X|dtype"):
        layer(ODD[odd]())


STRIDES = {
    "expanded": lambda: torch.randn(1, 16).expand(4, 16),
    "overlapping": lambda: torch.randn(40).as_strided((5, 16), (2, 1)),
    "transposed": lambda: torch.randn(16, 6).t(),
    "channels_last": lambda: torch.randn(2, 4, 3, 16).to(memory_format=torch.channels_last),
    "no rows": lambda: torch.randn(0, 16),
    "no sequences": lambda: torch.randn(0, 5, 16),
    "negated view": lambda: torch.randn(3, 16, dtype=torch.complex64).conj().imag,
    "buffer": lambda: nn.Buffer(torch.randn(3, 16)),
    "subclass": lambda: torch.randn(3, 16).as_subclass(Sub),
}


class Sub(torch.Tensor):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("odd", STRIDES)
@pytest.mark.parametrize("name", BUILD)
def test_inputs_of_other_strides(name, odd):
    torch.manual_seed(0)
    layer, x = BUILD[name](), STRIDES[odd]()
    torch.testing.assert_close(total(layer(x)), total(layer(x.as_subclass(torch.Tensor).clone().contiguous())))
