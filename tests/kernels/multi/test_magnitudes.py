"""Sizes of operands that 16-bit intermediates cannot hold, by every plan of mixed batches, against the error rule.

A small B makes dYB small, a large A or scaling XA large; PEFT computes float32 adapters over float16 in float32.
"""

from itertools import product

import pytest
import torch

import lora_kernels as lk
from lora_kernels.kernels import csrc
from lora_kernels.kernels.chip import CHIPS
from lora_kernels.planning import multi_plan
from lora_kernels.planning.multi_cost import MultiCallShape
from lora_kernels.testing import MAGNITUDES, Magnitudes, Pool
from lora_kernels.testing.multi import make_multi_problem, mix_ids, multi_plain, multi_truth
from tests.kernels.multi.test_isolation import PLANS, results

RANKS = (8, 3, 0, 17)
QUICK = ("tiny-B", "large-scaling", "large-A")  # of Triton's plans, in float16


@pytest.mark.parametrize(
    ("plan", "dtype", "sizes"),
    [
        pytest.param(plan, dtype, sizes, marks=pytest.mark.slow if slow else ())
        for plan, dtype, sizes in product(
            [plan for plan in PLANS if plan != "cpp"], (torch.float16, torch.bfloat16), MAGNITUDES
        )
        for slow in ["triton" in plan and (sizes.name not in QUICK or dtype == torch.bfloat16)]
    ],
    ids=lambda value: value.name if isinstance(value, Magnitudes) else str(value),
)
def test_sizes_beyond_16_bit_intermediates(
    plan: str, dtype: torch.dtype, sizes: Magnitudes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool()
    ids = mix_ids("half", 60, len(RANKS), run=2, seed=4)
    for adapters in (torch.float32,) if sizes.wide else (torch.float32, dtype):
        p = make_multi_problem(ids, 40, 48, RANKS, dtype, adapter_dtype=adapters, pool_layout=True, magnitudes=sizes)
        plain, truth = multi_plain(p), multi_truth(p)
        for name, got in results(p, plan, monkeypatch).items():
            pool.assert_close(got, getattr(plain, name), getattr(truth, name), what=name, dtype=dtype)
    pool.close()


@pytest.mark.skipif(csrc.update_missing() is not None, reason="the extension is not built")
@pytest.mark.parametrize("sizes", [sizes for sizes in MAGNITUDES if not sizes.wide], ids=lambda sizes: sizes.name)
def test_the_same_of_the_operator_in_cpp(sizes: Magnitudes, monkeypatch: pytest.MonkeyPatch) -> None:
    p = make_multi_problem(mix_ids("half", 60, 4, run=2, seed=4), 40, 48, RANKS, torch.bfloat16, magnitudes=sizes)
    pool = Pool()
    pool.assert_close(results(p, "cpp", monkeypatch)["Y"], multi_plain(p).Y, multi_truth(p).Y, what="Y")
    pool.close()


def test_float16_is_refused_where_XA_has_16_bits() -> None:
    assert "XA may leave float16's range" in str(csrc.refusal(torch.float16, 64))
    problem = MultiCallShape("fwd", 16, 4096, 4096, 8, 128, torch.float16)
    plan = next(plan for plan in multi_plan.candidates(problem, CHIPS["sm_90"]) if plan.name == "cuda")
    assert plan.refused is not None
    assert multi_plan.choose(problem, CHIPS["sm_90"]).name != "cuda"


@pytest.mark.parametrize("magnitude", [1e-4, 1e-5])
def test_gradients_of_float32_adapters_over_float16_are_those_of_float32(magnitude: float) -> None:
    """dA is what float32 arithmetic gives, to float16's own rounding of X and dY alone, which both share."""
    p = make_multi_problem(
        mix_ids("uniform", 60, 4, seed=4), 40, 48, RANKS, torch.float16, adapter_dtype=torch.float32, bias=False,
        magnitudes=Magnitudes("small", B=magnitude, dY=1e-3),
    )  # fmt: skip
    A = p.slots.A.clone().requires_grad_()
    lk.multi_lora_linear(p.X, p.W, p.slots._replace(A=A), p.ids, backend="reference").backward(p.dY)
    assert A.grad is not None
    torch.testing.assert_close(A.grad.double(), multi_truth(p).dA, rtol=1e-3, atol=1e-6 * float(A.grad.abs().max()))
