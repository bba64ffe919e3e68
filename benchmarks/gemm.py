"""g: our plain GEMM beside the vendor's library, the number that every prediction is multiplied by.

The extended GEMM with no rank at all (r = 0) is our plain GEMM; with r = 1 it pays for one tile of ranks. A few other
tiles than the default run beside it, since g is also what a better configuration would win.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks import checks
from benchmarks.cases import Case
from benchmarks.measure import Bench, Found, recorded, row
from benchmarks.roofline import forward_work
from benchmarks.rows import Check
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


def _tiles(config: GemmConfig) -> str:
    return f"{config.BLOCK_M}x{config.BLOCK_N}x{config.BLOCK_K} w{config.num_warps} s{config.num_stages}"


def plain_gemm(case: Case, bench: Bench) -> Found:
    """Rows "gemm" (Y = X W^T) and "gemm_nn" (dX = dY W) of the library and of our kernels, r = 0 and 1."""
    from lora_kernels.kernels.lora_linear import extend
    from lora_kernels.kernels.lora_linear_bwd import dx_da

    problem, chip = checks.problem_of(case, bench.device), chip_for(bench.device)
    X, W, dY = problem.X, problem.W, problem.dY
    none = {r: (X.new_zeros(case.M, r), X.new_zeros(case.N, r), X.new_zeros(r, case.K)) for r in (0, 1)}
    default = gemm_config(case.M, case.N, case.dtype, chip)
    others = [c for c in OTHER_TILES if c != default and is_valid(c, case.dtype, 16, chip) is None]
    forward: dict[tuple[str, int], Call] = {(LIBRARY, 0): lambda: X @ W.t()}
    for config, r in [(default, 0), (default, 1), *((config, 0) for config in others)]:
        forward[f"extend {_tiles(config)}", r] = partial(extend, X, W, none[r][0], none[r][1], None, config)
    tiles = gemm_config(case.M, case.K, case.dtype, chip)
    backward: dict[tuple[str, int], Call] = {(LIBRARY, 0): lambda: dY @ W}
    for r in (0, 1):
        backward[f"dx {_tiles(tiles)}", r] = partial(
            _dx, partial(dx_da, dY, W, none[r][0], none[r][2], X, None, tiles, make_da=False)
        )
    Y, dX = (P.double() @ Q.double() for P, Q in ((X, W.t()), (dY, W)))
    rows, found = [], []  # type: ignore[var-annotated]
    for op, calls, exact in (("gemm", forward, Y), ("gemm_nn", backward, dX)):
        right = {name: call for name, call in calls.items() if _judged(case, name, call, calls, exact, found)}
        samples = interleaved({f"{name} r{r}": call for (name, r), call in right.items()}, bench.clock, bench.rounds)
        times = {key: spread(samples[f"{key[0]} r{key[1]}"]) for key in right}
        frozen = times[LIBRARY, 0].p50 if (LIBRARY, 0) in times else None
        for (name, r), taken in times.items():
            shape = Case(case.M, case.N, case.K, r, dtype=case.dtype)
            plan = "" if name == LIBRARY else ("default" if name.endswith(_tiles(default)) else "other tiles")
            work = [forward_work(shape, lora=False)]
            rows.append(row(shape, "fwd", name, plan, taken, work, bench.ceilings(), frozen, frozen, op=op))
    return rows, found


def _dx(make: partial[tuple[Tensor, Tensor | None]]) -> Tensor:
    return make()[0]


def _judged(
    case: Case, key: tuple[str, int], call: Call, calls: dict[tuple[str, int], Call], exact: Tensor, found: list[Check]
) -> bool:
    """Whether the call's product keeps the error rule, the library's being the plain one."""
    name, r = key
    with recorded(case, name, found):
        with poison():
            got = call()
        plain = calls[LIBRARY, 0]()
        assert isinstance(got, torch.Tensor)
        assert isinstance(plain, torch.Tensor)
        verdict = within_rule(got, plain, exact, what=f"{name} r{r}")
        if verdict:
            found.append(checks.passed(case, name, "gemm"))
        else:
            found.append(checks.failure(case, name, ValueError(verdict.message), "gemm"))
    return found[-1].status == "ok"
