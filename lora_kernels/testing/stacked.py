"""Problems of several projections that read one X (q, k, v; gate, up) and of SwiGLU blocks, with fp64 truth and plain
PyTorch's answer.

Results are dictionaries: "Y0", "dA0", "dB0", "dbias0" for the first projection and so on, and one "dX" for all. Those
of a block have one "Y" and the gradients of gate (0), up (1) and down (2).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_kernels.testing.problems import Magnitudes, Problem, Results, lora_dtype, make_problem, plain, truth


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
    magnitudes: Magnitudes | None = None,
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
            magnitudes=magnitudes,
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


def make_mlp(
    M: int,
    K: int,
    F: int,
    N: int,
    ranks: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    dropout_p: float = 0.0,
    adapter_dtype: torch.dtype | None = None,
    adjacent: bool = False,
    seed: int = 0,
    magnitudes: Magnitudes | None = None,
) -> list[Problem]:
    """Problems of gate, up (F, K) and down (N, F); X and dY of the block are the first's X and the last's dY."""
    down = make_problem(
        M, N, F, ranks[2], dtype, device,
        dropout_p=dropout_p, adapter_dtype=adapter_dtype, seed=seed + 200, scaling=1.3, magnitudes=magnitudes,
    )  # fmt: skip
    first = make_stacked(
        M, K, (F, F), ranks[:2], dtype, device,
        scalings=(1.7, 0.8), adjacent=adjacent, dropout_p=dropout_p, adapter_dtype=adapter_dtype, seed=seed,
        magnitudes=magnitudes,
    )  # fmt: skip
    return [*first, down]


def plain_mlp(
    problems: Sequence[Problem], keep_x: Tensor | None = None, keep_h: Tensor | None = None
) -> dict[str, Tensor]:
    """What plain PyTorch gives for down(silu(gate(X)) * up(X)) and its gradients, in the problems' dtype."""
    return _block(problems, keep_x, keep_h, problems[0].X.dtype)


def truth_mlp(
    problems: Sequence[Problem], keep_x: Tensor | None = None, keep_h: Tensor | None = None
) -> dict[str, Tensor]:
    """The same in float64."""
    return _block(problems, keep_x, keep_h, torch.float64)


def _block(
    problems: Sequence[Problem], keep_x: Tensor | None, keep_h: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    def leaf(values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.detach().to(dtype, copy=True).requires_grad_()

    adapters_in = torch.float64 if dtype == torch.float64 else problems[0].A.dtype
    branch = lora_dtype(dtype, adapters_in)
    leaves = {"X": leaf(problems[0].X, dtype)}
    for i, q in enumerate(problems):
        leaves |= {f"A{i}": leaf(q.A, adapters_in), f"B{i}": leaf(q.B, adapters_in)}
        if q.bias is not None:
            leaves[f"bias{i}"] = leaf(q.bias, dtype)

    def layer(i: int, X: Tensor, keep: Tensor | None) -> Tensor:
        q = problems[i]
        dropped = X if keep is None else torch.where(keep, X * (1 / (1 - q.p)), 0)
        low = linear(linear(dropped.to(branch), leaves[f"A{i}"].to(branch)), leaves[f"B{i}"].to(branch))
        return (linear(X, q.W.detach().to(dtype), leaves.get(f"bias{i}")) + q.scaling * low).to(dtype)

    linear = torch.nn.functional.linear
    X = leaves["X"]
    Y = layer(2, torch.nn.functional.silu(layer(0, X, keep_x)) * layer(1, X, keep_x), keep_h)
    Y.backward(problems[2].dY.to(dtype))
    found = {"Y": Y.detach()}
    for name, tensor in leaves.items():
        assert tensor.grad is not None
        found[f"d{name}"] = tensor.grad
    return found
