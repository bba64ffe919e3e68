"""lk.loraplus_groups: equal to PEFT's groups on PEFT's models, and the same rules on layers of this package."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import lora_kernels as lk
from lora_kernels.finetune.train.loraplus import loraplus_groups


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.first, self.second, self.head = nn.Linear(16, 12), nn.Linear(12, 16), nn.Linear(16, 3)
        self.norm = nn.LayerNorm(16)
        self.rms = nn.RMSNorm(16)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(self.rms(self.norm(x + self.second(self.first(x).relu()))).mean(1))


CONFIGS = {
    "plain": {},
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "saved modules": {"modules_to_save": ["head", "norm", "rms"]},
    "embedding": {"target_modules": ["embed", "first"]},
    "embedding with dora": {"target_modules": ["embed", "first"], "use_dora": True},
    "trainable tokens": {"trainable_token_indices": {"embed": [1, 2]}},
}


def names(model, groups):
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [([by_id[id(p)] for p in g["params"]], g["lr"], g["weight_decay"]) for g in groups]


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_groups_are_pefts(settings):
    model = get_peft_model(Net(), LoraConfig(**{"target_modules": ["first", "second"], "r": 2, **settings}))
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_weight_decay=0.1, loraplus_lr_embedding=1e-5
    )
    ours = loraplus_groups(model, 1e-3, 8, weight_decay=0.1, embedding_lr=1e-5)
    assert names(model, ours) == names(model, theirs.param_groups)
    optimizer = torch.optim.AdamW(ours)
    optimizer.load_state_dict(theirs.state_dict())


def test_on_our_layers():
    model = lk.apply_lora(
        Net(), lk.LoRAConfig(r=2, target_modules=["first", "second"], bias="lora_only", modules_to_save=["head"])
    )
    (a, lr_a, decay_a), (embedding, *_), (b, lr_b, decay_b), (rest, lr_rest, decay_rest) = names(
        model, lk.loraplus_groups(model, 1e-3, weight_decay=0.1)
    )
    assert {"first.lora_A", "second.lora_A"} < set(a)
    assert b == ["first.lora_B", "second.lora_B"]
    assert embedding == []
    assert {"first.bias", "second.bias"} < set(rest)
    assert (lr_a, lr_b, lr_rest) == (1e-3, 16e-3, 16e-3)
    assert (decay_a, decay_b, decay_rest) == (0.1, 0.1, 0.0)
    trainable = sum(p.requires_grad for p in model.parameters())
    assert trainable == len(a) + len(b) + len(rest)


def test_a_step_moves_b_by_the_ratio():
    model = lk.apply_lora(Net(), lk.LoRAConfig(r=2, target_modules=["first"], init_lora_weights=False))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(lk.loraplus_groups(model, 0.5, 4))
    model(torch.arange(6).view(2, 3)).sum().backward()
    optimizer.step()
    for name, rate in (("first.lora_A", 0.5), ("first.lora_B", 2.0)):
        parameter = model.get_parameter(name)
        torch.testing.assert_close(parameter.detach(), before[name] - rate * parameter.grad)


def test_a_layer_norm_alone_counts_as_root_as_in_pefts():
    norm = nn.LayerNorm(4)
    groups = names(norm, loraplus_groups(norm, 1.0))
    assert groups[2][0] == ["weight"]
    assert groups[3][0] == ["bias"]


def test_what_cannot_be_is_refused():
    with pytest.raises(lk.ConfigError, match="ratio=-1"):
        loraplus_groups(Net(), 1e-3, -1)
    with pytest.raises(lk.ConfigError, match="no trainable parameter"):
        loraplus_groups(Net().requires_grad_(False), 1e-3)
