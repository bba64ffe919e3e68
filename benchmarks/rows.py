"""Result rows, checks, the machine they come from, and the journal that a cut-off run keeps."""

from __future__ import annotations

import csv
import datetime
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]
REHEARSAL = "rehearsal"


@dataclass(frozen=True)
class Machine:
    """Where and with what a row was taken; ``gpu`` is the GPU's name, "cpu: MODEL, n threads", or "rehearsal"."""

    gpu: str
    driver: str
    cuda: str
    torch: str
    triton: str
    commit: str
    date: str


@dataclass(frozen=True)
class Row:
    """One timing. Times in ms; ``gbps`` counts the bytes of roofline.Work; a ratio is of medians of the same run.

    ``N``: of several projections on one X their sizes, "4096+1024+1024"; of an MLP its inner width.
    ``peak_mib`` is what a call holds at its peak beyond its inputs, ``saved_mib`` what it keeps between forward and
    backward beside the parameters, ``operators`` what it dispatches; None (an empty cell) is "not measured". A mixed
    batch has ``L`` adapters of ``ranks`` ("16", "8-64"; ``r`` is the widest) that sequences of ``sequence`` rows use as
    ``distribution`` says.
    """

    op: str
    mode: str
    dtype: str
    format: str
    M: int
    N: int | str
    K: int
    r: int
    L: int
    dropout: float
    plan: str
    implementation: str
    ms_p50: float
    ms_p20: float
    ms_p80: float
    tflops: float | None
    gbps: float | None
    pct_of_bound: float | None
    peak_mib: float | None
    ratio_to_frozen: float | None
    ratio_to_best_rival: float | None
    saved_mib: float | None = None
    operators: int | None = None
    ranks: str | None = None
    distribution: str | None = None
    sequence: int | None = None


@dataclass(frozen=True)
class Check:
    """One judgement. ``status``: ok, failed, refused (a plan that says it cannot) or not run."""

    check: str
    dtype: str
    M: int
    N: int | str
    K: int
    r: int
    dropout: float
    implementation: str
    what: str
    status: str
    max_ratio: float | None = None
    rms_ratio: float | None = None
    message: str = ""


def columns(kind: type[Row] | type[Check]) -> list[str]:
    """The columns of a table of rows or checks: its own, then the machine's."""
    return [field.name for each in (kind, Machine) for field in fields(each)]


def record(item: Row | Check, machine: Machine) -> Record:
    """A row or check as a flat dict, floats at six digits."""
    values = asdict(item) | asdict(machine)
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in values.items()}


def this_machine(rehearse: bool = False) -> Machine:
    """The machine this process runs on."""
    cuda = torch.cuda.is_available()
    if rehearse:
        gpu = REHEARSAL
    elif cuda:
        gpu = torch.cuda.get_device_name()
    else:
        gpu = f"cpu: {_cpu_model()}, {torch.get_num_threads()} threads"
    return Machine(
        gpu=gpu,
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        cuda=torch.version.cuda or "",
        torch=torch.__version__,
        triton=_triton_version(),
        commit=_commit(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def _commit() -> str:
    """BENCH_COMMIT where the files were copied without their history, else git's; "+" for changed sources."""
    given = os.environ.get("BENCH_COMMIT")
    if given:
        return given
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = head and _output("git", "status", "--porcelain", "--", "lora_kernels", "benchmarks")
    return (head + "+" if changed else head) or "unknown"


def _output(*command: str) -> str:
    """What a command prints, or nothing where it is absent or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else ""


class Journal:
    """Finished units of work, one JSON line each; rows.csv and checks.csv are written from it.

    A line is appended in one go under a lock, so several processes may write; a line cut off by a crash counts as a
    unit not done.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "journal.jsonl"

    def append(
        self, unit: str, rows: Sequence[Record], checks: Sequence[Record], curves: Sequence[Record] = ()
    ) -> None:
        entry = json.dumps({"unit": unit, "rows": list(rows), "checks": list(checks), "curves": list(curves)})
        with self.path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(f"\n{entry}\n".encode())  # the first newline ends a line that was cut off
            file.flush()
            os.fsync(file.fileno())

    def entries(self) -> Iterator[Record]:
        """{"unit", "rows", "checks", "curves"} of every finished unit."""
        if not self.path.exists():
            return
        for line in self.path.read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
            except ValueError:  # an empty line, or one that a crash cut off
                continue
            yield entry

    def done(self) -> set[str]:
        return {entry["unit"] for entry in self.entries()}

    def rows(self) -> list[Record]:
        return [row for entry in self.entries() for row in entry["rows"]]

    def checks(self) -> list[Record]:
        return [check for entry in self.entries() for check in entry["checks"]]

    def curves(self) -> list[Record]:
        return [point for entry in self.entries() for point in entry.get("curves", ())]

    def write_tables(self) -> None:
        write_csv(self.folder / "rows.csv", columns(Row), self.rows())
        write_csv(self.folder / "checks.csv", columns(Check), self.checks())
        if curves := self.curves():
            write_csv(self.folder / "curves.csv", list(curves[0]), curves)


def read_rows(place: Path) -> list[Record]:
    """The rows of a CSV, or of every rows*.csv in a folder and below, numbers as numbers and empty cells as None.

    Raises:
        ValueError: nothing there, or a table with other columns.
    """
    paths = sorted(place.rglob("rows*.csv")) if place.is_dir() else [place]
    if not paths or not paths[0].is_file():
        raise ValueError(f"{place}: no rows here; expected a CSV of rows, or a folder with a rows.csv")
    rows: list[Record] = []
    for path in paths:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if set(columns(Row)) - set(reader.fieldnames or ()) - _LATER:
                raise ValueError(f"{path}: not a table of rows; expected the columns {', '.join(columns(Row))}")
            empty = dict.fromkeys(_LATER)
            rows += [empty | {name: _cell(name, text) for name, text in line.items()} for line in reader]
    return rows


_LATER = {"saved_mib", "operators", "ranks", "distribution", "sequence"}  # columns that older tables lack
_WHOLE = {"M", "N", "K", "r", "L", "operators", "sequence"}
_REAL = {field.name for field in fields(Row) if "float" in str(field.type)}


def _cell(name: str, text: str) -> Any:
    if name in _WHOLE:
        return int(text) if text.isdigit() else text or None
    if name in _REAL:
        return float(text) if text else None
    return text or None if name in _LATER else text


def write_csv(path: Path, names: Sequence[str], records: Sequence[Record]) -> None:
    """Replace ``path`` in one step by a CSV of ``records`` with columns ``names``; None is an empty cell."""
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(records)
    os.replace(unfinished, path)
