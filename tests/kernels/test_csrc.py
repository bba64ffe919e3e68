"""The front end of the compiled extension, and what setup.py makes of a machine; tests/csrc/ has the kernel."""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from lora_kernels import multi_lora_linear
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.kernels import csrc
from lora_kernels.kernels.chip import CHIPS
from lora_kernels.planning import multi_plan
from lora_kernels.planning.multi_cost import MultiCallShape
from lora_kernels.testing.multi import make_multi_problem, mix_ids, multi_plain, multi_truth
from lora_kernels.testing.rule import assert_close

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(monkeypatch):
    """As if the extension were built and a GPU there; returns what its operator was given, call by call."""
    given = []
    monkeypatch.setattr(csrc, "available", lambda: None)
    monkeypatch.setattr(torch.ops.lora_kernels, "multi_lora_decode", lambda *a: given.append(a) or a[0], raising=False)
    multi_plan.candidates.cache_clear()
    multi_plan.choose.cache_clear()
    yield given
    multi_plan.candidates.cache_clear()
    multi_plan.choose.cache_clear()


def problem(M=8, N=32, K=64, dtype=torch.bfloat16, **options):
    return make_multi_problem(mix_ids("uniform", M, 3), N, K, (4, 0, 7), dtype, pool_layout=True, **options)


def test_without_the_module_the_reason_is_what_setup_wrote(monkeypatch, tmp_path):
    def missing(name):
        raise ModuleNotFoundError("No module named 'lora_kernels._C'", name="lora_kernels._C")

    monkeypatch.setattr(csrc.importlib, "import_module", missing)
    monkeypatch.setattr(csrc, "_INFO", tmp_path / "_build_info.json")
    monkeypatch.setattr(csrc, "update_missing", csrc.update_missing.__wrapped__)
    for missing in (csrc.update_missing, csrc.available.__wrapped__):
        csrc._INFO.unlink(missing_ok=True)
        assert missing() == "the package was installed without its compiled extension"
        csrc._INFO.write_text(json.dumps({"built": "no", "why": "no compiler"}))
        assert missing().endswith("without its compiled extension: no compiler")


def test_a_module_that_does_not_load_says_so(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: aoti_torch", name=None)

    monkeypatch.setattr(csrc.importlib, "import_module", broken)
    monkeypatch.setattr(csrc, "update_missing", csrc.update_missing.__wrapped__)
    for missing in (csrc.update_missing, csrc.available.__wrapped__):
        assert missing() == "the compiled extension does not load: undefined symbol: aoti_torch"


@pytest.mark.parametrize(
    ("with_cuda", "cuda", "usable", "capability", "why"),
    [
        (0, "13.0", True, (9, 0), "built without CUDA"),
        (1, None, True, (9, 0), "this torch is built without CUDA"),
        (1, "13.0", False, (9, 0), "no usable NVIDIA GPU"),
        (1, "13.0", True, (7, 5), "sm_75"),
        (1, "13.0", True, (8, 6), None),
    ],
)
def test_what_a_machine_allows(with_cuda, cuda, usable, capability, why, monkeypatch):
    monkeypatch.setattr(csrc.importlib, "import_module", lambda name: types.SimpleNamespace(WITH_CUDA=with_cuda))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = csrc.available.__wrapped__()
    assert found is None if why is None else why in found


def test_dtypes_and_widths_that_are_taken():
    assert csrc.refusal(torch.bfloat16, 64) is None
    assert csrc.refusal(torch.bfloat16, 8) is None
    assert "XA may leave float16's range" in csrc.refusal(torch.float16, 8)
    assert "float32" in csrc.refusal(torch.float32, 64)
    assert "K = 60" in csrc.refusal(torch.bfloat16, 60)
    assert "K = 0" in csrc.refusal(torch.bfloat16, 0)


def test_operands_that_cannot_be_read_as_they_lie():
    p = problem()
    assert csrc.unsuited(p.X, p.W, p.slots) is None
    assert "W has strides (1, 32)" in csrc.unsuited(p.X, p.W.t().contiguous().t(), p.slots)
    wide = torch.zeros(8, 65, dtype=torch.bfloat16)
    assert "X has strides (65, 1)" in csrc.unsuited(wide[:, :64], p.W, p.slots)
    assert "X begins at an address" in csrc.unsuited(
        torch.zeros(513, dtype=torch.bfloat16)[1:].view(8, 64), p.W, p.slots
    )
    assert csrc.unsuited(wide[:1, :64], p.W, p.slots) is None  # the stride of a lone row is nobody's
    assert "more counters" in csrc.unsuited(p.X, p.W, p.slots._replace(max_rank=5000))
    assert "it converts none" in csrc.unsuited(p.X, p.W, problem(adapter_dtype=torch.float32).slots)


def test_the_operator_gets_everything_in_its_order(here):
    p = problem()
    assert csrc.multi_lora_decode(p.X, p.W, p.slots, p.ids, p.bias) is p.X
    (arguments,) = here
    assert all(a is b for a, b in zip(arguments, (p.X, p.W, *p.slots, p.ids, p.bias), strict=True))


def test_strided_ids_and_bias_become_lists(here):
    p = problem()
    twice = p.ids.repeat_interleave(2)
    csrc.multi_lora_decode(p.X, p.W, p.slots, twice[::2], p.bias.repeat_interleave(2)[::2])
    assert here[0][8].is_contiguous()
    assert here[0][9].is_contiguous()


def test_the_call_refuses_by_name(here):
    p = problem(M=65)
    with pytest.raises(BackendUnavailableError, match="65 rows"):
        csrc.multi_lora_decode(p.X, p.W, p.slots, p.ids, p.bias)
    p = problem(dtype=torch.float32)
    with pytest.raises(BackendUnavailableError, match="float32"):
        csrc.multi_lora_decode(p.X, p.W, p.slots, p.ids, p.bias)


def test_the_planner_refuses_what_the_kernel_does_not_take(here):
    def why(problem, unsuited=None):
        return {plan.name: plan.refused for plan in multi_plan.candidates(problem, CHIPS["sm_90"], unsuited)}["cuda"]

    fits = MultiCallShape("fwd", 16, 4096, 4096, 8, 128, torch.bfloat16)
    assert why(fits) is None
    assert why(fits, "X lies askew") == "X lies askew"
    assert "float32" in why(MultiCallShape("fwd", 16, 4096, 4096, 8, 128, torch.float32))
    assert "K = 100" in why(MultiCallShape("fwd", 16, 4096, 100, 8, 128, torch.bfloat16))
    assert "65 rows" in why(MultiCallShape("fwd", 65, 4096, 4096, 8, 128, torch.bfloat16))
    assert "forward" in why(MultiCallShape("bwd", 16, 4096, 4096, 8, 128, torch.bfloat16))
    with pytest.raises(BackendUnavailableError, match="askew"):
        multi_plan.choose(fits, CHIPS["sm_90"], "cuda", "X lies askew")


def test_the_planner_looks_at_the_tensors_of_a_call(here):
    p = problem()
    assert multi_plan.plan_call("fwd", p.X, p.W, p.slots, False, "cuda")[0].name == "cuda"
    with pytest.raises(BackendUnavailableError, match="W has strides"):
        multi_plan.plan_call("fwd", p.X, p.W.t().contiguous().t(), p.slots, False, "cuda")


def test_cuda_by_name_on_a_cpu_is_refused(here):
    p = problem()
    with pytest.raises(BackendUnavailableError, match="tensors are on cpu"):
        multi_lora_linear(p.X, p.W, p.slots, p.ids, p.bias, backend="cuda")


GPU = pytest.mark.skipif(csrc.available() is not None, reason=f"csrc cannot run: {csrc.available()}")


@GPU
@pytest.mark.parametrize("dtype", csrc.DTYPES)
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 4096, 4096), (8, 200, 520), (16, 1000, 1032), (17, 65, 136), (64, 4096, 512)]
)
@pytest.mark.parametrize(("distribution", "pool_layout"), [("half", True), ("distinct", False), ("none", True)])
def test_on_a_gpu_it_is_right_and_the_same_every_time(dtype, M, N, K, distribution, pool_layout):
    ids = mix_ids(distribution, M, 5, device="cuda")
    ids[-1:] = 5  # names no slot
    p = make_multi_problem(ids, N, K, (16, 0, 8, 33, 64), dtype, pool_layout=pool_layout, gap=3 * pool_layout)
    unsuited = csrc.unsuited(p.X, p.W, p.slots)
    assert unsuited is None
    Y = csrc.multi_lora_decode(p.X, p.W, p.slots, p.ids, p.bias)
    assert_close(Y, multi_plain(p).Y, multi_truth(p).Y)
    for _ in range(20):
        assert torch.equal(csrc.multi_lora_decode(p.X, p.W, p.slots, p.ids, p.bias), Y)


@GPU
def test_on_a_gpu_one_graph_serves_every_mix():
    p = make_multi_problem(
        mix_ids("none", 16, 4, device="cuda"), 4096, 4096, (16, 8, 0, 64), torch.bfloat16, pool_layout=True
    )
    call = lambda: csrc.multi_lora_decode(p.X, p.W, p.slots, p.ids, p.bias)  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        Y = call()
    for seed in range(200):
        p.ids.copy_(mix_ids(("uniform", "half", "none", "identical")[seed % 4], 16, 5, seed=seed, device="cuda"))
        graph.replay()
        assert torch.equal(Y, call()), seed


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("setup_of_the_package", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def machine(setup, monkeypatch, tmp_path):
    """A torch with CUDA and a toolkit; returns a function that takes either away."""
    torch_there, cuda_there = tmp_path / "torch", tmp_path / "cuda"
    (torch_there / "lib").mkdir(parents=True)
    (torch_there / "lib" / "libtorch_cuda.so").touch()

    def have(torch=True, cuda=True, gpu_torch=True):
        (torch_there / "lib" / "libtorch_cuda.so").unlink(missing_ok=True)
        if gpu_torch:
            (torch_there / "lib" / "libtorch_cuda.so").touch()
        monkeypatch.setattr(setup, "torch_folder", lambda: torch_there if torch else None)
        monkeypatch.setattr(setup, "cuda_folder", lambda: cuda_there if cuda else None)
        return torch_there, cuda_there

    return have


def test_auto_builds_where_all_is_there_and_says_what_is_not(setup, machine):
    torch_there, cuda_there = machine()
    assert setup.plan("auto") == (torch_there, cuda_there, "")
    machine(torch=False)
    assert setup.plan("auto") == (None, None, "no torch with headers is installed")
    machine(cuda=False)
    assert setup.plan("auto")[:2] == (torch_there, None)
    assert setup.plan("auto").why.startswith("no CUDA toolkit")
    machine(gpu_torch=False)
    assert setup.plan("auto")[:2] == (torch_there, None)
    assert "LORA_KERNELS_CSRC=1" in setup.plan("auto").why


def test_what_is_asked_for_is_built_or_fails(setup, machine):
    torch_there, cuda_there = machine(gpu_torch=False)
    assert setup.plan("1") == (torch_there, cuda_there, "")
    assert setup.plan("cpu") == (torch_there, None, "LORA_KERNELS_CSRC=cpu")
    assert setup.plan("0") == (None, None, "LORA_KERNELS_CSRC=0")
    machine(cuda=False)
    assert setup.plan("cpu").torch
    for mode in ("1", "nonsense"):
        with pytest.raises(SystemExit, match=r"no CUDA toolkit|accepted are"):
            setup.plan(mode)
    machine(torch=False)
    for mode in ("1", "cpu"):
        with pytest.raises(SystemExit, match="no torch with headers"):
            setup.plan(mode)


@pytest.mark.parametrize(("mode", "broken"), [("auto", "cuda"), ("auto", "all"), ("1", "cuda")])
def test_what_does_not_compile_is_left_out(setup, monkeypatch, tmp_path, mode, broken):
    """In auto mode CUDA's kernels first, then everything, with the compiler's words; otherwise it is an error."""
    monkeypatch.setattr(setup, "MODE", mode, raising=False)
    monkeypatch.setattr(setup, "PLAN", setup.Plan(tmp_path, tmp_path), raising=False)

    class Build(setup.BuildExt):
        def __init__(self):
            self.notes = object.__new__(setup.BuildPy)
            self.notes.folder = lambda: tmp_path
            self.get_finalized_command = lambda name: self.notes

        def compile(self, cuda):
            if cuda or broken == "all":
                raise RuntimeError("nvcc: no such option")
            return []

        def link(self, module, objects, cuda):
            assert cuda is None

    if mode == "1":
        with pytest.raises(SystemExit, match="nvcc: no such option"):
            Build().run()
        return
    Build().run()
    info = json.loads((tmp_path / "_build_info.json").read_text())
    assert (info["built"], info["why"]) == ("no" if broken == "all" else "without CUDA", "nvcc: no such option")


def test_an_nvcc_without_headers_is_no_toolkit(setup, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup.cuda_folder() != tmp_path
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    assert setup.cuda_folder() == tmp_path


def test_architectures_as_nvcc_wants_them(setup):
    assert list(setup.architectures("80 120+PTX")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_a_toolkit_without_the_static_runtime_is_a_note(setup, monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "PLAN", setup.Plan(tmp_path, tmp_path), raising=False)
    with pytest.raises(RuntimeError, match=r"no libcudart_static\.a in lib64 or lib"):  # which BuildExt.run notes
        setup.BuildExt.link(None, tmp_path / "module.so", [], tmp_path)


def test_setup_finds_torch_without_importing_it():
    find = f"runpy.run_path({str(ROOT / 'setup.py')!r})['torch_folder']()"
    code = f"import runpy, sys; print({find} is not None, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True False"


@pytest.mark.slow
def test_the_module_without_cuda_builds_loads_and_registers(tmp_path):
    environment = {"LORA_KERNELS_CSRC": "cpu", "PATH": "/usr/local/bin:/usr/bin:/bin"}
    build = [sys.executable, "setup.py", "-q", "build", "-b", str(tmp_path), "--build-lib", str(tmp_path / "lib")]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "lora_kernels"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run(build, cwd=source, env=environment, check=True, capture_output=True)
    assert json.loads((tmp_path / "lib/lora_kernels/_build_info.json").read_text())["built"] == "without CUDA"
    code = (
        "import torch; from lora_kernels.kernels import csrc; print(csrc.available(), csrc.update_missing()); "
        "print(torch.ops.lora_kernels.multi_lora_decode.default._schema)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "lib", capture_output=True, text=True, check=True
    )
    assert "without CUDA: LORA_KERNELS_CSRC=cpu None" in done.stdout
    assert "Tensor? bias) -> Tensor" in done.stdout
