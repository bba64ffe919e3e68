"""The optional compiled extension: csrc/ as lora_kernels/_C.abi3.so. Everything else stands in pyproject.toml.

LORA_KERNELS_CSRC   auto (default)  what there is a compiler for: the CPU's operator, and CUDA's kernels where there are
                                    nvcc, its headers and a torch built for CUDA
                    1               with CUDA, or the installation fails and says why
                    cpu             the CPU's operator, or the installation fails and says why
                    0               not at all
LORA_KERNELS_ARCHS  what nvcc compiles for, default "80 90a 100 120+PTX"
MAX_JOBS, CXX, CUDA_HOME as usual.

torch is never imported: the operators use its stable ABI, so its headers are enough, and they are found in pip's
isolated build as well. What came of it is written to lora_kernels/_build_info.json, which `lora-kernels doctor` shows.
"""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
MODES = ("auto", "1", "cpu", "0")
ARCHS = os.environ.get("LORA_KERNELS_ARCHS", "80 90a 100 120+PTX")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
INSTRUCTIONS = {  # of the files that are compiled for more than the oldest processor; the operator asks which may run
    "update_avx2": ("-mavx2", "-mfma"),
    "update_avx512": (*AVX512, "-mfma"),
    "update_avx512bf16": (*AVX512, "-mavx512bf16", "-mfma"),
}
MODULE, PYTHON_ABI, TORCH_ABI = "_C.abi3.so", "0x030b0000", "0x020b000000000000"  # CPython 3.11, torch 2.11


class Plan(NamedTuple):
    """What is built: without a torch nothing, without a toolkit no CUDA kernels. ``why``: what stands in the way."""

    torch: Path | None
    cuda: Path | None
    why: str = ""


def torch_folder() -> Path | None:
    """The torch to build against, by its headers; None where there is none."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        spec = None
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_paths()[key]) / "torch" for key in ("platlib", "purelib")]
    return next((p for p in places if (p / "include/torch/csrc/stable/library.h").is_file()), None)


def cuda_folder() -> Path | None:
    """The CUDA toolkit; None where there is none. An nvcc in PATH may be a script elsewhere, without headers."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places += [str(Path(nvcc).resolve().parent.parent) if nvcc else None, "/usr/local/cuda"]
    wanted = ("bin/nvcc", "include/cuda_runtime.h")
    return next((Path(p) for p in places if p and all((Path(p) / file).is_file() for file in wanted)), None)


def plan(mode: str) -> Plan:
    """What this machine allows under ``mode``.

    Raises:
        SystemExit: an unknown mode, or one that asks for what is not here.
    """
    if mode not in MODES:
        raise SystemExit(f"lora_kernels: LORA_KERNELS_CSRC={mode!r}; accepted are {', '.join(MODES)}")
    if mode == "0":
        return Plan(None, None, "LORA_KERNELS_CSRC=0")
    torch, cuda = torch_folder(), None if mode == "cpu" else cuda_folder()
    missing = "no torch with headers is installed" if torch is None else ""
    if torch is None and mode == "auto":
        return Plan(None, None, missing)
    toolkit = "no CUDA toolkit (nvcc and its headers) in CUDA_HOME, PATH or /usr/local/cuda" if cuda is None else ""
    if missing := missing or (toolkit if mode == "1" else ""):
        raise SystemExit(f"lora_kernels: LORA_KERNELS_CSRC={mode}, but {missing}")
    if mode == "cpu":
        return Plan(torch, None, "LORA_KERNELS_CSRC=cpu")
    if mode == "auto" and torch is not None and not (torch / "lib/libtorch_cuda.so").is_file():
        return Plan(
            torch, None, "this torch is built without CUDA; LORA_KERNELS_CSRC=1 builds its kernels all the same"
        )
    return Plan(torch, cuda, toolkit)


def architectures(names: str) -> Iterator[str]:
    """nvcc's options for "80 90a 120+PTX"."""
    for name in names.split():
        number = name.removesuffix("+PTX")
        yield f"-gencode=arch=compute_{number},code=sm_{number}"
        if name != number:
            yield f"-gencode=arch=compute_{number},code=compute_{number}"


class BuildPy(build_py):
    """As ever, and the outcome of the extension beside the modules; a compiled module of an earlier build goes."""

    def run(self) -> None:
        super().run()
        folder = self.folder()
        (folder / MODULE).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.note(built="no", why=PLAN.why)

    def folder(self) -> Path:
        """Where the package's files go: into the source tree for an editable installation."""
        return (HERE if self.editable_mode else Path(self.build_lib)) / "lora_kernels"

    def note(self, **outcome: str) -> None:
        """Writes the outcome for doctor, and prints it."""
        (self.folder() / "_build_info.json").write_text(json.dumps(outcome, indent=1) + "\n")
        print(
            "lora_kernels: compiled extension:", ", ".join(f"{k} {v}" for k, v in outcome.items() if v), file=sys.stderr
        )


class BuildExt(build_ext):
    """Compiles csrc/ file by file and links it. In auto mode a failure is a note, and CUDA is left out before all."""

    def run(self) -> None:
        notes = self.get_finalized_command("build_py")
        assert isinstance(notes, BuildPy)
        why = PLAN.why
        for cuda in (PLAN.cuda, None) if MODE == "auto" and PLAN.cuda else (PLAN.cuda,):
            try:
                self.link(notes.folder() / MODULE, self.compile(cuda), cuda)
            except (OSError, RuntimeError) as error:
                if MODE != "auto":
                    raise SystemExit(
                        f"lora_kernels: LORA_KERNELS_CSRC={MODE}, but csrc/ does not compile: {error}"
                    ) from error
                why = str(error).strip()[:2000]
            else:
                built = f"with CUDA for {ARCHS}" if cuda else "without CUDA"
                notes.note(built=built, why=why, torch=f"headers of {PLAN.torch}")
                return
        notes.note(built="no", why=why)

    def get_outputs(self) -> list[str]:
        return []  # what is there is there: setuptools need not find what a failed build has not made

    def compile(self, cuda: Path | None) -> list[str]:
        """The object files, the kernels' among them where a toolkit is given.

        Raises:
            RuntimeError: a compiler refused; what it said.
        """
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "c++")
        options = ["-std=c++20", "-O3", f"-I{HERE}/csrc/include"]
        host = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall"]
        abi = [f"-DTORCH_TARGET_VERSION={TORCH_ABI}", f"-DPy_LIMITED_API={PYTHON_ABI}"]
        headers = [f"-I{PLAN.torch}/include", f"-I{sysconfig.get_paths()['include']}"]
        if cuda:
            headers += [f"-isystem{cuda}/include", "-DLORA_KERNELS_CUDA"]
        jobs = [
            [cxx, *options, *abi, *headers, *host, *INSTRUCTIONS.get(source.stem, ()), "-c", str(source)]
            for source in sorted(HERE.glob("csrc/*.cpp"))
            if source.stem not in INSTRUCTIONS or platform.machine() in ("x86_64", "AMD64")
        ]
        if cuda:
            nvcc = [
                f"{cuda}/bin/nvcc",
                *options,
                "-ccbin",
                cxx,
                "-Xcompiler=-fPIC,-fvisibility=hidden",
                "--threads=2",
            ]
            jobs += [[*nvcc, *architectures(ARCHS), "-c", str(source)] for source in sorted(HERE.glob("csrc/*.cu"))]
        jobs = [[*job, "-o", f"{objects}/{Path(job[-1]).name}.o"] for job in jobs]  # a.cpp and a.cu are not one a.o
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            list(pool.map(call, jobs))
        return [job[-1] for job in jobs]

    def link(self, module: Path, objects: list[str], cuda: Path | None) -> None:
        """The module from its objects. CUDA's runtime is linked in: it looks for a driver at its first call only."""
        libraries = [f"-L{PLAN.torch}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
        if cuda:
            folder = next((d for d in ("lib64", "lib") if (cuda / d / "libcudart_static.a").is_file()), None)
            if folder is None:
                raise RuntimeError(f"{cuda} has no libcudart_static.a in lib64 or lib")
            libraries += [f"-L{cuda}/{folder}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        hidden = ["-Wl,--exclude-libs,ALL", "-Wl,-z,relro,-z,now", "-s"]
        module.parent.mkdir(parents=True, exist_ok=True)
        call([os.environ.get("CXX", "c++"), "-shared", *objects, *libraries, *hidden, "-o", str(module)])


def call(command: list[str]) -> None:
    """Runs a compiler.

    Raises:
        RuntimeError: it failed; what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed on {command[-3]}:\n{done.stderr}")


if __name__ == "__main__":
    MODE = os.environ.get("LORA_KERNELS_CSRC", "auto")
    PLAN = plan(MODE)
    abi3 = {"bdist_wheel": {"py_limited_api": "cp311"}} if PLAN.torch else {}
    setup(
        ext_modules=[Extension("lora_kernels._C", [], py_limited_api=True)] if PLAN.torch else [],
        cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
        options=abi3,
    )
