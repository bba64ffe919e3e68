"""Adapters with a bias on lora_B (PEFT's lora_bias) in a pool that was made for them: PEFT is the oracle."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import lora_kernels as lk

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT takes a bias for a shard
X = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def base(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def saved(folder: Path, seed: int, dtype: torch.dtype = torch.float32, **config: object) -> nn.Module:
    """PEFT's model with an adapter of its own, which is in ``folder`` then."""
    theirs = peft.get_peft_model(base(dtype), peft.LoraConfig(**{"target_modules": ["up", "down"]} | config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(str(folder))
    return theirs


@pytest.fixture
def theirs(tmp_path: Path) -> dict[str | None, nn.Module]:
    return {
        "biased": saved(tmp_path / "biased", 1, lora_bias=True, r=2, lora_alpha=3),
        "plain": saved(tmp_path / "plain", 2, r=3),
        "other": saved(tmp_path / "other", 3, lora_bias=True, r=4, use_rslora=True, target_modules=["down"]),
        None: base(),
    }


def filled(model: nn.Module, folder: Path) -> lk.AdapterPool:
    pool = lk.AdapterPool(model, capacity=3, max_rank_total=12, lora_bias=True)
    for name in ("biased", "plain", "other"):
        pool.load(name, folder / name)
    return pool


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_each_row_gets_the_bias_of_its_adapter(theirs: dict[str | None, nn.Module], tmp_path: Path) -> None:
    model = base()
    pool, names = filled(model, tmp_path), ["biased", None, "other", "plain", "biased"]
    with torch.no_grad():
        expected = torch.stack([theirs[name](x) for name, x in zip(names, X, strict=True)])
        with pool.batch(names):
            assert close(model(X), expected)
        with pool.batch(["other"] * 5):
            assert close(model(X), theirs["other"](X))
        with pool.batch(pool.ids(names)):
            assert close(model(X), expected)
        pool.evict("biased")
        pool.load("again", tmp_path / "plain")  # into the slot that had a bias
        with pool.batch(["again", None, "other", "plain", "again"]):
            expected = torch.stack(
                [theirs[name](x) for name, x in zip(["plain", *names[1:4], "plain"], X, strict=True)]
            )
            assert close(model(X), expected)
    pool.close()
    assert torch.equal(model(X), base()(X))
    assert not list(model.named_buffers())


def test_a_scale_of_a_request_counts_for_the_bias_too(theirs: dict[str | None, nn.Module], tmp_path: Path) -> None:
    model = base()
    pool = filled(model, tmp_path)
    half = copy.deepcopy(theirs["biased"])
    for module in half.modules():
        if hasattr(module, "scaling"):
            module.scaling["default"] *= 0.5
    with torch.no_grad(), pool.batch([("biased", 0.5), "biased", None, "plain", ("biased", 0.5)]):
        found = model(X)
    with torch.no_grad():
        assert close(found[[0, 4]], half(X[[0, 4]]))
        assert close(found[1], theirs["biased"](X[1]))
        assert close(found[2:3], theirs[None](X[2:3]))


def test_gradients_flow_and_a_graph_is_right(theirs: dict[str | None, nn.Module], tmp_path: Path) -> None:
    model = base()
    pool, names = filled(model, tmp_path), ["biased", None, "other", "plain", "biased"]
    x, y = (X.clone().requires_grad_() for _ in "12")
    with pool.batch(names):
        model(x).square().sum().backward()
    torch.stack([theirs[name](row) for name, row in zip(names, y, strict=True)]).square().sum().backward()
    assert close(x.grad, y.grad)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    pool.probe(X)
    with torch.no_grad(), pool.batch(names):
        assert close(compiled(X), model(X))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_a_bias_reaches_no_row_of_another_request(
    value: float, theirs: dict[str | None, nn.Module], tmp_path: Path
) -> None:
    model = base()
    pool = filled(model, tmp_path)
    with torch.no_grad():
        for layer in (model.up, model.down):
            layer.pool_bias[pool.info("biased").slot] = value
        with pool.batch(["biased", None, "other", "plain", "other"]):
            found = model(X)
        for row, name in ((1, None), (2, "other"), (3, "plain"), (4, "other")):
            assert close(found[row], theirs[name](X[row]))


def test_half_precision_keeps_the_biases_in_float32(tmp_path: Path) -> None:
    theirs = saved(tmp_path / "biased", 1, torch.float16, lora_bias=True, r=2)
    model = base()
    pool = lk.AdapterPool(model, capacity=1, max_rank_total=4, lora_bias=True)
    pool.load("biased", tmp_path / "biased")
    kept = model.up.pool_bias.clone()
    model.half()
    assert torch.equal(model.up.pool_bias, kept)
    with torch.no_grad(), pool.batch(["biased"] * 5):
        assert torch.allclose(
            model(X.half()), theirs(X.half()), rtol=1e-2, atol=1e-2 * float(theirs(X.half()).abs().max())
        )


def test_a_pool_made_without_names_the_remedy(theirs: dict[str | None, nn.Module], tmp_path: Path) -> None:
    pool = lk.AdapterPool(base(), capacity=1, max_rank_total=4)
    with pytest.raises(lk.UnservableAdapterError, match=r"AdapterPool\(\.\.\., lora_bias=True\)"):
        pool.load("biased", tmp_path / "biased")
    assert pool.names == ()
