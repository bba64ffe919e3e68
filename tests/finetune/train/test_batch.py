import pytest
import torch
from torch import nn

from lora_kernels.errors import LoRAKernelsError
from lora_kernels.finetune.train.batch import call_model, count_tokens, loss_weight, split_batch, to_device


def test_split_batch():
    x, y = torch.ones(2, 3), torch.zeros(2)
    assert split_batch((x, y)) == (x, y)
    assert split_batch([x, y]) == (x, y)
    inputs, targets = split_batch({"input_ids": x, "labels": y})
    assert inputs.keys() == {"input_ids"}
    assert targets is y
    with pytest.raises(LoRAKernelsError, match=r"needs one of .* this one has \['input_ids'\]"):
        split_batch({"input_ids": x})
    with pytest.raises(LoRAKernelsError, match="not Tensor"):
        split_batch(x)


def test_call_model():
    class Two(nn.Module):
        def forward(self, a, b):
            return (a + b, "more")

    a = torch.ones(2)
    assert torch.equal(call_model(Two(), (a, a)), 2 * a)
    assert torch.equal(call_model(Two(), {"a": a, "b": a}), 2 * a)
    assert torch.equal(call_model(nn.Identity(), a), a)


def test_to_device_keeps_the_structure():
    moved = to_device({"x": [torch.ones(1), "text"], "y": (torch.ones(1),)}, torch.device("meta"))
    assert moved["x"][0].is_meta
    assert moved["x"][1] == "text"
    assert isinstance(moved["y"], tuple)


def test_loss_weight():
    targets = torch.tensor([0, 1, -100, 1])
    assert loss_weight(nn.CrossEntropyLoss(), targets) == 3
    assert loss_weight(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 4.0])), targets) == 9
    assert loss_weight(nn.CrossEntropyLoss(reduction="sum"), targets) == 1
    assert loss_weight(nn.MSELoss(), torch.ones(5, 2)) == 5
    assert loss_weight(lambda logits, targets: logits.mean(), targets) == 4


def test_count_tokens():
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [1, 1, 1]])
    labels = torch.zeros(2)
    assert count_tokens({"input_ids": ids, "attention_mask": mask}, labels) == 5
    assert count_tokens({"input_ids": ids}, labels) == 6
    assert count_tokens(torch.ones(2, 7), labels) == 2
