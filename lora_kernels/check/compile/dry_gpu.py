"""A GPU that compiles and doesn't run: Triton's real launch path for any target, on a machine without one.

    with DryGPU(chip) as gpu:
        launcher(cpu_tensors)
    for kernel in gpu.kernels: print(kernel.name, kernel.occupancy, kernel.faults())

Every kernel that the launcher launches, in Triton or in Gluon, is compiled exactly as it would be on that GPU
(signature, divisibility by 16, constants, warps, stages), passes Triton's own check of shared memory, and is read for
registers, spills, stack and instruction counts with the tools that Triton ships. Nothing is executed: outputs keep what
they held.

Runs in a process of its own without TRITON_INTERPRET. What was compiled and counted stays in Triton's cache, so that a
second run costs milliseconds a kernel. An autotuner keeps its choice across targets: clear its cache between two chips.
Kernels are read when ``kernels`` is first asked for, all that wait at once: ask after the last launch.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager
from triton.runtime.driver import driver as triton_driver
from triton.runtime.interpreter import InterpretedFunction

from lora_kernels.check.compile.resources import Chip, Kernel, Resources, read_resources
from lora_kernels.check.compile.ttir_lint import ring_bytes

_RESOURCES_FILE = "lora_kernels_resources_2.json"  # the number changes with what is counted


class _Utils:
    """What Triton asks of a driver's binary loader."""

    def __init__(self, chip: Chip, warp_size: int) -> None:
        self._properties = {
            "max_shared_mem": chip.shared,
            "multiprocessor_count": chip.units,
            "max_num_regs": 65536,
            "warpSize": warp_size,
            "sm_clock_rate": 1_980_000,
            "mem_clock_rate": 2_619_000,
            "mem_bus_width": 5120,
        }

    def get_device_properties(self, device: str) -> dict[str, int]:
        return self._properties

    def load_binary(self, name: str, binary: bytes, shared: int, device: str) -> tuple[object, object, int, int, int]:
        return object(), object(), 0, 0, 1024


class _Launcher:
    """Stands where Triton's compiled launcher does, and notes the launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._hash = metadata.hash

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        gpu = triton_driver.active
        assert isinstance(gpu, DryGPU)
        gpu.launched(self._hash)


@dataclass
class _Build:
    """A compiled kernel, and what it takes once that was read."""

    target: GPUTarget
    metadata: dict[str, Any]
    files: dict[str, Path]
    seconds: float
    resources: Resources | None

    def kernel(self, chip: Chip) -> Kernel:
        assert self.resources is not None
        return Kernel(
            name=self.metadata["name"],
            chip=chip,
            num_warps=self.metadata["num_warps"],
            num_stages=self.metadata["num_stages"],
            shared=self.metadata["shared"],
            resources=self.resources,
            ir=(self.files.get("ttir") or self.files["ttgir"]).read_text(),
            rings=ring_bytes(self.files["ttgir"].read_text()),
            tensor=self.metadata.get("tmem_size", 0),
            seconds=self.seconds,
            code=self.metadata["hash"][:8],
        )


class DryGPU:
    """Triton's active driver while it is entered. `kernels` holds what was launched since, each compiled kernel once.

    Raises:
        RuntimeError: on entering it in a process where Triton runs its interpreter.
        triton.runtime.errors.OutOfResources: from a launch that needs more shared memory than the chip has.
    """

    launcher_cls = _Launcher
    _builds: dict[str, _Build] = {}  # noqa: RUF012  by Triton's hash, for every session of this process

    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        backend, arch, warp_size = ("hip", chip.arch, 64) if chip.arch.startswith("gfx") else ("cuda", chip.arch, 32)
        self.target = GPUTarget(backend, arch if backend == "hip" else int(arch.removeprefix("sm_")), warp_size)
        self.utils = _Utils(chip, warp_size)
        self.launches = 0
        self._launched: dict[str, None] = {}  # hashes, in the order of their first launch

    def __enter__(self) -> "DryGPU":
        if isinstance(tl.philox, InterpretedFunction):
            raise RuntimeError("Triton runs its interpreter here; use a process without TRITON_INTERPRET")
        self._outer = triton_driver._active, knobs.compilation.listener
        triton_driver.set_active(self)
        knobs.compilation.listener = self._on_compiled
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        triton_driver._active, knobs.compilation.listener = self._outer

    def _on_compiled(self, *, metadata: dict[str, Any], metadata_group: dict[str, str], times: Any, **_: Any) -> None:
        """Triton calls it for every kernel, newly compiled or found in its cache, before the first launch."""
        files = {Path(path).suffix[1:]: Path(path) for path in metadata_group.values()}
        counted = get_cache_manager(metadata["hash"]).get_file(_RESOURCES_FILE)
        resources = Resources(**json.loads(Path(counted).read_text())) if counted else None
        self._builds[metadata["hash"]] = _Build(self.target, metadata, files, times.total / 1e6, resources)

    def launched(self, kernel_hash: str) -> None:
        """Notes a launch of the kernel with this hash."""
        self.launches += 1
        self._launched[kernel_hash] = None

    @property
    def kernels(self) -> list[Kernel]:
        """What was launched since this GPU was made, each compiled kernel once."""
        builds = [self._builds[kernel_hash] for kernel_hash in self._launched]
        if any(build.resources is None for build in builds):
            waiting = [b for b in self._builds.values() if b.resources is None and b.target == self.target]
            for build, resources in zip(waiting, read_resources(self.target, [b.files for b in waiting]), strict=True):
                build.resources = resources
                cache = get_cache_manager(build.metadata["hash"])
                cache.put(json.dumps(asdict(resources)), _RESOURCES_FILE, binary=False)
        return [build.kernel(self.chip) for build in builds]

    # What triton.runtime.driver.active is asked for.

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.chip.arch  # the key of a jit function's own cache: one cache a target

    def set_current_device(self, device: str) -> None: ...

    def get_current_stream(self, device: str | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, triton_type: str) -> str:
        return "void*"

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """For the autotuner: compiles and launches each configuration; all are equally fast."""

        def benchmark(call: Callable[[], object], quantiles: list[float] | None = None, **_: Any) -> list[float]:
            call()
            return [1.0] * len(quantiles or [0.5])

        return benchmark

    def get_empty_cache_for_benchmark(self) -> None: ...

    def clear_cache(self, cache: object) -> None: ...

    def assemble_tensormap_to_arg(self, info: object, args: Any) -> Any:
        return args
