"""Computes a cell of the table: one feature on one family, run with PEFT, with PEFT in float64, and accelerated."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import transformers

from lora_kernels.check.compat.calls import Calls, counted
from lora_kernels.check.compat.families import Family
from lora_kernels.check.compat.features import Feature
from lora_kernels.check.compat.judge import Answers, Errors, errors, fault
from lora_kernels.check.compat.stage import Stage, Unavailable
from lora_kernels.errors import LoRAKernelsError

SURE = 0.5  # share of the rule's limits: after a draw within it no other seeds run
FUSED, PARTLY, PEFT, REFUSED, ABSENT, WRONG = "fused", "partly", "PEFT", "refused", "-", "WRONG"


@dataclass(frozen=True)
class Cell:
    """Result of one feature on one family.

    status: fused (every call), partly, PEFT (its own forward every time), refused, - (PEFT or the family does not have
    it) or WRONG. reasons: for the status. fused, calls: fused calls and all calls with the first seed.
    """

    feature: str
    family: str
    status: str
    reasons: tuple[str, ...] = ()
    fused: int = 0
    calls: int = 0


def try_cell(feature: Feature, family: Family) -> Cell:
    """Run the feature on the family. An exception becomes part of the result."""
    draws: list[Errors] = []
    found = Calls()
    for seed in range(feature.draws):
        try:
            plain, truth = (_run(feature, Stage(family, seed, exact=exact)) for exact in (False, True))
        except Unavailable as why:
            return Cell(feature.name, family.name, ABSENT, (str(why),))
        except Exception as error:  # PEFT, transformers or torch fail without lora_kernels too
            return Cell(feature.name, family.name, ABSENT, (f"PEFT: {_line(error)}",))
        with counted() as calls:
            stage = Stage(family, seed, accelerated=True, calls=calls)
            try:
                got = _run(feature, stage)
                draws.append(errors(got, plain, truth, feature.dtype))
            except Unavailable as why:
                return Cell(feature.name, family.name, ABSENT, (str(why),))
            except LoRAKernelsError as refusal:
                return Cell(feature.name, family.name, REFUSED, (_line(refusal),))
            except Exception as error:  # PEFT alone gave a result
                return Cell(feature.name, family.name, WRONG, (_line(error),), calls.fused, calls.begun)
        if seed == 0:
            found = calls
            for model in stage.models:
                found.note(model)
        if all(torch.equal(got[name], plain[name]) for name in got):
            break  # equal bits: other seeds would give the same status
        if feature.dtype is torch.float32 and len(draws) == 1 and fault(draws, feature.dtype, SURE) is None:
            break
    wrong = fault(draws, feature.dtype)
    status = WRONG if wrong is not None else _status(found)
    reasons = (wrong,) if wrong is not None else tuple(found.reasons)
    return Cell(feature.name, family.name, status, reasons, found.fused, found.begun)


def _status(calls: Calls) -> str:
    if calls.fused == 0:
        return PEFT
    return PARTLY if calls.peft or calls.reasons else FUSED


def _run(feature: Feature, stage: Stage) -> Answers:
    with _quiet():
        return feature.scenario(stage)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings that models of this size and kind cause."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _line(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:200]}" if not isinstance(error, LoRAKernelsError) else first[:200]
