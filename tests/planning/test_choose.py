"""Backends by name, plans by prediction, and what each plan launches and moves."""

import dataclasses
import itertools

import pytest
import torch

import lora_kernels as lk
from lora_kernels.errors import BackendUnavailableError, ConfigError
from lora_kernels.kernels.chip import CHIPS
from lora_kernels.kernels.tiles import GemmConfig, TmaConfig
from lora_kernels.planning import choose as plan
from lora_kernels.planning import plans as variants
from lora_kernels.planning import tuned
from lora_kernels.planning.cost import CallShape
from lora_kernels.planning.tuned import Entry, Measured

H100 = CHIPS["sm_90"]
LAYER = CallShape("fwd", 8192, 4096, 4096, 16, torch.bfloat16)


def test_auto_takes_the_reference_on_a_cpu():
    assert plan.resolve_backend("auto", "cpu", torch.float32) == "reference"


def test_auto_takes_triton_on_a_gpu_and_the_reference_for_float64(monkeypatch):
    monkeypatch.setattr(plan, "_triton_installed", True)
    assert plan.resolve_backend("auto", "cuda", torch.bfloat16) == "triton"
    assert plan.resolve_backend("auto", "cuda", torch.float64) == "reference"
    monkeypatch.setattr(plan, "_triton_installed", False)
    assert plan.resolve_backend("auto", "cuda", torch.bfloat16) == "reference"
    with pytest.raises(BackendUnavailableError, match="not installed"):
        plan.resolve_backend("triton", "cuda", torch.bfloat16)


def test_without_interpreter_or_gpu_triton_says_why(monkeypatch):
    monkeypatch.setattr(plan, "_interpreted", False)
    with pytest.raises(BackendUnavailableError, match=r"on the CPU.*TRITON_INTERPRET"):
        plan.resolve_backend("triton", "cpu", torch.float32)
    with pytest.raises(BackendUnavailableError, match="mps"):
        plan.resolve_backend("triton", "mps", torch.float32)


def test_the_nearest_request_wins(monkeypatch):
    assert plan.requested_backend() == plan._environment
    monkeypatch.setattr(plan, "_environment", "reference")
    assert plan.requested_backend() == "reference"
    with lk.use_backend("triton:eager"):
        assert plan.requested_backend() == "triton:eager"
        with lk.use_backend("reference"):
            assert plan.requested_backend() == "reference"
            assert plan.requested_backend("triton") == "triton"
        assert plan.requested_backend() == "triton:eager"
    assert plan.requested_backend() == "reference"


def test_use_backend_restores_after_an_error():
    with pytest.raises(ZeroDivisionError), lk.use_backend("reference"):
        raise ZeroDivisionError
    assert plan.requested_backend() == plan._environment


@pytest.mark.parametrize("name", ["", "cuda:decode", "triton:fast", "reference:eager", "auto:eager", "Triton"])
def test_unknown_names(name):
    with pytest.raises(ConfigError, match="accepted are"), lk.use_backend(name):
        pass


def test_status_names_every_backend_with_a_reason_or_none():
    status = plan.backend_status()
    assert status["reference"] is None
    assert set(status) == {"reference", "triton"}


def launches(problem, name):
    return [launch.kernel for launch in next(p for p in plan.candidates(problem, H100) if p.name == name).launches]


def test_launches_of_each_plan():
    bwd = CallShape("bwd", 8192, 4096, 4096, 16, torch.bfloat16)
    assert launches(LAYER, "eager") == ["XA", "matmul", "addmm_"]
    assert launches(LAYER, "shrink_extend") == ["shrink", "extend"]
    assert launches(LAYER, "one_pass") == ["one_pass"]
    assert launches(bwd, "eager") == ["dYB", "dB", "matmul", "addmm_", "dA"]
    assert launches(bwd, "shrink_extend") == ["dyb_db", "reduce", "dx_da", "reduce"]
    no_dx = CallShape("bwd", 8192, 4096, 4096, 16, torch.bfloat16, need_dx=False)
    assert launches(no_dx, "shrink_extend") == ["dyb_db", "reduce", "da", "reduce"]
    wide = CallShape("bwd", 8192, 4096, 4096, 128, torch.bfloat16)
    assert launches(wide, "shrink_extend") == ["dyb_db", "reduce", "dx_da", "da", "reduce"]


def test_bytes_over_the_frozen_layer():
    """The update costs a read and a write of Y in eager, one pass over X in shrink_extend, A and B in one_pass."""
    M, N, K, r, e = 8192, 4096, 4096, 16, 2
    frozen = e * (M * K + N * K + M * N)
    over = {p.name: p.bytes - frozen for p in plan.candidates(LAYER, H100)}
    small = 2 * e * r * (M + N + K)
    assert over["eager"] == pytest.approx(e * (2 * M * N + M * K), abs=small)
    assert over["shrink_extend"] == pytest.approx(e * M * K, abs=small)
    assert 0 < over["one_pass"] <= small


@pytest.mark.parametrize(
    ("problem", "name"),
    [
        (LAYER, "eager"),
        (LAYER, "shrink_extend"),
        (LAYER, "one_pass"),
        (CallShape("bwd", 8192, 4096, 4096, 16, torch.bfloat16), "shrink_extend"),
        (CallShape("bwd", 8192, 4096, 4096, 16, torch.bfloat16, dropout=True), "eager"),
        (CallShape("bwd", 8192, 4096, 4096, 128, torch.bfloat16, need_dx=False), "shrink_extend"),
        (CallShape("fwd", 64, 512, 256, 8, torch.bfloat16, dropout=True), "eager"),
        (CallShape("fwd", 64, 512, 256, 8, torch.bfloat16, dropout=True), "tma_extend"),
        (LAYER, "one_launch"),
        (LAYER, "ptr_one_launch"),
        (CallShape("bwd", 8192, 4096, 4096, 16, torch.bfloat16), "tma_extend"),
        (CallShape("bwd", 8192, 4096, 4096, 16, torch.bfloat16, need_dx=False), "tma_extend"),
    ],
    ids=lambda v: v if isinstance(v, str) else f"{v.op}-{v.M}-r{v.r}",
)
def test_plans_launch_what_they_claim(problem, name, count_launches):
    """Kernels of ours that a call really launches, counted, against the launches its plan lists."""
    claimed = [x.kernel for x in variants.launches(name, problem) if not x.library]
    assert count_launches(problem, name) == len(claimed)


@pytest.fixture
def count_launches(monkeypatch, device):
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    counted = []
    owner, method = (GridExecutor, "__call__") if device == "cpu" else (JITFunction, "run")
    run = getattr(owner, method)

    def counting(self, *args, **kwargs):
        counted.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, counting)

    def count(problem, name):
        from lora_kernels import ops
        from lora_kernels.reference import GradMask
        from lora_kernels.testing import make_problem

        p = make_problem(40, 32, 48, min(problem.r, 72), problem.dtype, device)
        seed = p.seed if problem.dropout else None
        XA = torch.zeros(40, p.A.shape[0], dtype=problem.dtype, device=device)
        counted.clear()
        if problem.op == "fwd":
            ops.lora_linear_fwd(p.X, p.W, p.A, p.B, None, 1.0, 0.5, seed, f"triton:{name}")
        else:
            needs = GradMask(X=problem.need_dx)
            ops.lora_linear_bwd(p.dY, p.X, p.W, p.A, p.B, XA, 1.0, 0.5, seed, None, needs, f"triton:{name}")
        return len(counted)

    return count


def test_the_choice_is_the_least_predicted_time():
    for M in (1, 64, 2048, 8192):
        plans = plan.candidates(CallShape("fwd", M, 4096, 4096, 16, torch.bfloat16), H100)
        plans = tuple(p for p in plans if not p.opt_in)
        assert [p.seconds for p in plans] == sorted(p.seconds for p in plans)
        chosen = plan.choose(CallShape("fwd", M, 4096, 4096, 16, torch.bfloat16), H100)
        assert (chosen.name, chosen.why) == (plans[0].name, "model")


def test_one_row_takes_one_launch():
    assert plan.choose(CallShape("fwd", 1, 4096, 4096, 16, torch.bfloat16), H100).name == "one_pass"


def test_a_forced_plan_runs_or_says_why():
    assert plan.choose(LAYER, H100, "shrink_extend").name == "shrink_extend"
    with pytest.raises(BackendUnavailableError, match="above 64"):
        plan.choose(CallShape("fwd", 8, 64, 64, 65, torch.bfloat16), H100, "one_pass")
    backward = CallShape("bwd", 8192, 4096, 4096, 16, torch.bfloat16)
    assert plan.choose(backward, H100, "one_pass") == plan.choose(backward, H100)
    assert plan.choose(backward, H100, "ptr_one_launch") == plan.choose(backward, H100)
    assert plan.choose(backward, H100, "one_launch").name == "tma_extend"
    named = plan.choose(backward, H100, "gluon_one_launch")
    assert (named.name, named.why) == ("gluon_extend", "named gluon_one_launch")
    seeds = dataclasses.replace(backward, dropout=True, bits=False)
    assert plan.choose(seeds, H100, "one_launch") == plan.choose(seeds, H100)  # its counterpart is refused
    with pytest.raises(BackendUnavailableError, match="as bits"):
        plan.choose(seeds, H100, "tma_extend")


TUNED = dataclasses.replace(H100, name="NVIDIA H100 80GB HBM3")
TILES = TmaConfig(128, 128, 64, num_warps=8, num_stages=4, FLATTEN=True)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Puts entries of (op, measured, changes) into the table of TUNED."""
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.delenv("LORA_KERNELS_TUNED", raising=False)
    monkeypatch.setattr(plan, "chip_for", lambda device: TUNED)

    def put(*entries):
        made = []
        for op, measured, changes in entries:
            sizes = {"M": 8192, "N": 4096, "K": 4096, "r": 16} | changes
            flags = {"dropout": False, "bits": True, "bias": False, "need_dx": True}
            where = dict.fromkeys(("torch", "triton", "driver", "commit", "date"), "")
            made.append(Entry(TUNED.name, op, "bfloat16", **sizes, **flags, measured=measured, **where))
        path = tuned.user_table(TUNED.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tuned.dumps(TUNED.name, made))
        plan.forget()

    yield put
    plan.forget()


EAGER = Measured("eager", None, 400.0, 30.0)
FASTER = Measured("tma_extend", TILES, 380.0, 60.0)


def test_an_opt_in_plan_runs_where_a_table_says_it_is_faster(table):
    table(("fwd", (EAGER, FASTER), {}))
    chosen = plan.choose(LAYER, TUNED)
    assert (chosen.name, chosen.tiles, chosen.measured) == ("tma_extend", TILES, pytest.approx(380e-6))
    assert chosen.why == "tuned on this GPU at 8192 rows"
    assert plan.choose(LAYER, H100).name not in plan.OPT_IN  # another GPU's table is not asked
    assert plan.choose(dataclasses.replace(LAYER, M=64), TUNED).why == "model"
    named = plan.choose(LAYER, TUNED, "eager")
    assert (named.why, named.measured) == ("named", pytest.approx(400e-6))
    assert plan.choose(LAYER, TUNED, "tma_extend").tiles == TILES  # the best tiles also where it is named


def test_less_than_two_per_cent_is_not_faster(table):
    table(("fwd", (EAGER, dataclasses.replace(FASTER, us=393.0)), {}))
    assert plan.choose(LAYER, TUNED).name == "eager"
    assert plan.choose(LAYER, TUNED).why.startswith("tuned on this GPU")


def test_a_tuned_plan_that_this_call_refuses_gives_way_to_the_model(table):
    table(("fwd", (EAGER, FASTER), {}))
    chosen = plan.choose(dataclasses.replace(LAYER, descriptors=False), TUNED)
    assert chosen.name in plan.PLANS
    assert "model, as the tuned tma_extend is refused: the tensors of this call" in chosen.why


def test_tiles_of_another_rank_of_the_bucket_are_not_taken_over(table):
    table(("fwd", (EAGER, FASTER), {"r": 16}))
    chosen = plan.choose(dataclasses.replace(LAYER, r=8), TUNED)
    assert (chosen.name, chosen.tiles) == ("tma_extend", None)


def test_tiles_that_are_refused_leave_the_default_ones(table):
    table(("fwd", (EAGER, dataclasses.replace(FASTER, tiles=dataclasses.replace(TILES, num_stages=9))), {}))
    chosen = plan.choose(LAYER, TUNED)
    assert (chosen.name, chosen.tiles) == ("tma_extend", None)


def call(X, W, forced=None):
    N, K = W.shape
    return plan.plan_call("fwd", (X, W), N, K, 16, False, False, True, True, forced)[0]


def test_a_call_that_descriptors_cannot_take(table):
    table(("fwd", (EAGER, FASTER), {"M": 64, "N": 256, "K": 128}))
    X, W = torch.empty(64, 128, dtype=torch.bfloat16), torch.empty(256, 128, dtype=torch.bfloat16)
    assert call(X, W).name == "tma_extend"
    wide = torch.empty(64, 256, dtype=torch.bfloat16)
    for other in (wide[:, ::2], wide[:, 1:129], torch.empty(128, 64, dtype=torch.bfloat16).t()):
        assert call(other, W).name in plan.PLANS
        with pytest.raises(BackendUnavailableError, match="descriptors need"):
            call(other, W, "tma_extend")
    assert call(wide[:, 8:136], W).name == "tma_extend"
    assert call(torch.empty(64 * 130, dtype=torch.bfloat16).as_strided((64, 128), (130, 1)), W).name in plan.PLANS


def test_descriptors_take_what_the_kernels_take():
    sm90 = pytest.importorskip("lora_kernels.kernels.hopper.tma")
    flat = torch.empty(4096, dtype=torch.bfloat16)
    for rows, columns, stride, step, offset in itertools.product((1, 3), (1, 16), (16, 20, 24), (1, 2), (0, 1, 8)):
        t = flat[offset:].as_strided((rows, columns), (stride, step))
        assert plan.descriptors_take(t) == (sm90.descriptor_refusal(t=t) is None), t.stride()


def test_tuned_tiles_of_pointer_kernels_need_wide_loads(table):
    tiles = GemmConfig(64, 64, 32, num_warps=4, num_stages=2)
    table(("fwd", (EAGER, Measured("shrink_extend", tiles, 100.0)), {"M": 64, "N": 256, "K": 128}))
    X, W = torch.empty(64, 128, dtype=torch.bfloat16), torch.empty(256, 128, dtype=torch.bfloat16)
    assert (call(X, W).name, call(X, W).tiles) == ("shrink_extend", tiles)
    other = torch.empty(64, 130, dtype=torch.bfloat16)[:, :128]
    assert (call(other, W).name, call(other, W).tiles) == ("shrink_extend", None)


def test_a_plan_is_looked_up_not_made_again(table):
    table(("fwd", (EAGER, FASTER), {}))
    X, W = torch.empty(64, 128, dtype=torch.bfloat16), torch.empty(256, 128, dtype=torch.bfloat16)
    assert call(X, W) is call(X, W)


def test_the_environment_switches_a_plan_off(monkeypatch):
    plan.forget()
    row = CallShape("fwd", 1, 4096, 4096, 16, torch.bfloat16)
    assert plan.choose(row, H100).name == "one_pass"
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "one_pass,gluon_one_launch")
    plan.forget()
    assert plan.choose(row, H100).name == "shrink_extend"
    with pytest.raises(BackendUnavailableError, match="switched off by LORA_KERNELS_DISABLE"):
        plan.choose(row, H100, "gluon_one_launch")
    for wrong in ("eager", "one_lunch"):
        monkeypatch.setenv("LORA_KERNELS_DISABLE", wrong)
        plan.forget()
        with pytest.raises(ConfigError, match=f"names {wrong}; accepted are shrink_extend"):
            plan.choose(row, H100)
    monkeypatch.undo()
    plan.forget()
