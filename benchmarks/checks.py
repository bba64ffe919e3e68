"""What must hold before a time means anything: the error rule, the dropout mask bit for bit, the same bits twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.blocks import Answers, Block, answers, block_masks, block_of, output_names
from benchmarks.cases import DTYPE_NAMES, Case
from benchmarks.rivals import Implementation, Layer, ours
from benchmarks.rows import Check
from lora_kernels import BackendUnavailableError
from lora_kernels.reference import generator_keep_mask, philox_keep_mask
from lora_kernels.testing import Problem, make_problem, plain, poison, truth, within_rule

RESULTS = ("Y", "dX", "dA", "dB", "dbias")
Mask = Callable[[Tensor, float, int, int], Tensor]
RIVAL_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # ||got - truth|| / ||truth||


def problem_of(case: Case, device: torch.device, bias: bool = False) -> Problem | Block:
    """The case's tensors, LoRA term as large as the base term."""
    if case.op != "lora_linear":
        return block_of(case, device, bias)
    return make_problem(
        case.M, case.N, case.K, case.r, case.dtype, device, bias=bias, dropout_p=case.p, strided=case.strided,
        adapter_dtype=torch.float32 if case.fp32_adapters else None,
    )  # fmt: skip


def step(layer: Layer, X: Tensor, dY: Tensor | tuple[Tensor, ...], backward: bool) -> Answers:
    """One forward, and with ``backward`` the gradients of X and of the layer's parameters, by name."""
    if not backward:
        with torch.no_grad():
            return _named(layer.forward(X))
    X = X.detach().requires_grad_()
    Y = layer.forward(X)
    gradients = torch.autograd.grad(Y, (X, *layer.params), dY)
    return _named(Y) | dict(zip(("dX", *layer.gradients), gradients, strict=False))


def _named(Y: Tensor | Sequence[Tensor]) -> Answers:
    outputs = (Y,) if isinstance(Y, Tensor) else tuple(Y)
    return dict(zip(output_names(len(outputs)), outputs, strict=True))


class Oracle:
    """Truth in fp64 and plain PyTorch's answer for one problem, without dropout and with the mask of its seed."""

    def __init__(self, problem: Problem | Block) -> None:
        self.problem = problem
        self._known: dict[str, tuple[Answers, Answers]] = {}

    def undropped(self) -> tuple[Answers, Answers]:
        return self._answers("none", None)

    def dropped(self, backend: str) -> tuple[Answers, Answers]:
        """With the mask that ``backend`` makes of the problem's seed."""
        q = self.problem
        if q.p == 0:
            return self.undropped()
        if backend == "reference" and q.X.device.type == "cpu":
            return self._answers("generator", lambda *sizes: generator_keep_mask(*sizes).bool())
        return self._answers("philox", philox_keep_mask)

    def _answers(self, key: str, mask: Mask | None) -> tuple[Answers, Answers]:
        if key not in self._known:
            self._known[key] = self._block(mask) if isinstance(self.problem, Block) else self._linear(mask)
        return self._known[key]

    def _linear(self, mask: Mask | None) -> tuple[Answers, Answers]:
        q = self.problem
        assert isinstance(q, Problem)
        keep = None if mask is None else mask(q.seed, q.p, *q.X.shape)
        exact, usual = vars(truth(q, keep)), vars(plain(q, keep))
        return exact, usual

    def _block(self, mask: Mask | None) -> tuple[Answers, Answers]:
        q = self.problem
        assert isinstance(q, Block)
        keeps = [None] * len(q.parts) if mask is None else block_masks(q, mask)
        return answers(q, keeps, torch.float64), answers(q, keeps, q.X.dtype)


def without_dropout(problem: Problem | Block) -> Problem | Block:
    """The same tensors, nothing dropped."""
    if isinstance(problem, Block):
        parts = tuple(dataclasses.replace(part, p=0.0) for part in problem.parts)
        return dataclasses.replace(problem, parts=parts, p=0.0)
    return dataclasses.replace(problem, p=0.0)


def judge(case: Case, oracle: Oracle, implementation: Implementation, backward: bool = True) -> Iterator[Check]:
    """Ours by the error rule, on poisoned memory, with the mask of the problem's seed.

    A rival draws masks of its own and rounds in its own way: without dropout, by RIVAL_TOLERANCE. A plan that refuses
    the case gives one check that says so.
    """
    problem = oracle.problem
    try:
        if implementation.ours:
            with poison():
                got = step(implementation.build(problem, problem.seed), problem.X, problem.dY, backward)
            exact, usual = oracle.dropped(implementation.backend)
        else:
            layer = implementation.build(without_dropout(problem), None)
            got = step(layer, problem.X, problem.dY, backward)
            exact, usual = oracle.undropped()
    except BackendUnavailableError as refusal:
        yield check_of("rule", case, implementation, "", "refused", message=str(refusal))
        return
    for name, tensor in got.items():
        expected, usually = exact[name], usual[name].to(tensor.dtype)
        if implementation.ours:
            verdict = within_rule(tensor.detach(), usually, expected, dtype=case.dtype)
            ratios: tuple[float | None, float | None] = (verdict.max_ratio, verdict.rms_ratio)
            ok, message = verdict.ok, verdict.message
        else:
            error = float((tensor.detach().double() - expected).norm() / expected.norm())
            ok, message, ratios = error <= RIVAL_TOLERANCE[case.dtype], f"relative error {error:.1e}", (None, None)
        status = "ok" if ok else "failed"
        yield check_of("rule", case, implementation, name, status, *ratios, message="" if ok else message)


def check_of(
    check: str,
    case: Case,
    implementation: Implementation | str,
    what: str,
    status: str,
    max_ratio: float | None = None,
    rms_ratio: float | None = None,
    message: str = "",
) -> Check:
    """A Check of ``case``; that of a block says which operator it was."""
    if isinstance(implementation, Implementation):
        name = implementation.name + (f" {implementation.backend}" if implementation.ours else "")
    else:
        name = implementation
    check += "" if case.op == "lora_linear" else f" {case.op}"
    return Check(
        check, DTYPE_NAMES[case.dtype], case.M, case.N_shown, case.K, case.r, case.p, name, what, status, max_ratio,
        rms_ratio, message,
    )  # fmt: skip


def judged(case: Case, name: str, ok: bool, message: str, check: str) -> Check:
    """A check that came to an end; the message is kept where it failed."""
    return check_of(check, case, name, "", "ok" if ok else "failed", message="" if ok else message)


def not_run(case: Case, implementation: Implementation | str, why: str, check: str = "rule") -> Check:
    """A check that this machine cannot make."""
    return check_of(check, case, implementation, "", "not run", message=why)


def failure(case: Case, implementation: Implementation | str, error: BaseException, check: str = "rule") -> Check:
    """A check that ended in an exception."""
    line = next(iter(str(error).strip().splitlines()), "")
    return check_of(check, case, implementation, "", "failed", message=f"{type(error).__name__}: {line[:300]}")


def unit_failure(unit: str, error: BaseException | str) -> Check:
    """A unit of a round that gave nothing."""
    said = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return Check("unit", "", 0, 0, 0, 0, 0.0, "", unit, "failed", message=said[:300])


def same_bits(case: Case, device: torch.device, backend: str, runs: int = 3) -> Iterator[Check]:
    """Forward and backward repeated on the same problem give the same bits."""
    problem, implementation = problem_of(case, device, bias=True), ours(backend)
    layer = implementation.build(problem, problem.seed)
    first, *others = [step(layer, problem.X, problem.dY, backward=True) for _ in range(runs)]
    for name, tensor in first.items():
        differing = sum(int((tensor != other[name]).sum()) for other in others)
        message = f"{differing} elements differ in {runs - 1} repetitions" if differing else ""
        yield check_of("determinism", case, implementation, name, "failed" if differing else "ok", message=message)
