import time

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora, save_adapter
from lora_kernels.finetune.train.compare import interleaved, peft_model


class Slow(nn.Module):
    def __init__(self, milliseconds):
        super().__init__()
        self.linear, self.milliseconds, self.calls = nn.Linear(3, 2), milliseconds, []

    def forward(self, x):
        self.calls.append(x)
        time.sleep(self.milliseconds / 1e3)
        return self.linear(x)


def test_both_get_the_same_batches_and_times_are_not_mixed_up():
    batches = [(torch.full((2, 3), float(i)), torch.zeros(2, dtype=torch.long)) for i in range(3)]
    ours, theirs = Slow(10).eval(), Slow(40)
    figures = interleaved(ours, theirs, batches, nn.CrossEntropyLoss(), rounds=6)
    assert all(a is b for a, b in zip(ours.calls, theirs.calls, strict=True))
    assert len(ours.calls) == 7
    assert ours.training
    assert 10 <= figures["ours_ms"] < figures["theirs_ms"]
    assert figures["ratio_p20"] <= figures["ratio"] <= figures["ratio_p80"] < 1
    assert ours.linear.weight.grad is None


def test_peft_trains_the_saved_adapter(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = LoRAConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    ours = apply_lora(base, config)
    save_adapter(ours, tmp_path)
    plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    plain.load_state_dict(weights)
    theirs = peft_model(plain, tmp_path)
    x = torch.randn(4, 6)
    torch.testing.assert_close(theirs(x), ours(x))
    trainable = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trainable == sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert interleaved(ours, theirs, [(x, torch.zeros(4).long())], nn.CrossEntropyLoss(), rounds=2)["rounds"] == 2


def test_it_needs_batches():
    with pytest.raises(IndexError):
        interleaved(Slow(0), Slow(0), [], nn.CrossEntropyLoss())
