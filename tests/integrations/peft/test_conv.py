"""Compares FastConv1d, 2d and 3d with PEFT's own layers: outputs, gradients, and the calls that PEFT's forward runs."""

import copy
import pickle

import peft.tuners.lora.layer
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kernels.check.compat.families import fill_adapters
from lora_kernels.integrations.peft import accelerate, decelerate
from lora_kernels.integrations.peft.conv import FastConv1d, FastConv2d, FastConv3d
from lora_kernels.testing import assert_close

CLASSES = {nn.Conv1d: FastConv1d, nn.Conv2d: FastConv2d, nn.Conv3d: FastConv3d}
pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer")


class Net(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


def pair(conv, dtype=torch.float32, autocast_adapter_dtype=True, **config):
    """Return a PEFT model and its twin whose convolution is fused."""
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 7, "target_modules": ["conv"], **config}
    model = get_peft_model(Net(conv).to(dtype), LoraConfig(**config), autocast_adapter_dtype=autocast_adapter_dtype)
    fill_adapters(model)
    twin = copy.deepcopy(model)
    layer(twin).__class__ = CLASSES[type(conv)]
    return model, twin


def layer(model):
    return model.base_model.model.conv


def example(model, M=3):
    base = layer(model).base_layer
    generator = torch.Generator().manual_seed(3)
    places = (13, 10, 7)[: len(base.kernel_size)]
    return torch.randn(M, base.in_channels, *places, generator=generator).to(base.weight.dtype)


def pass_through(model, x=None):
    """Return Y and every gradient, by name."""
    one = layer(model)
    x = (example(model) if x is None else x).detach().requires_grad_()
    Y = one(x)
    Y.backward(torch.randn(Y.shape, generator=torch.Generator().manual_seed(2)).to(Y.dtype))
    made = {"Y": Y.detach(), "dX": x.grad} | {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
    one.zero_grad()
    return made


def compare(model, twin, dtype=None):
    """Apply the error rule to Y and all gradients in the models' own dtypes; PEFT in float64 is the truth."""
    x = example(model)
    own, fused = pass_through(model, x), pass_through(twin, x)
    true = pass_through(copy.deepcopy(model).double(), x.double())
    assert fused.keys() == own.keys()
    for name, got in fused.items():
        assert got.dtype == own[name].dtype
        assert_close(got, own[name], true[name], what=name, dtype=dtype)
    assert layer(twin).why_not() is None
    assert not counted(twin)


def counted(twin):
    return layer(twin).__dict__.get("_peft_forward_calls", {})


CONVS = {
    "1d": lambda: nn.Conv1d(6, 10, 3),
    "2d": lambda: nn.Conv2d(6, 10, 3, padding=1),
    "3d": lambda: nn.Conv3d(4, 6, 3, stride=2, padding=1),
    "no bias": lambda: nn.Conv2d(6, 10, 3, bias=False),
    "patches": lambda: nn.Conv2d(3, 16, 4, stride=4),
    "rectangular": lambda: nn.Conv2d(6, 10, (1, 3), stride=(2, 1), padding=(0, 1)),
    "same": lambda: nn.Conv2d(6, 10, 5, padding="same"),
    "valid": lambda: nn.Conv1d(6, 10, 3, padding="valid"),
    "groups": lambda: nn.Conv2d(8, 12, 3, groups=4),
    "dilated pointwise": lambda: nn.Conv2d(6, 10, 1, dilation=2),
}


@pytest.mark.parametrize("name", CONVS)
def test_as_peft_by_the_error_rule(name):
    compare(*pair(CONVS[name]()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["1d", "2d", "groups"])
def test_16_bit_by_the_error_rule(name, dtype):
    compare(*pair(CONVS[name](), dtype, autocast_adapter_dtype=False))


def test_float32_adapters_of_a_16_bit_base_are_rounded_as_under_autocast():
    model, twin = pair(CONVS["2d"](), torch.bfloat16)
    x = example(model)
    with torch.autocast("cpu", torch.bfloat16):
        own = pass_through(model, x)
    fused, true = pass_through(twin, x), pass_through(copy.deepcopy(model).double(), x.double())
    assert layer(twin).lora_A["default"].weight.dtype == torch.float32
    for name, got in fused.items():
        assert_close(got, own[name], true[name], what=name, dtype=torch.bfloat16)


def test_autocast():
    model, twin = pair(CONVS["2d"]())
    x = example(model)
    with torch.autocast("cpu", torch.bfloat16):
        own, fused = pass_through(model, x), pass_through(twin, x)
    true = pass_through(copy.deepcopy(model).double(), x.double())
    for name, got in fused.items():
        assert_close(got, own[name], true[name], what=name, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["2d", "no bias", "groups"])
def test_lora_bias_and_a_trainable_base_bias(name):
    model, twin = pair(CONVS[name](), lora_bias=True)
    for each in (model, twin):
        layer(each).lora_B["default"].bias.data.normal_(generator=torch.Generator().manual_seed(1))
        if name == "2d":
            layer(each).base_layer.bias.requires_grad_(True)
    compare(model, twin)


def test_several_adapters_and_a_changed_scale():
    model, twin = pair(CONVS["2d"]())
    for each in (model, twin):
        torch.manual_seed(4)
        each.add_adapter("other", LoraConfig(r=3, target_modules=["conv"], use_rslora=True, lora_bias=True))
        fill_adapters(each, 1)
        each.base_model.set_adapter(["default", "other"])
        layer(each).set_scale("default", 0.3)
    compare(model, twin)


def test_dropout_is_pefts_in_the_mean_and_none_in_eval():
    """The mean over masks converges to the layer without dropout: 600 masks leave a 25th of one mask's error."""
    model, twin = pair(CONVS["2d"](), lora_dropout=0.5)
    x = example(model)
    torch.manual_seed(0)
    with torch.no_grad():
        one = layer(twin)(x)
        mean = torch.stack([layer(twin)(x) for _ in range(600)]).mean(0)
        model.eval()
        twin.eval()
        exact = layer(model)(x)
        torch.testing.assert_close(layer(twin)(x), exact)
    assert (mean - exact).norm() < 0.06 * (one - exact).norm()
    assert not counted(twin)


@pytest.mark.parametrize("channels_last", [False, True])
def test_dropout_keeps_xa_and_a_seed(channels_last):
    _, twin = pair(nn.Conv2d(16, 32, 3), lora_dropout=0.1)
    x = torch.randn(2, 16, 20, 20)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    known, kept = {t.untyped_storage().data_ptr() for t in (x, *twin.parameters())}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(twin)(x)
    assert sum(kept.values()) == 2 * 4 * 18 * 18 * 4 + 16


def trainable_base(one):
    one.base_layer.weight.requires_grad_(True)


def hooked_base(one):
    one.base_layer.register_forward_hook(lambda module, args, output: 2 * output)


def hooked_a(one):
    one.lora_A["default"].register_forward_hook(lambda module, args, output: 2 * output)


def disabled(one):
    one.enable_adapters(False)


@pytest.mark.parametrize("change", [trainable_base, hooked_base, hooked_a, disabled])
def test_states_that_stay_pefts(change):
    model, twin = pair(CONVS["2d"]())
    for each in (model, twin):
        change(layer(each))
    own, fused = pass_through(model), pass_through(twin)
    assert own.keys() == fused.keys()
    for name in own:
        assert torch.equal(fused[name], own[name])
    assert layer(twin).why_not() is not None
    assert list(counted(twin)) == [layer(twin).why_not()]
    assert "PEFT's own forward" in layer(twin).describe()[3]


@pytest.mark.parametrize(
    ("conv", "config", "reason"),
    [
        (lambda: nn.Conv2d(6, 10, 3, padding=1, padding_mode="reflect"), {}, "padding_mode is 'reflect'"),
        (lambda: nn.Conv2d(6, 10, 4, padding="same"), {}, "wider on one side"),
        (CONVS["2d"], {"use_dora": True}, "DoraConv2dVariant"),
    ],
    ids=["reflect", "same", "dora"],
)
def test_kinds_that_stay_pefts(conv, config, reason):
    model, twin = pair(conv(), **config)
    assert reason in layer(twin).why_not()
    own, fused = pass_through(model), pass_through(twin)
    assert all(torch.equal(own[name], fused[name]) for name in own)


def test_a_dilated_base_fails_as_peft_does():
    model, twin = pair(nn.Conv2d(6, 10, 3, dilation=2))
    assert "lora_A's dilation is (1, 1)" in layer(twin).why_not()
    messages = []
    for each in (model, twin):
        with pytest.raises(RuntimeError) as failed:
            layer(each)(example(each))
        messages.append(str(failed.value))
    assert messages[0] == messages[1]


def test_adapters_with_dropout_or_groups_stay_apart():
    for conv, config, reason in (
        (CONVS["2d"](), {"lora_dropout": 0.5}, "a dropout each"),
        (CONVS["groups"](), {}, "grouped convolution"),
    ):
        _, twin = pair(conv, **config)
        twin.add_adapter("other", LoraConfig(r=4, target_modules=["conv"], **config))
        twin.base_model.set_adapter(["default", "other"])
        assert reason in layer(twin).why_not()


def test_inputs_without_a_batch_or_with_other_channels_are_pefts():
    model, twin = pair(CONVS["2d"]())
    x = example(model)
    for one in (x[0], x[0, :, :6]):  # the second has as many rows as channels
        assert torch.equal(layer(twin)(one), layer(model)(one))
    with pytest.raises(RuntimeError, match="channels"):
        layer(twin)(x[:, 1:])
    names = ["default", "__base__", "default"]
    got, expected = (layer(each)(x, adapter_names=names) for each in (twin, model))
    assert torch.equal(got, expected)
    assert [why.split()[0] for why in counted(twin)] == ["its", "its", "its", "adapter_names"]


def test_merged_and_unmerged():
    model, twin = pair(CONVS["2d"]())
    x = example(model)
    layer(twin).merge()
    assert "merged" in layer(twin).why_not()
    torch.testing.assert_close(layer(twin)(x), layer(model)(x), rtol=1e-4, atol=1e-5)
    layer(twin).unmerge()
    assert layer(twin).why_not() is None


@pytest.mark.parametrize("name", ["1d", "2d", "3d"])
def test_accelerate_and_decelerate(name):
    conv = CONVS[name]()
    model, twin = pair(conv)
    accelerate(model, strict=True, verbose=False)
    assert f"lora.{type(conv).__name__}(" in repr(layer(model))
    assert type(layer(model)) is CLASSES[type(conv)]
    x = example(model)
    assert torch.equal(layer(model)(x), layer(twin)(x))
    for other in (copy.deepcopy(layer(model)), pickle.loads(pickle.dumps(layer(model)))):
        assert type(other) is CLASSES[type(conv)]
        assert torch.equal(other(x), layer(twin)(x))
    own = getattr(peft.tuners.lora.layer, type(conv).__name__)
    assert type(layer(decelerate(model))) is own


def test_compiles_whole():
    torch._dynamo.reset()
    model, twin = pair(CONVS["2d"]())
    compiled = torch.compile(layer(twin), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(example(model)), layer(model)(example(model)))
