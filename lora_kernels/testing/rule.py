"""The error rule: a result is judged against the error that plain PyTorch itself makes, with fp64 as the truth.

    max |got - truth| <= 2    * max |plain - truth| + u/4 * max |truth|
    rms(got - truth)  <= 1.25 * rms(plain - truth)  + u/4 * rms(truth)          u = eps / 2

where `plain` is the plain PyTorch expression in the same dtype on the same inputs. In fp32 and fp64, where the error
is the order of summation and not the final rounding, the factors are 4, 4 and the floor is 4u; in fp64 it is 16u, as
there plain is the truth itself, and the floor stands for the errors of both: over 200 networks of three layers on a CPU
the gradient of the input was 4.1u away in the median and 5.8u at most by rms, 4.4u and 8.9u by max. The rule has no
tolerance to tune: a kernel that loses a term is off by the term, whatever its size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """How many times plain PyTorch's error is allowed, and the floor in units of u = eps / 2."""

    max_ratio: float
    rms_ratio: float
    floor: float


HALF_PRECISION = Limits(max_ratio=2.0, rms_ratio=1.25, floor=0.25)
FULL_PRECISION = Limits(max_ratio=4.0, rms_ratio=4.0, floor=4.0)
TRUTH_PRECISION = Limits(max_ratio=4.0, rms_ratio=4.0, floor=16.0)


@dataclass(frozen=True)
class Verdict:
    """Outcome of the rule, true where it holds. A ratio is got's error over plain's, the floor added to plain's."""

    ok: bool
    max_ratio: float
    rms_ratio: float
    message: str

    def __bool__(self) -> bool:
        return self.ok


def limits_for(dtype: torch.dtype) -> Limits:
    """The limits of the rule for arithmetic in `dtype`."""
    return {torch.float32: FULL_PRECISION, torch.float64: TRUTH_PRECISION}.get(dtype, HALF_PRECISION)


def within_rule(
    got: Tensor, plain: Tensor, truth: Tensor, *, what: str = "result", dtype: torch.dtype | None = None
) -> Verdict:
    """Judges `got` by the rule of this module.

    Args:
        got: the result under test, any shape.
        plain: plain PyTorch's result in the same dtype, same shape.
        truth: the same in float64, same shape.
        what: the name used in the message.
        dtype: the dtype the arithmetic ran in, where it isn't got's (a bf16 product handed back in float32).

    Raises:
        ValueError: `truth` isn't float64, or `truth` or `plain` isn't finite: such a problem can judge nothing.
    """
    if truth.dtype != torch.float64:
        raise ValueError(f"{what}: truth is {truth.dtype}; compute it in torch.float64")
    if got.shape != truth.shape or plain.shape != truth.shape:
        shapes = f"got {tuple(got.shape)}, plain {tuple(plain.shape)}, truth {tuple(truth.shape)}"
        return Verdict(False, math.inf, math.inf, f"{what}: the shapes differ: {shapes}")
    if got.dtype != plain.dtype:
        return Verdict(False, math.inf, math.inf, f"{what}: got {got.dtype}, plain PyTorch gives {plain.dtype}")
    if truth.numel() == 0:
        return Verdict(True, 0.0, 0.0, f"{what}: empty, shapes agree")
    for name, tensor in (("truth", truth), ("plain", plain)):
        if not tensor.isfinite().all():
            raise ValueError(f"{what}: {name} is not finite; scale the problem to the range of {plain.dtype}")

    dtype = dtype or got.dtype
    limits = limits_for(dtype)
    floor = limits.floor * torch.finfo(dtype).eps / 2
    got_error = got.detach().to(truth.device, torch.float64) - truth
    plain_error = plain.detach().to(truth.device, torch.float64) - truth

    def ratio(norm_order: float, limit: float) -> float:
        size = torch.linalg.vector_norm
        got_size, plain_size, truth_size = (float(size(t, norm_order)) for t in (got_error, plain_error, truth))
        allowed_of_plain = plain_size + floor / limit * truth_size
        return got_size / allowed_of_plain if allowed_of_plain else (0.0 if got_size == 0 else math.inf)

    max_ratio, rms_ratio = ratio(math.inf, limits.max_ratio), ratio(2.0, limits.rms_ratio)
    ok = max_ratio <= limits.max_ratio and rms_ratio <= limits.rms_ratio  # false for NaN
    message = (
        f"{what}: error is {max_ratio:.3g}x plain PyTorch's by max (limit {limits.max_ratio:g}x), "
        f"{rms_ratio:.3g}x by rms (limit {limits.rms_ratio:g}x)"
    )
    return Verdict(ok, max_ratio, rms_ratio, message if ok else f"{message}; {_worst(got, plain, truth, got_error)}")


def assert_close(
    got: Tensor, plain: Tensor, truth: Tensor, *, what: str = "result", dtype: torch.dtype | None = None
) -> tuple[float, float]:
    """Asserts the rule of this module (arguments as in `within_rule`) and returns the ratios of max and RMS errors."""
    verdict = within_rule(got, plain, truth, what=what, dtype=dtype)
    if not verdict:
        raise AssertionError(verdict.message)
    return verdict.max_ratio, verdict.rms_ratio


class Pool:
    """Judges many results; those too small to judge alone (below `SMALL` elements) together, at `close()`.

    The error of a lone element is one draw from a distribution. Of 11,000 16-bit results of our own arithmetic on
    fuzzed shapes the rule refused 28 of the 2,100 below 64 elements and none of the others (at 64 to 128 elements the
    largest ratio was 1.95 of 2 allowed); of 9,000 from kernels one more, dB of 64 elements over two rows, whose
    errors are those of 32 roundings of XA. Pooled, small results are held to the same limits with nothing left to
    luck, and a lost term still stands out by its size.
    """

    SMALL = 256

    def __init__(self) -> None:
        self._small: dict[tuple[str, torch.dtype, torch.dtype], list[tuple[Tensor, ...]]] = {}

    def assert_close(
        self, got: Tensor, plain: Tensor, truth: Tensor, *, what: str = "result", dtype: torch.dtype | None = None
    ) -> None:
        """As the function of this name, but a small result waits for `close()`; a wrong shape, dtype or NaN doesn't."""
        verdict = within_rule(got, plain, truth, what=what, dtype=dtype)
        if not verdict and (truth.numel() >= self.SMALL or not math.isfinite(verdict.rms_ratio)):
            raise AssertionError(verdict.message)
        if truth.numel() < self.SMALL:
            kept = self._small.setdefault((what, got.dtype, dtype or got.dtype), [])
            kept.append(tuple(tensor.detach().flatten().cpu() for tensor in (got, plain, truth)))

    def close(self) -> None:
        """Judges the small results of each name and dtype together."""
        for (what, _, dtype), results in self._small.items():
            got, plain, truth = (torch.cat(tensors) for tensors in zip(*results, strict=True))
            assert_close(got, plain, truth, what=f"{what} of {len(results)} small problems", dtype=dtype)
        self._small.clear()


def _worst(got: Tensor, plain: Tensor, truth: Tensor, error: Tensor) -> str:
    """Where the error is largest; a NaN is larger than anything."""
    flat = int(error.abs().nan_to_num(nan=math.inf, posinf=math.inf).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), truth.shape))
    values = ", ".join(
        f"{name} {float(t[index]):.6g}" for name, t in (("got", got), ("plain", plain), ("truth", truth))
    )
    bad = int((~got.isfinite()).sum())
    return f"worst at {index}: {values}" + (f"; {bad} of {got.numel()} elements are not finite" if bad else "")
