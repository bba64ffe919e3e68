"""A small network with every base that FusedLinear takes, a comparison of accelerated layers with PEFT's own, and
counts of what runs fused."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk
from lora_kernels.check.compat.families import fill_adapters
from lora_kernels.integrations.peft import accelerate, groups, mlp
from lora_kernels.integrations.peft import linear as fused_linear
from lora_kernels.testing import Pool

TARGETS = ["first", "second", "third"]


class Net(nn.Module):
    """first has a bias, second none, third is transformers' Conv1D; head stays without an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 40), nn.Linear(40, 24, bias=False)
        self.third, self.head = Conv1D(32, 24), nn.Linear(32, 3)
        nn.init.normal_(self.third.weight, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(x).tanh()).tanh()).tanh())


def _adapted(**config: object) -> PeftModel:
    """Return Net with an adapter as large as the base, and the same weights at every call."""
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(**{"r": 4, "target_modules": TARGETS, **config}))
    fill_adapters(model)
    return model.eval()


def _example(rows: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Number of calls of FusedLinear by what ran: "fused", "dora", or the reason for PEFT's own forward."""
    seen = Counter[str]()

    def counting(name: str, key: Callable[..., str]) -> None:
        real = getattr(fused_linear, name)

        def call(*args: object, **kwargs: object) -> object:
            seen[key(*args)] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(fused_linear, name, call)

    counting("lora_linear_unchecked", lambda *_: "fused")
    counting("dora_forward", lambda *_: "dora")
    counting("mixed_forward", lambda *_: "mixed")
    counting("count_peft_call", lambda layer, reason: reason)
    return seen


def _run(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None, **kwargs: object) -> dict[str, Tensor]:
    """Return the output and every gradient of sum(y * c) for a fixed c."""
    x = x.detach().requires_grad_(x.requires_grad)
    model.zero_grad()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = model(x, **kwargs)
    if not y.requires_grad:
        return {"y": y}
    c = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    (y * c).sum().backward()
    grads = {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **grads, **({} if x.grad is None else {"d x": x.grad})}


def _assert_equal_peft(
    model: nn.Module,
    x: Tensor,
    *,
    autocast: torch.dtype | None = None,
    plain_autocast: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: object,
) -> None:
    """Compare output and gradients of the accelerated ``model`` with PEFT's own by the error rule; the same ones exist.

    plain_autocast: PEFT's own runs under this autocast. dtype: of the arithmetic, where it isn't the result's.
    """
    ours = accelerate(copy.deepcopy(model), verbose=False, group=False)
    got, plain = _run(ours, x, autocast, **kwargs), _run(model, x, autocast or plain_autocast, **kwargs)
    truth = _run(copy.deepcopy(model).double(), x.detach().double().requires_grad_(x.requires_grad), **kwargs)
    assert got.keys() == plain.keys() == truth.keys()
    pool, dtype = Pool(), dtype or autocast or plain_autocast
    for name, value in got.items():
        pool.assert_close(value, plain[name], truth[name].double(), what=name, dtype=dtype)
    pool.close()


@pytest.fixture
def adapted() -> Callable[..., PeftModel]:
    """adapted(**LoraConfig's fields) -> Net with an adapter as large as the base, equal at every call, in eval mode."""
    return _adapted


@pytest.fixture
def example() -> Callable[..., Tensor]:
    """example(rows, dtype) -> an input of Net that requires a gradient."""
    return _example


@pytest.fixture
def run() -> Callable[..., dict[str, Tensor]]:
    """run(model, x, autocast, **kwargs) -> the output and every gradient."""
    return _run


@pytest.fixture
def same() -> Callable[..., None]:
    """same(model, x): accelerated, the model equals PEFT's own forward and backward by the error rule."""
    return _assert_equal_peft


@pytest.fixture
def nothing_left_over() -> Iterator[None]:
    """Drop the cached outputs of siblings after the test."""
    yield
    groups.unclaimed.made = None


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of layers in each call of the fused functions, in order."""
    calls: list[int] = []

    def stacked(x: Tensor, projections: list, p: float) -> object:
        calls.append(len(projections))
        return run_stacked(x, projections, p)

    def alone(*args: object) -> object:
        calls.append(1)
        return run_alone(*args)

    run_stacked, run_alone = groups.lora_linear_stacked_unchecked, fused_linear.lora_linear_unchecked
    monkeypatch.setattr(groups, "lora_linear_stacked_unchecked", stacked)
    monkeypatch.setattr(fused_linear, "lora_linear_unchecked", alone)
    return calls


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Dropout's p at each call for a whole block, in order."""
    seen: list[float] = []

    def call(*args: object, dropout_p: float) -> object:
        seen.append(dropout_p)
        return lk.lora_mlp(*args, dropout_p=dropout_p)

    monkeypatch.setattr(mlp, "lora_mlp", call)
    return seen
