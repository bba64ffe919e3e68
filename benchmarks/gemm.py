"""g: our plain GEMM beside the vendor's library, the number that every prediction is multiplied by.

The extended GEMM of every rung (the pointer kernel, then each plan that has an extended product of its own) with no
rank at all (r = 0) is our plain GEMM; with r = 1 it pays for one tile of ranks. A few other tiles than the default run
beside the pointer kernel, since g is also what a better configuration would win.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks import checks
from benchmarks.cases import Case
from benchmarks.measure import Bench, Found, recorded, row
from benchmarks.roofline import forward_work
from benchmarks.rows import Check, Row
from benchmarks.timing import Call, interleaved
from lora_kernels import BackendUnavailableError
from lora_kernels.kernels.chip import Chip
from lora_kernels.kernels.tiles import GemmConfig, gemm_config, is_valid
from lora_kernels.planning.choose import OPT_IN, chip_for, triton_kernels
from lora_kernels.planning.cost import CallShape
from lora_kernels.planning.plans import BY_NAME
from lora_kernels.testing import Problem, poison, within_rule
from lora_kernels.tuning.measure import spread

LIBRARY = "cublas"
POINTER = "shrink_extend"
TAKE_NO_RANK = (POINTER, "tma_extend")  # kernels that read XA through pointers; a descriptor has a column at least
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


def rungs() -> list[str]:
    """Plans with an extended product of their own: the pointer kernel's, then those of the launchers' table."""
    return [POINTER, *(plan for plan in OPT_IN if plan.endswith("_extend"))]


def _tiles(config: Any) -> str:
    stages = getattr(config, "num_stages", None) or getattr(config, "STAGES", "")
    return f"{config.BLOCK_M}x{config.BLOCK_N}x{config.BLOCK_K} w{config.num_warps} s{stages}"


def plain_gemm(case: Case, rung: str, bench: Bench) -> Found:
    """Rows "gemm" (Y = X W^T) and "gemm_nn" (dX = dY W): the library's first, then the rung's."""
    problem, chip = checks.problem_of(case, bench.device), chip_for(bench.device)
    assert isinstance(problem, Problem)
    X, W, dY = problem.X, problem.W, problem.dY
    found: list[Check] = []
    forward = [Product(LIBRARY, "", 0, lambda: X @ W.t())]
    backward = [Product(LIBRARY, "", 0, lambda: dY @ W)]
    try:
        forward += _pointer(problem, case, chip) if rung == POINTER else _forward(problem, case, chip, rung)
        backward += _backward(problem, case, chip, rung)
    except BackendUnavailableError as refusal:
        found.append(replace(checks.not_run(case, rung, str(refusal), check="gemm"), status="refused"))
        return [], found
    rows = _beside_library("gemm", forward, X.double() @ W.double().t(), case, bench, found)
    return rows + _beside_library("gemm_nn", backward, dY.double() @ W.double(), case, bench, found), found


def _pointer(problem: Problem, case: Case, chip: Chip) -> Iterator[Product]:
    from lora_kernels.kernels.linear.lora_linear import extend

    X, W = problem.X, problem.W
    default = gemm_config(case.M, case.N, case.dtype, chip)
    others = [c for c in OTHER_TILES if c != default and is_valid(c, case.dtype, 16, chip) is None]
    wanted = [(0, default, "default"), (1, default, "default"), *((0, config, "other tiles") for config in others)]
    for r, config, plan in wanted:
        call = partial(extend, X, W, X.new_zeros(case.M, r), X.new_zeros(case.N, r), None, config)
        yield Product(f"extend {_tiles(config)}", plan, r, call)


def _config(case: Case, chip: Chip, rung: str, op: str) -> Any:
    """The rung's own tiles. BackendUnavailableError where it refuses the case."""
    direction = getattr(BY_NAME[rung], op)
    q = CallShape(op, case.M, case.N, case.K, 1, case.dtype)
    if reason := direction.refused(q, chip):
        raise BackendUnavailableError(f"{rung}: {reason}")
    return direction.tiles(q, chip)


def _ranks(rung: str) -> tuple[int, ...]:
    return (0, 1) if rung in TAKE_NO_RANK else (1,)


def _forward(problem: Problem, case: Case, chip: Chip, rung: str) -> Iterator[Product]:
    X, W = problem.X, problem.W
    kernel, config = triton_kernels().EXTEND[rung][0], _config(case, chip, rung, "fwd")
    for r in _ranks(rung):
        call = partial(kernel, X, W, X.new_zeros(case.M, r), X.new_zeros(case.N, r), None, config, chip.units)
        yield Product(f"{rung} {_tiles(config)}", "default", r, call)


def _backward(problem: Problem, case: Case, chip: Chip, rung: str) -> Iterator[Product]:
    from lora_kernels.kernels.linear.lora_linear_bwd import dx_da

    X, W, dY = problem.X, problem.W, problem.dY
    config, DX = _config(case, chip, rung, "bwd"), triton_kernels().DX
    make = partial(DX[rung][0], drop=None, config=config, units=chip.units) if rung in DX else None
    for r in _ranks(rung):
        operands = dY, W, X.new_zeros(case.M, r), X.new_zeros(r, case.K), X
        call = partial(make or partial(dx_da, drop=None, config=config), *operands, make_da=False)
        yield Product(f"dx {rung} {_tiles(config)}", "default", r, lambda call=call: call()[0])  # type: ignore[misc]


def _beside_library(
    op: str, products: Sequence[Product], exact: Tensor, case: Case, bench: Bench, found: list[Check]
) -> list[Row]:
    """Rows of the products that keep the error rule, the library's (the first of them) being the plain one."""
    plain = products[0].call()
    assert isinstance(plain, Tensor)
    right: dict[str, Product] = {}
    for product in products:
        with recorded(case, f"{op} {product}", found, check="gemm"):
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
