"""Problems of several projections that read one X (q, k, v; gate, up), with fp64 truth and plain PyTorch's answer.

Results are dictionaries: "Y0", "dA0", "dB0", "dbias0" for the first projection and so on, and one "dX" for all.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_kernels.testing.problems import Problem, Results, make_problem, plain, truth


def make_stacked(
    M: int,
    K: int,
    Ns: Sequence[int],
    ranks: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    biases: Sequence[bool] | None = None,
    scalings: Sequence[float] | None = None,
    adjacent: bool = False,
    dropout_p: float = 0.0,
    adapter_dtype: torch.dtype | None = None,
    strided: bool = False,
    seed: int = 0,
) -> list[Problem]:
    """One Problem a projection, all with the same X, dropout and seed.

    Args:
        Ns, ranks, biases, scalings: of each projection (by default a bias for all but the second, and 1.7 for all).
        adjacent: the W of all are parts of one buffer.
    """
    problems: list[Problem] = []
    for p, (N, r) in enumerate(zip(Ns, ranks, strict=True)):
        q = make_problem(
            M, N, K, r, dtype, device,
            bias=p != 1 if biases is None else biases[p], dropout_p=dropout_p, adapter_dtype=adapter_dtype,
            strided=strided, seed=seed + 100 * p, scaling=1.7 if scalings is None else scalings[p],
        )  # fmt: skip
        problems.append(q if p == 0 else replace(q, X=problems[0].X, seed=problems[0].seed))
    if adjacent:
        parts = torch.cat([q.W for q in problems]).split(list(Ns))
        problems = [replace(q, W=part) for q, part in zip(problems, parts, strict=True)]
    return problems


def plain_stacked(
    problems: Sequence[Problem], keep: Tensor | None = None, live: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """What plain PyTorch gives for separate layers whose gradients of X are added, in the problems' dtype.

    ``live``: the projections whose output has a gradient; all by default.
    """
    return _collect(problems, keep, live, plain)


def truth_stacked(
    problems: Sequence[Problem], keep: Tensor | None = None, live: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """The same in float64."""
    return _collect(problems, keep, live, truth)


def _collect(
    problems: Sequence[Problem],
    keep: Tensor | None,
    live: Sequence[int] | None,
    solve: Callable[[Problem, Tensor | None], Results],
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for p, problem in enumerate(problems):
        solved = solve(problem, keep)
        found[f"Y{p}"] = solved.Y
        if live is None or p in live:
            found["dX"] = solved.dX if "dX" not in found else found["dX"] + solved.dX
            found |= {f"dA{p}": solved.dA, f"dB{p}": solved.dB}
            if solved.dbias is not None:
                found[f"dbias{p}"] = solved.dbias
    return found
