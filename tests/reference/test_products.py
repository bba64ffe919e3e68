"""Both libraries give the product by the error rule, whatever the layout, and the right one is asked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.errors import ConfigError
from lora_kernels.reference import lora_linear_bwd, lora_linear_fwd, products
from lora_kernels.testing.rule import assert_close

LAYOUTS = ("rows", "columns", "gaps", "every other")
M, K, N = 96, 400, 200  # above MULTIPLICATIONS with any two as outer sizes


@pytest.fixture(params=["torch", "onednn"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The library that the environment asks for."""
    monkeypatch.setenv(products.SWITCH, request.param)
    return request.param


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No choice of a test outlives it."""
    products._onednn.cache_clear()
    yield
    products._onednn.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The first operand's shape of every product that oneDNN got."""
    seen: list[torch.Size] = []
    run = products._run

    def counted(X: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(X.shape)
        return run(X, *rest)

    monkeypatch.setattr(products, "_run", counted)
    return seen


def laid_out(rows: int, columns: int, layout: str, seed: int) -> torch.Tensor:
    """A random matrix; what lies in its gaps is NaN."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if layout == "rows":
        return values
    if layout == "columns":
        return values.t().contiguous().t()
    out = torch.full((rows, columns + 3 if layout == "gaps" else 2 * columns), float("nan"))
    out = out[:, :columns] if layout == "gaps" else out[:, ::2]
    return out.copy_(values)


@pytest.mark.parametrize(("left", "right"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_every_layout(library: str, left: str, right: str) -> None:
    """linear, mm, scaled_mm and add_mm_ against float64, with the error of PyTorch's own operators as the measure."""
    for rows, inner, columns in ((M, K, N), (N, K, M), (8, 4096, 160), (160, 4096, 8)):
        P, Q = laid_out(rows, inner, left, 1), laid_out(inner, columns, right, 2)
        bias, Y = torch.randn(columns), torch.randn(rows, columns)
        truth, plain = P.double() @ Q.double(), P.contiguous() @ Q.contiguous()
        for got, expected, own in (
            (products.mm(P, Q), truth, plain),
            (products.linear(P, Q.t(), bias), truth + bias, plain + bias),
            (products.linear(P, Q.t(), None), truth, plain),
            (products.scaled_mm(P, Q, 0.3), truth * 0.3, plain * 0.3),
            (products.add_mm_(Y.clone(), P, Q), truth + Y, plain + Y),
        ):
            assert got.shape == (rows, columns)
            assert got.is_contiguous()
            assert_close(got, own, expected)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # flags() sets it, too
def test_what_onednn_gets(monkeypatch: pytest.MonkeyPatch, calls: list[torch.Size]) -> None:
    """Large dense float32 products without a graph; of two operands the one without a copy first."""
    monkeypatch.setenv(products.SWITCH, "onednn")
    X, W = torch.randn(M, K), torch.randn(N, K)
    products.linear(X, W, None)
    products.mm(X, W.t())
    assert calls == [(M, K), (M, K)]
    calls.clear()
    tall, thin = torch.randn(4096, 160), torch.randn(4096, 8)
    products.mm(tall.t(), thin)  # dB: as (XA^T dY)^T
    assert calls == [(8, 4096)]
    calls.clear()
    products.mm(thin.t(), tall)  # dA
    assert calls == [(8, 4096)]
    calls.clear()
    products.linear(X[:2], W, None)  # too small
    products.linear(X.double(), W.double(), None)
    products.linear(X.bfloat16(), W.bfloat16(), None)
    products.linear(X.requires_grad_(), W, None).sum().backward()
    assert X.grad is not None
    with torch.backends.mkldnn.flags(enabled=False):
        products.linear(X.detach(), W, None)
    assert calls == []


def test_it_asks_without_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of a layer are at most 21 of them, views included; PEFT's are 24 (and 4 beside either)."""
    monkeypatch.setenv(products.SWITCH, "onednn")
    X, W, A, B = torch.randn(512, 128), torch.randn(160, 128), torch.randn(80, 128), torch.randn(160, 80)
    dY, seen = torch.randn(512, 160), []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Counter():
        _, XA = lora_linear_fwd(X, W, A, B, None, 0.5)
        lora_linear_bwd(dY, X, W, A, B, XA, 0.5)
    assert sum("mkldnn" in name for name in seen) == 6
    assert len(seen) <= 21, seen


def test_wrong_shapes_raise(library: str) -> None:
    """As PyTorch's own operators do."""
    with pytest.raises(RuntimeError):
        products.linear(torch.randn(M, K), torch.randn(N, K + 1), None)
    with pytest.raises(RuntimeError):
        products.mm(torch.randn(M, K), torch.randn(K + 1, N))


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", "onednn"),
        ("AuthenticAMD", "AVX2", "torch"),
        ("GenuineIntel", "AVX512", "torch"),
        ("", "DEFAULT", "torch"),
    ],
)
def test_the_choice(monkeypatch: pytest.MonkeyPatch, vendor: str, capability: str, expected: str) -> None:
    """oneDNN where it was measured to be faster; the environment decides otherwise; nonsense raises."""
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.delenv(products.SWITCH, raising=False)
    assert products.library()[0] == expected
    for asked in ("torch", "onednn"):
        monkeypatch.setenv(products.SWITCH, asked)
        assert products.library() == (asked, f"by {products.SWITCH}")
    monkeypatch.setenv(products.SWITCH, "mkl")
    with pytest.raises(ConfigError, match=products.SWITCH):
        products.library()


def test_the_vendor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the kernel's table, or from the platform's sentence."""
    table = tmp_path / "cpuinfo"
    monkeypatch.setattr(products, "_CPUINFO", table)
    monkeypatch.setattr("platform.processor", lambda: "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD")
    assert products._vendor() == "AuthenticAMD"
    table.write_text("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: something\n")
    assert products._vendor() == "GenuineIntel"
