"""The compile matrix: every shipped kernel configuration for every architecture, without a GPU.

The cases come from check/compile/cases, dry_gpu.py compiles and judges them, planning/cost.py gives their work.
Cases are dealt out to processes of their own: Triton must not run its interpreter there, and a compiler that crashes
takes one case with it, not the report.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from lora_kernels.kernels.chip import CHIPS, Chip
from lora_kernels.planning import cost, multi_cost
from lora_kernels.planning.stacked_cost import StackedCallShape, stacked_dx, stacked_extend

if TYPE_CHECKING:
    from lora_kernels.check.compile.cases.case import Case
    from lora_kernels.check.compile.resources import Kernel

_MATRICES = {"swiglu": 3, "swiglu_bwd": 6}  # kernels element by element: (M, N) matrices read and written
_READING = -1  # stands for a case's number once all are compiled


@dataclass(frozen=True)
class Row:
    """One compiled kernel, or a case that failed to compile: then the numbers are 0 and ``faults`` says why.

    kernel: the launch's name in the cost model. variant: rank, mask and what else tells it from others; "of ..." for a
    second kernel of another's launch, which stands once. registers a thread; stack in bytes a thread, shared in bytes a
    block; spills and instructions: how many the code has. blocks, warps: of it on one multiprocessor, and the resource
    that limits them. flop, moved (bytes) and seconds: of one launch by the cost model, and what bounds it; 0 and empty
    where the model does not know the kernel. code: the start of Triton's hash.
    """

    arch: str
    kernel: str
    variant: str
    dtype: str
    tiles: str
    M: int
    N: int
    K: int
    r: int
    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared: int = 0
    blocks: int = 0
    warps: int = 0
    limit: str = ""
    instructions: Mapping[str, int] = field(default_factory=dict)
    flop: int = 0
    moved: int = 0
    seconds: float = 0.0
    bound: str = ""
    code: str = ""
    faults: Sequence[str] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """Its place in a report, and what it is: no two rows share it."""
        return (list(CHIPS).index(self.arch), self.kernel, self.dtype, self.variant, -self.M, self.tiles, self.N)


def compile_matrix(
    archs: Sequence[str], dtypes: Sequence[str] = (), kernels: Sequence[str] = (), jobs: int | None = None
) -> list[Row]:
    """A row for every shipped case of ``archs``, ``dtypes`` and ``kernels`` (all by default), from ``jobs`` processes.

    Raises:
        RuntimeError: the process that compiles could not start, or could not read what it compiled.
    """
    jobs = jobs or os.cpu_count() or 1
    asked = {"archs": list(archs), "dtypes": list(dtypes), "kernels": list(kernels), "step": jobs}
    with ThreadPoolExecutor(jobs) as pool:
        shares = pool.map(lambda job: _compile_share({**asked, "start": job}), range(jobs))
        rows = sorted((row for share in shares for row in share), key=lambda row: row.key)
    seen: set[tuple[str, str]] = set()
    once = []
    for row in rows:
        if not row.variant.startswith("of ") or (row.arch, row.code) not in seen:
            seen.add((row.arch, row.code))
            once.append(row)
    return once


def _compile_share(asked: Mapping[str, Any]) -> list[Row]:
    """Every step-th case from ``start`` on, in one process; after a compiler's crash in another, without its case."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    crashed: dict[int, Row] = {}
    while True:
        task = json.dumps({**asked, "skip": list(crashed)})
        done = subprocess.run([sys.executable, "-m", __name__, task], env=environment, capture_output=True, text=True)
        told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
        if done.returncode == 0:
            return [Row(**row) for number, row in told if number == _READING and row] + list(crashed.values())
        if not told or told[-1][0] == _READING:
            raise RuntimeError(f"the compile matrix could not {'be read' if told else 'start'}:\n{done.stderr[-2000:]}")
        number, row = told[-1]
        crash = f"the compiler crashed with {done.returncode}: {' '.join(done.stderr[-300:].split())}"
        crashed[number] = Row(**{**row, "faults": (crash,)})


def _compile_cases(
    archs: Sequence[str], dtypes: Sequence[str], kernels: Sequence[str], start: int, step: int, skip: Sequence[int]
) -> Iterator[tuple[int, Row | None]]:
    """For each case its number and a bare row as it begins; after all of them, (_READING, row) for what they gave."""
    # This runs in a process of its own; the report itself needs no Triton.
    from lora_kernels.check.compile.cases import shipped_cases
    from lora_kernels.check.compile.dry_gpu import DryGPU

    def wanted(case: Case) -> bool:
        return (not dtypes or _name(case.dtype) in dtypes) and (not kernels or case.kernel in kernels)

    cases = enumerate((arch, case) for arch in archs for case in shipped_cases(arch) if wanted(case))
    compiled: list[tuple[Case, Row, DryGPU]] = []
    failed: list[Row] = []
    for number, (arch, case) in islice(cases, start, None, step):
        if number in skip:
            continue
        bare = _bare(arch, case)
        yield number, bare
        gpu = DryGPU(CHIPS[arch])
        with gpu:
            try:
                case.launch()
            except Exception as error:  # whatever a compiler raises, the case must not ship and the rest is wanted
                reason = " ".join(str(error).split())[-300:]  # Triton quotes the kernel first, the cause comes last
                failed.append(dataclasses.replace(bare, faults=(f"{type(error).__name__}: {reason}",)))
        compiled.append((case, bare, gpu))
    yield _READING, None
    for row in failed:
        yield _READING, row
    for case, bare, gpu in compiled:
        names = [_launch_name(kernel) for kernel in gpu.kernels]
        named = names.index(case.kernel) if case.kernel in names else 0  # multi_grads follows multi_rows
        for index, kernel in enumerate(gpu.kernels):
            yield _READING, _filled(bare, case, kernel, index != named)


def _bare(arch: str, case: Case) -> Row:
    variant = case.label.removeprefix(case.kernel).strip()
    tiles = brief(case.config)
    return Row(arch, case.kernel, variant, _name(case.dtype), tiles, case.M, case.N, case.K, case.r)


def _launch_name(kernel: Kernel) -> str:
    return kernel.name.strip("_").removesuffix("_kernel")


def _filled(bare: Row, case: Case, kernel: Kernel, second: bool) -> Row:
    """The row of a compiled kernel; ``second``: it is not the one the case is named for."""
    name = _launch_name(kernel) if second else bare.kernel
    occupancy = kernel.occupancy
    row = dataclasses.replace(
        bare,
        kernel=name,
        variant=f"of {case.label}" if second else bare.variant,
        registers=kernel.resources.registers,
        spills=kernel.resources.spills,
        stack=kernel.resources.stack,
        shared=kernel.shared,
        blocks=occupancy.blocks,
        warps=occupancy.warps,
        limit=occupancy.limit,
        instructions=kernel.resources.instructions,
        code=kernel.code,
        faults=kernel.faults(),
    )
    return dataclasses.replace(row, **predicted(case, name, CHIPS[bare.arch]))


def predicted(case: Case, name: str, chip: Chip) -> dict[str, Any]:
    """flop, moved, seconds and bound of kernel ``name`` in a case by the cost model, empty where that knows none such.

    The sum that follows dyb_db is not as large as the one that follows a kernel that makes dA.
    """
    launch = _work(case, name)
    if launch is None:
        return {}
    time = cost.seconds(launch, case.dtype, chip)
    compute = cost.seconds(dataclasses.replace(launch, bytes=0), case.dtype, chip)
    bound = "launch" if time < 2 * cost.LAUNCH_SECONDS else "compute" if compute >= time else "memory"
    return {"flop": launch.flop, "moved": launch.bytes, "seconds": time, "bound": bound}


def _work(case: Case, name: str) -> cost.Launch | None:
    """FLOP and bytes of kernel ``name`` in a case; None where the cost model knows none such."""
    mask, bits = bool(case.dropout), case.dropout == "bits"
    if name in _MATRICES:
        return cost.Launch(name, 0, _MATRICES[name] * case.dtype.itemsize * case.M * case.N)
    if case.L:
        mix = multi_cost.MultiCallShape("fwd", case.M, case.N, case.K, case.L, case.L * case.r, case.dtype)
        return multi_cost.KERNELS[name](mix) if name in multi_cost.KERNELS else None
    if case.Ns:
        ranks = (case.r,) * len(case.Ns)
        stack = StackedCallShape("fwd", case.M, case.Ns, case.K, ranks, case.dtype, mask, bits=bits)
        problem, works = stack.whole, {work.__name__: partial(work, stack) for work in (stacked_extend, stacked_dx)}
        if name in works:
            return works[name]()
    else:
        problem = cost.CallShape("fwd", case.M, case.N, case.K, case.r, case.dtype, mask, bias=True, bits=bits)
    if name == "reduce" and case.kernel != "dyb_db":
        return cost.reduce_da(problem)
    return cost.KERNELS[name](problem) if name in cost.KERNELS else None


def brief(config: object) -> str:
    """A configuration in short: 128x128x64 w8 s3 for blocks, warps and stages, then what is not its default."""
    fields = dataclasses.fields(config)  # type: ignore[arg-type]
    values = {f.name: getattr(config, f.name) for f in fields}
    blocks = "x".join(str(values.pop(f.name)) for f in fields if f.name.startswith("BLOCK_"))
    parts = [blocks, *(f"{letter}{values.pop(name)}" for letter, name in _LETTERS.items() if name in values)]
    default = {f.name: f.default for f in fields}
    parts += [
        name.lower() if value is True else f"{name.lower()}={value}"
        for name, value in values.items()
        if value != default[name]
    ]
    return " ".join(parts)


_LETTERS = {"w": "num_warps", "s": "num_stages"}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    for number, row in _compile_cases(**json.loads(sys.argv[1])):
        print(json.dumps([number, row and dataclasses.asdict(row)]), flush=True)
