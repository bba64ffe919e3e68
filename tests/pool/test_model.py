"""Which layers a pool takes, and that the model is afterwards what it was."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

from lora_kernels.config import LoRAConfig
from lora_kernels.errors import BackendUnavailableError, ConfigError
from lora_kernels.models.inject import apply_lora
from lora_kernels.pool.active import ActiveBatch
from lora_kernels.pool.layer import BUFFERS, PooledLinear, PoolSettings, into_pooled
from lora_kernels.pool.model import PooledModel, choose_layers


def pooled(model: nn.Module, targets: Any = None, backend: str = "auto") -> PooledModel:
    return PooledModel(model, targets, PoolSettings(2, 8, 4, backend), ActiveBatch())


class Odd(nn.Module):
    """Layers that a pool takes, and one of each kind that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(4, 4)
        self.narrow = nn.Linear(4, 4).half()
        self.meta = nn.Linear(4, 4, device="meta")
        self.patched = nn.Linear(4, 4)
        self.patched.forward = lambda x: x  # type: ignore[method-assign]
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.experts = nn.ModuleList([nn.Linear(4, 4)])
        self.shared_experts = nn.ModuleList([nn.Linear(4, 4)])
        self.attention = nn.MultiheadAttention(4, 2)
        self.integers = nn.Linear(4, 4)
        self.integers.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


def test_every_linear_layer_is_taken_or_left_with_a_reason() -> None:
    layers, left = choose_layers(Odd())
    assert list(layers) == ["plain", "narrow", "shared_experts.0"]
    reasons = {
        "meta": "meta device",
        "patched": "patched",
        "normed": "a ParametrizedLinear",
        "experts.0": "an expert of a mixture",
        "attention.out_proj": "never calls it",
        "integers": "no plain floating-point weight",
    }
    assert left.keys() == reasons.keys()
    for path, reason in reasons.items():
        assert reason in left[path], path


def test_target_modules() -> None:
    layers, left = choose_layers(Odd(), ["plain", "shared_experts.0"])
    assert list(layers) == ["plain", "shared_experts.0"]
    assert left["narrow"] == "not in the pool's target_modules"
    assert list(choose_layers(Odd(), r".*arro.*")[0]) == list(choose_layers(Odd(), ("narrow",))[0]) == ["narrow"]
    for name, reason in (
        ("meta", "meta device"),
        ("attention.out_proj", "never calls it"),
        ("experts", "a ModuleList"),
    ):
        with pytest.raises(ConfigError, match=rf"target_modules names {name}, which cannot be pooled.*{reason}"):
            choose_layers(Odd(), [name])
    with pytest.raises(ConfigError, match="no linear layer to pool"):
        choose_layers(Odd(), ["nothing"])


def test_models_that_are_refused(served: Any) -> None:
    with pytest.raises(ConfigError, match=r"Linear has no linear layer to pool \(the model itself: the model itself\)"):
        choose_layers(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"before torch\.compile"):
        choose_layers(torch.compile(served()))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has an adapter already"):
        choose_layers(apply_lora(served(), LoRAConfig(target_modules=["q"])))
    with pytest.raises(ConfigError, match=r"has an adapter already \(Linear\); give AdapterPool the base model"):
        choose_layers(peft.get_peft_model(served(), peft.LoraConfig(target_modules=["q"])))
    model = served()
    pooled(model)
    with pytest.raises(ConfigError, match=r"blocks\.0\.q belongs to a pool already"):
        choose_layers(model)
    with pytest.raises(BackendUnavailableError, match="cuda"):
        pooled(served(), backend="cuda")


def test_restore() -> None:
    model = nn.Sequential(Odd(), nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1))
    model[0].plain.weight.requires_grad_(False)
    before = [(path, type(m), dict(vars(m))) for path, m in model.named_modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = pooled(model)
    assert isinstance(model[0].plain, PooledLinear)
    assert not model[1].layers[0].linear1.weight.requires_grad
    assert model[1].layers[0].activation_relu_or_gelu == 0
    assert not model[1].use_nested_tensor
    state.restore()
    assert state.layers == {}
    assert [p.requires_grad for p in model.parameters()] == flags
    for (path, kind, attributes), (_, m) in zip(before, model.named_modules(), strict=True):
        assert (type(m), vars(m).keys()) == (kind, attributes.keys()), path
        for name, value in attributes.items():
            assert vars(m)[name] is value or vars(m)[name] == value, (path, name)


def test_the_encoder_calls_its_pooled_layers() -> None:
    """PyTorch's inference path reads the weights of linear1 and linear2 and would serve the base alone."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1).eval()
    called = []
    state = pooled(model)
    state.layers["layers.0.linear1"].register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad():
        model(torch.randn(2, 3, 4))
    assert called


def test_memory_that_runs_out_leaves_the_model_alone(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = served(), 0

    def failing(*given: Any) -> Any:
        nonlocal made
        made += 1
        if made == 3:
            raise torch.OutOfMemoryError("no more")
        return into_pooled(*given)

    monkeypatch.setattr("lora_kernels.pool.model.into_pooled", failing)
    with pytest.raises(torch.OutOfMemoryError):
        pooled(model)
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("made_in", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("used_in", [torch.inference_mode, torch.no_grad])
def test_weights_of_inference_mode(served: Any, made_in: Any, used_in: Any) -> None:
    with made_in():
        model = served()
    model.blocks[0].q.bias = nn.Parameter(torch.zeros(6), requires_grad=False)
    flags = [p.requires_grad for p in model.parameters()]
    with used_in():
        state = pooled(model)
    assert not any(p.requires_grad for p in model.parameters())
    with used_in():
        state.restore()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not list(model.buffers())
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))


def test_every_step_of_restore_is_done(served: Any) -> None:
    model = served()
    state = pooled(model)
    del model.blocks[0].v._buffers["pool_A"]
    with pytest.raises(KeyError, match="pool_A"):
        state.restore()
    assert all(p.requires_grad for p in model.parameters())
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    assert {name for name, _ in model.named_buffers()} <= {f"blocks.0.v.{name}" for name in BUFFERS}
    assert state.layers == {}


def test_a_flag_that_cannot_be_set_leaves_the_model_alone(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = served()
    monkeypatch.setattr(model.blocks[1].v.weight, "requires_grad_", lambda _: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        pooled(model)
    assert all(p.requires_grad for p in model.parameters())
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
