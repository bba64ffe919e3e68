import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.finetune.train.memory import saved_for_backward, state_bytes


def network(dropout=0.0):
    return nn.Sequential(nn.Linear(64, 32), nn.Dropout(dropout), nn.Linear(32, 8))


def test_state_counts_gradient_and_two_moments():
    model = network()
    model[0].weight.requires_grad_(False)
    assert state_bytes(model) == 12 * (32 + 32 * 8 + 8)
    assert state_bytes(model, trainable_only=False) == 12 * (64 * 32 + 32 + 32 * 8 + 8)


def test_saved_bytes_are_the_activations_each_once():
    """Linear layers save their inputs. Weights are not counted, and a shared input is counted once."""
    x = torch.randn(16, 64)
    assert saved_for_backward(nn.Linear(64, 32), x) == 16 * 64 * 4
    twice = nn.ModuleList([nn.Linear(64, 32), nn.Linear(64, 32)])
    twice.forward = lambda x: twice[0](x) + twice[1](x)
    assert saved_for_backward(twice, x) == 16 * 64 * 4


def test_adapters_save_their_small_product_and_no_mask():
    model = apply_lora(nn.Sequential(nn.Linear(64, 32)), LoRAConfig(r=4, lora_dropout=0.5, target_modules=["0"]))
    seed = 2 * 8
    assert saved_for_backward(model, torch.randn(16, 64)) <= 16 * 64 * 4 + 16 * 4 * 4 + seed


def test_measuring_leaves_no_trace():
    model = network(dropout=0.5).eval()
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    saved_for_backward(model, torch.ones(4, 64))
    assert torch.equal(torch.rand(2), expected)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_measuring_leaves_running_statistics():
    model = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved_for_backward(model, torch.randn(4, 64))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
