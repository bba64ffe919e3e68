"""The reference convolution against autograd of the plain expression, in fp64 and by the error rule."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from lora_kernels.reference import lora_conv
from lora_kernels.reference.lora_conv import (
    ConvNeeds,
    Geometry,
    Mask,
    is_channels_last,
    keep_mask,
    lora_conv_bwd,
    lora_conv_fwd,
)
from lora_kernels.testing import assert_close
from lora_kernels.testing.problems import lora_dtype

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
ALL = ConvNeeds(True, True, True, True, True)
NAMES = ("Y", "dX", "dA", "dB", "dbias", "dlora_bias")


class Case(NamedTuple):
    """Places and channels of X, outputs, kernel, rank and geometry of one convolution."""

    places: tuple[int, ...]
    C: int = 6
    N: int = 8
    kernel: int = 3
    r: int = 4
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    M: int = 3

    @property
    def geometry(self):
        dims = len(self.places)
        return Geometry((self.stride,) * dims, (self.padding,) * dims, (self.dilation,) * dims, self.groups)


CASES = {
    "1d": Case((17,)),
    "2d": Case((9, 7)),
    "3d": Case((5, 4, 6)),
    "strided": Case((11, 9), stride=2),
    "patches": Case((12, 8), kernel=4, stride=4, padding=0),
    "pointwise": Case((5, 6), kernel=1, padding=0),
    "dilated": Case((11, 9), padding=2, dilation=2),
    "groups": Case((7, 6), groups=2),
    "depthwise": Case((7,), C=4, N=4, groups=4),
    "r1": Case((7, 6), r=1),
    "no samples": Case((7, 6), M=0),
    "one place": Case((3, 3), padding=0, M=1),
}


def problem(case, dtype=torch.float64, adapter=None, channels_last=False):
    """X, W, A, B, bias, lora_bias, dY; the update is as large as the base."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, std=1.0, to=dtype):
        return (torch.randn(*shape, generator=generator) * std).to(to)

    dims, adapter = len(case.places), adapter or dtype
    fan = case.C * case.kernel**dims
    X = normal(case.M, case.C, *case.places)
    W = normal(case.N, case.C // case.groups, *(case.kernel,) * dims, std=(fan / case.groups) ** -0.5)
    A = normal(case.r, case.C, *(case.kernel,) * dims, std=fan**-0.5, to=adapter)
    width = case.r // case.groups
    B = normal(case.N, width, std=width**-0.5 / 1.7, to=adapter)
    bias, lora_bias = normal(case.N), normal(case.N, to=adapter)
    if channels_last:
        X = X.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    shape = plain_conv(X.double(), W.double(), None, case).shape
    dY = normal(*shape)
    if channels_last:
        dY = dY.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    return X, W, A, B, bias, lora_bias, dY


def plain_conv(X, W, bias, case, groups=None):
    groups = case.groups if groups is None else groups
    return CONV[len(case.places)](X, W, bias, case.stride, case.padding, case.dilation, groups)


def autograd(case, given, keep=None, p=0.0, dtype=None):
    """Y and all gradients of PEFT's expression, with A and B rounded to X's dtype, or all in ``dtype``.

    But float32 adapters over float16 stay as they are: X is cast for them.
    """
    X, W, A, B, bias, lora_bias, dY = given
    dtype = dtype or X.dtype
    wide = lora_dtype(dtype, A.dtype)
    X, bias = (t.to(dtype, copy=True).requires_grad_() for t in (X, bias))
    A, B, lora_bias = (t.to(wide, copy=True).requires_grad_() for t in (A, B, lora_bias))
    dropped = (X if keep is None else X * keep.to(dtype) * (1 / (1 - p))).to(wide)
    dims = len(case.places)
    XA = plain_conv(dropped, A, None, case, groups=1)
    update = CONV[dims](XA, B.view(*B.shape, *(1,) * dims), lora_bias, groups=case.groups)
    Y = (plain_conv(X, W.to(dtype), bias, case) + update * 1.7).to(dtype)
    Y.backward(dY.to(dtype))
    return Y.detach(), X.grad, A.grad, B.grad, bias.grad, lora_bias.grad


def run(case, given, mask=None):
    X, W, A, B, bias, lora_bias, dY = given
    Y, XA = lora_conv_fwd(X, W, A, B, bias, lora_bias, 1.7, case.geometry, mask)
    return Y, *lora_conv_bwd(dY, X, W, A, B, XA, 1.7, case.geometry, mask, ALL)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_autograd_in_float64(name, p, channels_last):
    case = CASES[name]
    given = problem(case, channels_last=channels_last and len(case.places) > 1)
    mask = Mask(torch.tensor([5, 0]), p, is_channels_last(given[0])) if p else None
    keep = keep_mask(mask, given[0]) if p else None
    for got, true in zip(run(case, given, mask), autograd(case, given, keep, p), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("name", ["1d", "2d", "groups", "strided"])
def test_error_rule(name, dtype, adapter):
    case = CASES[name]._replace(M=8, C=16, N=24, r=8, places=tuple(4 * n for n in CASES[name].places))
    given = problem(case, dtype, adapter)
    expected, true = autograd(case, given), autograd(case, given, dtype=torch.float64)
    for what, got, plain, exact in zip(NAMES, run(case, given), expected, true, strict=True):
        assert_close(got, plain.to(got.dtype), exact, what=what, dtype=dtype)


@pytest.mark.parametrize("a", [1.0, 3e5])
@pytest.mark.parametrize(("b", "dy"), [(1e-4, 1.0), (1e-6, 1.0), (1.0, 1e-6)])
@pytest.mark.parametrize("name", ["2d", "groups"])
def test_sizes_that_float16_intermediates_cannot_hold(name, a, b, dy):
    """Also by autocast's rules, which narrow the operands of products; a B of 1e-6 beside an A of 3e5 included."""
    case = CASES[name]._replace(M=8, C=16, N=24, r=8, places=tuple(4 * n for n in CASES[name].places))
    X, W, A, B, bias, lora_bias, dY = problem(case)
    adapters = [t.float() for t in (A * a, B * b if a == 1.0 else B * b / a, lora_bias)]
    given = X.half(), W.half(), *adapters[:2], bias.half(), adapters[2], (dY * dy).half()
    expected, true = autograd(case, given), autograd(case, given, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.float16):
        found = run(case, given)
    for what, got, plain, exact in zip(NAMES, found, expected, true, strict=True):
        assert_close(got, plain.to(got.dtype), exact, what=what, dtype=torch.float16)


def test_layouts_stay_as_they_come():
    case = CASES["2d"]
    for channels_last in (False, True):
        given = problem(case, torch.float32, channels_last=channels_last)
        Y, dX, *_ = run(case, given)
        assert is_channels_last(Y) == channels_last
        assert is_channels_last(dX) == channels_last


def test_gradients_in_another_layout_than_the_output():
    case = CASES["2d"]
    X, W, A, B, bias, lora_bias, dY = problem(case)
    last = torch.channels_last
    straight = run(case, (X, W, A, B, bias, lora_bias, dY))
    for x, dy in ((X.to(memory_format=last), dY), (X, dY.to(memory_format=last)), (X, dY.mT.contiguous().mT)):
        for got, expected in zip(run(case, (x, W, A, B, bias, lora_bias, dy)), straight, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("philox", [False, True])
def test_a_mask_is_the_same_for_the_same_seed_and_keeps_its_share(philox):
    X = torch.empty(4, 6, 20, 30)
    mask = Mask(torch.tensor([3, 1]), 0.3, philox=philox)
    keep = keep_mask(mask, X)
    assert torch.equal(keep, keep_mask(mask, X))
    assert keep.shape == X.shape
    assert abs(keep.mean() - 0.7) < 0.02
    assert not torch.equal(keep, keep_mask(mask._replace(seed=torch.tensor([4, 1])), X))
    last = keep_mask(mask._replace(channels_last=True), X)
    assert is_channels_last(last)
    assert abs(last.mean() - 0.7) < 0.02


def test_everything_dropped_leaves_the_base():
    case = CASES["2d"]
    given = problem(case)
    X, W, *_, bias, _, dY = given
    Y, XA = lora_conv_fwd(X, W, *given[2:4], bias, None, 1.7, case.geometry, mask := Mask(torch.tensor([1, 2]), 1.0))
    torch.testing.assert_close(Y, plain_conv(X, W, bias, case))
    _, dA, dB, *_ = lora_conv_bwd(dY, X, W, *given[2:4], XA, 1.7, case.geometry, mask)
    assert dA.abs().max() == 0
    assert dB.abs().max() == 0


def test_makes_only_what_is_needed():
    case = CASES["2d"]
    X, W, A, B, bias, _, dY = problem(case)
    _, XA = lora_conv_fwd(X, W, A, B, bias, None, 1.7, case.geometry)
    for i in range(5):
        needs = ConvNeeds(*(j == i for j in range(5)))
        grads = lora_conv_bwd(dY, X, W, A, B, XA, 1.7, case.geometry, None, needs)
        assert [grad is not None for grad in grads] == list(needs)


def test_an_output_in_a_layout_of_its_own_still_gets_its_update(monkeypatch):
    """No layout that a convolution may choose lets the update go into a copy."""
    case = CASES["2d"]
    given = problem(case)
    straight, conv = run(case, given), lora_conv._conv
    monkeypatch.setattr(lora_conv, "_conv", lambda *args: conv(*args).mT.contiguous().mT)
    for got, expected in zip(run(case, given), straight, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
