"""g: our plain GEMM beside the vendor's library, the number that every prediction is multiplied by.

The extended GEMM with no rank at all (r = 0) is our plain GEMM; with r = 1 it pays for one tile of ranks. A few other
tiles than the default run beside it, since g is also what a better configuration would win.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from benchmarks import checks
from benchmarks.cases import Case
from benchmarks.measure import Bench, Found, recorded, row
from benchmarks.roofline import forward_work
from benchmarks.rows import Check, Row
from benchmarks.timing import Call, interleaved, spread
from lora_kernels.kernels.tuning import GemmConfig, gemm_config, is_valid
from lora_kernels.plan import chip_for
from lora_kernels.testing import poison, within_rule

LIBRARY = "cublas"
OTHER_TILES = (
    GemmConfig(128, 256, 64, num_warps=8, num_stages=3),
    GemmConfig(256, 128, 64, num_warps=8, num_stages=3),
    GemmConfig(128, 128, 64, num_warps=4, num_stages=4),
    GemmConfig(128, 256, 32, num_warps=8, num_stages=4),
)


@dataclass(frozen=True)
class Product:
    """One way to make a product: who makes it, with which tiles, at which rank."""

    name: str
    plan: str
    r: int
    call: Call

    def __str__(self) -> str:
        return f"{self.name} r{self.r}"


def _tiles(config: GemmConfig) -> str:
    return f"{config.BLOCK_M}x{config.BLOCK_N}x{config.BLOCK_K} w{config.num_warps} s{config.num_stages}"


def plain_gemm(case: Case, bench: Bench) -> Found:
    """Rows "gemm" (Y = X W^T) and "gemm_nn" (dX = dY W): the library's first, then ours at rank 0 and 1."""
    from lora_kernels.kernels.lora_linear import extend
    from lora_kernels.kernels.lora_linear_bwd import dx_da

    problem, chip = checks.problem_of(case, bench.device), chip_for(bench.device)
    X, W, dY = problem.X, problem.W, problem.dY
    default, narrow = gemm_config(case.M, case.N, case.dtype, chip), gemm_config(case.M, case.K, case.dtype, chip)
    others = [c for c in OTHER_TILES if c != default and is_valid(c, case.dtype, 16, chip) is None]

    def ours(r: int, config: GemmConfig, plan: str) -> Product:
        call = partial(extend, X, W, X.new_zeros(case.M, r), X.new_zeros(case.N, r), None, config)
        return Product(f"extend {_tiles(config)}", plan, r, call)

    def ours_nn(r: int) -> Product:
        make = partial(dx_da, dY, W, X.new_zeros(case.M, r), X.new_zeros(r, case.K), X, None, narrow, make_da=False)
        return Product(f"dx {_tiles(narrow)}", "default", r, lambda: make()[0])

    forward = [Product(LIBRARY, "", 0, lambda: X @ W.t()), ours(0, default, "default"), ours(1, default, "default")]
    forward += [ours(0, config, "other tiles") for config in others]
    backward = [Product(LIBRARY, "", 0, lambda: dY @ W), ours_nn(0), ours_nn(1)]
    found: list[Check] = []
    rows = _beside_library("gemm", forward, X.double() @ W.double().t(), case, bench, found)
    return rows + _beside_library("gemm_nn", backward, dY.double() @ W.double(), case, bench, found), found


def _beside_library(
    op: str, products: Sequence[Product], exact: Tensor, case: Case, bench: Bench, found: list[Check]
) -> list[Row]:
    """Rows of the products that keep the error rule, the library's (the first of them) being the plain one."""
    plain = products[0].call()
    assert isinstance(plain, Tensor)
    right: dict[str, Product] = {}
    for product in products:
        with recorded(case, str(product), found):
            with poison():
                got = product.call()
            assert isinstance(got, Tensor)
            verdict = within_rule(got, plain, exact)
            found.append(checks.judged(case, f"{op} {product}", verdict.ok, verdict.message, check="gemm"))
            if verdict:
                right[str(product)] = product
    samples = interleaved({name: product.call for name, product in right.items()}, bench.clock, bench.rounds)
    times = {name: spread(taken) for name, taken in samples.items()}
    library = times[str(products[0])].p50
    rows = []
    for name, product in right.items():
        shape = Case(case.M, case.N, case.K, product.r, dtype=case.dtype)
        work = [forward_work(shape, lora=False)]
        rows.append(
            row(shape, "fwd", product.name, product.plan, times[name], work, bench.ceilings(), library, library, op=op)
        )
    return rows
