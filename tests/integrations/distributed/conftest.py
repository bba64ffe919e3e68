import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def processes(tmp_path: Path) -> Callable[..., None]:
    """processes(MODULE, CASE, ..., timeout=900) runs functions of a module beside this file in two processes of one
    gloo group, which find each other by a file: no port. A failed case, or one that does not end, fails the test."""

    def spawn(module: str, *cases: str, timeout: float = 900, world: int = 2) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "GLOO_SOCKET_IFNAME": "lo"}
        folder, group = Path(tempfile.mkdtemp(dir=tmp_path)), []
        for rank in range(world):
            command = [sys.executable, str(HERE / "worker.py"), str(folder), str(rank), str(world), module, *cases]
            group.append(subprocess.Popen(command, env=environment, stderr=(folder / f"{rank}.err").open("w")))
        deadline = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process in group):
                failed = any(process.poll() for process in group)
                if failed or time.monotonic() > deadline:
                    time.sleep(1)  # what failed on one often fails on the others, too
                    break
                time.sleep(0.05)
        finally:
            for process in group:
                if process.poll() is None:
                    process.kill()
                process.wait()
        late = time.monotonic() > deadline
        for case in cases:
            reports = {rank: folder / f"{case}.{rank}.json" for rank in range(world)}
            failures = [f"rank {r}: {f}" for r, p in reports.items() if p.exists() and (f := json.loads(p.read_text()))]
            if failures:
                pytest.fail(f"{case}\n" + "\n".join(failures), pytrace=False)
            if not all(path.exists() for path in reports.values()):
                errors = "\n".join((folder / f"{rank}.err").read_text()[-2000:] for rank in range(world))
                pytest.fail(f"{case} {'did not end in time' if late else 'ended early'}\n{errors}", pytrace=False)

    return spawn
