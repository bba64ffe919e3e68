import dataclasses

import pytest
import torch

from benchmarks.blocks import Block, answers, block_of, our_block, part_seeds, rivals_of, separately
from benchmarks.cases import BLOCKS, Case, mlp, parse, stacked, tiny
from benchmarks.checks import Oracle, judge, problem_of, step
from benchmarks.measure import Bench, measure
from benchmarks.rivals import ADDMM_CHAIN, FROZEN, TRITON_BACKENDS, Implementation, ours
from benchmarks.roofline import Ceilings, backward_work, forward_work
from benchmarks.timing import RehearsalClock

QKV = stacked(33, (40, 24, 24), 64, 5, dtype=torch.float32)
MLP = mlp(33, 48, 32, 5, dtype=torch.float32)
CPU = torch.device("cpu")


@pytest.mark.parametrize("case", [QKV, MLP], ids=["stacked", "mlp"])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_what_is_right_is_judged_right(case: Case, p: float) -> None:
    case = dataclasses.replace(case, p=p)
    oracle = Oracle(problem_of(case, CPU, bias=True))
    for implementation in (our_block("reference"), separately(ours("reference")), separately(ADDMM_CHAIN)):
        found = list(judge(case, oracle, implementation))
        assert {check.status for check in found} == {"ok"}
        assert len(found) == (3 if case.parts else 1) + 1 + 6  # outputs, dX, A and B of three layers


@pytest.mark.parametrize("case", [QKV, MLP], ids=["stacked", "mlp"])
def test_every_contender_gets_a_row_beside_the_frozen_layers(case: Case) -> None:
    bench = Bench(CPU, RehearsalClock(), lambda: Ceilings({"fp32": 1.0}, 1.0), rounds=1)
    rows, found = measure(case, "fwd_bwd", rivals_of(case, ("reference",)), bench)
    assert {check.status for check in found} == {"ok"}, found
    assert rows[0].implementation == "frozen linear"
    assert all(row.ratio_to_frozen == 1 for row in rows)  # by the rehearsal's clock
    assert {row.N for row in rows} == {case.N_shown}
    names = [row.implementation for row in rows]
    frozen = ["frozen linear", "frozen stacked linear"] if case.parts else ["frozen linear"]
    assert names == [*frozen, "lora_kernels", "lora_kernels separate layers", "peft", "addmm chain"]


@pytest.mark.parametrize("backend", ["triton", "triton:shrink_extend"])
@pytest.mark.parametrize("case", [QKV, MLP], ids=["stacked", "mlp"])
def test_the_kernels_of_a_block_are_judged_right(case: Case, backend: str, device: str) -> None:
    case = dataclasses.replace(case, p=0.2, dtype=torch.bfloat16)
    found = list(judge(case, Oracle(problem_of(case, torch.device(device))), our_block(backend)))
    assert {check.status for check in found} == {"ok"}, found


def test_a_block_has_the_plans_that_serve_several_layers() -> None:
    names = [each.backend for each in rivals_of(QKV, TRITON_BACKENDS) if each.name == "lora_kernels"]
    assert names == ["triton", "triton:eager", "triton:shrink_extend"]


@pytest.mark.parametrize("lost", ["update", "projection"])
def test_a_block_without_a_part_is_judged_wrong(lost: str) -> None:
    def build(block: Block, seed: torch.Tensor | None) -> object:
        wrong = dataclasses.replace(block.parts[1], **{"B" if lost == "update" else "W": torch.zeros_like(
            block.parts[1].B if lost == "update" else block.parts[1].W)})  # fmt: skip
        return separately(ours("reference")).build(
            dataclasses.replace(block, parts=(block.parts[0], wrong, *block.parts[2:])), seed
        )

    wrong = Implementation("wrong", build, backend="reference")  # type: ignore[arg-type]
    found = {check.what: check.status for check in judge(QKV, Oracle(problem_of(QKV, CPU)), wrong)}
    assert found["Y1"] == "failed"
    assert found["Y0"] == found["Y2"] == "ok"


def test_projections_share_one_mask_and_an_mlp_draws_a_second_one_inside() -> None:
    for case, expected in ((QKV, [0, 0, 0]), (MLP, [0, 0, 1])):
        block = block_of(dataclasses.replace(case, p=0.3), CPU)
        assert [int(seed[1]) for seed in part_seeds(block, block.seed)] == expected
        assert {part.p for part in block.parts} == {0.3}


def test_the_frozen_block_has_the_base_terms_alone() -> None:
    block = block_of(QKV, CPU)
    got = step(separately(FROZEN).build(block, None), block.X, block.dY, backward=True)
    bare = dataclasses.replace(
        block, parts=tuple(dataclasses.replace(part, B=torch.zeros_like(part.B)) for part in block.parts)
    )
    exact = answers(bare, [None] * 3, torch.float64)
    assert set(got) == {"Y0", "Y1", "Y2", "dX"}
    for name, tensor in got.items():
        torch.testing.assert_close(tensor.double(), exact[name], rtol=1e-4, atol=1e-4)


def test_a_block_does_the_work_of_its_layers_and_reads_x_once() -> None:
    single = [Case(QKV.M, N, QKV.K, QKV.r, dtype=QKV.dtype) for N in QKV.parts]
    assert forward_work(QKV).flop == sum(forward_work(case).flop for case in single)
    x = 4 * QKV.M * QKV.K
    assert forward_work(QKV).bytes == sum(forward_work(case).bytes for case in single) - 2 * x
    assert backward_work(QKV).flop == sum(backward_work(case).flop for case in single)
    assert forward_work(MLP, lora=False).flop == 3 * 2 * MLP.M * MLP.N * MLP.K


def test_blocks_of_a_model_and_by_number() -> None:
    (qkv, gate_up) = parse("llama-3-8b", torch.bfloat16, 0.0, 8192, 16, "lora_linear_stacked")
    assert (qkv, gate_up) == (BLOCKS[0], BLOCKS[1])
    assert parse("8192,4096+1024+1024,4096,16", torch.bfloat16, 0.0, 1, 1, "lora_linear_stacked") == [qkv]
    assert parse("llama-3-8b", torch.bfloat16, 0.0, 8192, 16, "lora_mlp") == [BLOCKS[4]]
    assert str(qkv) == "lora_linear_stacked M8192 N4096+1024+1024 K4096 r16 p0 bf16"
    with pytest.raises(ValueError, match="bert-base has no gated MLP"):
        parse("bert-base", torch.float32, 0.0, 8, 8, "lora_mlp")
    with pytest.raises(ValueError, match="is no shape"):
        parse("8,16,16,4", torch.float32, 0.0, 8, 8, "lora_linear_stacked")


def test_a_tiny_block_keeps_its_kind() -> None:
    for case in BLOCKS:
        small = tiny(case)
        assert (small.op, len(small.parts), small.p) == (case.op, len(case.parts), case.p)
        assert len(set(small.parts)) == min(2, len(set(case.parts)))
        assert not small.parts or sum(small.parts) == small.N
