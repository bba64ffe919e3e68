"""LoRALinear in the place of nn.Linear."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.errors import ConfigError, MergeError


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = lk.LoRALinear(24, 40, r=4, lora_alpha=8)
    nn.init.normal_(layer.lora_B)
    return layer


def expected(layer, x):
    update = layer.scaling * (x @ layer.lora_A.T) @ layer.lora_B.T
    return nn.functional.linear(x, layer.weight, layer.bias) + update


def test_forward_and_gradients(layer):
    x = torch.randn(2, 3, 24, requires_grad=True)
    torch.testing.assert_close(layer(x), expected(layer, x))
    layer(x).square().sum().backward()
    got = x.grad.clone(), layer.lora_A.grad.clone(), layer.lora_B.grad.clone()
    x.grad = layer.lora_A.grad = layer.lora_B.grad = None
    expected(layer, x).square().sum().backward()
    for a, b in zip(got, (x.grad, layer.lora_A.grad, layer.lora_B.grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert layer.weight.grad is None
    assert layer.bias.grad is None


def test_starts_as_the_base_layer():
    layer = lk.LoRALinear(24, 40, r=4)
    x = torch.randn(5, 24)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not layer.weight.requires_grad
    assert layer.lora_A.requires_grad
    assert layer.lora_B.requires_grad


def test_from_linear_shares_the_base_parameters():
    base = nn.Linear(24, 40)
    layer = lk.LoRALinear.from_linear(base, lk.LoRAConfig(r=4, lora_alpha=6, lora_dropout=0.1))
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert (layer.r, layer.scaling, layer.lora_dropout) == (4, 1.5, 0.1)
    assert lk.LoRALinear.from_linear(base, r=3, lora_alpha=9).scaling == 3.0
    assert not lk.LoRALinear.from_linear(base.eval()).training


def test_rank_stabilised_scaling():
    assert lk.LoRALinear(8, 8, r=16, lora_alpha=8, use_rslora=True).scaling == 2.0


@pytest.mark.parametrize(("dtype", "adapter"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)])
def test_adapters_of_a_16_bit_base_are_float32(dtype, adapter):
    layer = lk.LoRALinear(24, 40, dtype=dtype)
    assert layer.lora_A.dtype == adapter
    assert layer(torch.randn(3, 24, dtype=dtype)).dtype == dtype


def test_dropout_in_training_only():
    layer = lk.LoRALinear(64, 40, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), expected(layer, x))


def test_merge_and_unmerge_restore_the_very_bits(layer):
    x = torch.randn(5, 24)
    base, bits, before = layer.weight, layer.weight.detach().clone(), layer(x)
    layer.merge()
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(layer(x), before)
    assert not torch.equal(layer.weight, bits)
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged
    assert layer.weight is base
    assert torch.equal(layer.weight, bits)
    assert torch.equal(layer(x), before)


def test_a_weight_shared_with_another_module_is_left_alone_by_merge():
    base = nn.Linear(24, 24)
    layer = lk.LoRALinear.from_linear(base)
    nn.init.normal_(layer.lora_B)
    bits = base.weight.detach().clone()
    layer.merge()
    assert torch.equal(base.weight, bits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_merging_what_is_not_finite_is_refused(layer, bad):
    bits = layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_A[0, 0] = bad
    with pytest.raises(MergeError, match="left as it is"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.weight, bits)


def test_merged_layers_move_whole(layer):
    layer.merge()
    layer.double().unmerge()
    assert layer.weight.dtype == torch.float64


def test_state_dict_holds_the_base_under_its_own_names(layer):
    state = layer.state_dict()
    assert list(state) == ["weight", "bias", "lora_A", "lora_B"]
    base = nn.Linear(24, 40)
    layer.load_state_dict(base.state_dict(), strict=False)
    assert torch.equal(layer.weight, base.weight)
    layer.merge()
    assert list(layer.state_dict()) == list(state)


def test_deepcopy_pickle_and_torch_save(layer):
    x = torch.randn(5, 24)
    y = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    )
    for other in copies:
        assert torch.equal(other(x), y)
        other.lora_A.data.zero_()
    assert torch.equal(layer(x), y)


def test_compiles_whole(layer):
    x = torch.randn(5, 24)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_scaling_can_be_changed(layer):
    x = torch.randn(5, 24)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    update = layer(x) - base
    layer.scaling *= 3
    torch.testing.assert_close(layer(x) - base, 3 * update, rtol=1e-4, atol=1e-4)


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match="rank is at least 1"):
        lk.LoRALinear(8, 8, r=0)
    with pytest.raises(ConfigError, match="probability"):
        lk.LoRALinear(8, 8, lora_dropout=2.0)


def test_repr_shows_the_configuration(layer):
    assert "r=4, lora_alpha=8, lora_dropout=0.0, merged=False" in repr(layer)


def test_tensors_that_a_wrapper_keeps_in_the_parameters_place_are_used():
    """As parametrizations do, and FSDP's flat parameters."""
    layer, x = lk.LoRALinear(8, 6, r=2, init_lora_weights=False), torch.randn(3, 8)
    expected = layer(x)
    torch.nn.utils.parametrize.register_parametrization(layer, "lora_A", torch.nn.Identity())
    torch.testing.assert_close(layer(x), expected)
    held = layer._parameters.pop("weight")
    object.__setattr__(layer, "weight", 2 * held.detach())
    torch.testing.assert_close(layer(x) - expected, x @ held.T)


def test_dropout_mask_is_kept_in_bits_or_drawn_again(device):
    """What is saved beside X, W, A, B: XA and the seed, with "bits" also ceil(K/8) bytes a row in rows of 16."""
    layer = lk.LoRALinear(200, 24, r=4, lora_dropout=0.5, backend="triton", device=device)
    x = torch.randn(10, 200, device=device)
    given = {t.untyped_storage().data_ptr() for t in (x, layer.weight, layer.lora_A, layer.lora_B, layer.bias)}

    def saved(mask):
        layer.dropout_mask, kept = mask, {}

        def pack(t):
            if t.untyped_storage().data_ptr() not in given:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        return sum(kept.values())

    assert saved("seed") == 10 * 4 * 4 + 16
    assert saved("bits") == saved("seed") + 10 * 32
    with pytest.raises(ConfigError, match="accepted are 'bits' and 'seed'"):
        layer.dropout_mask = "bytes"
    with pytest.raises(ConfigError, match="a probability"):
        layer.lora_dropout = 1.5
