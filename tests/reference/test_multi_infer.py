"""The four orders of the forward without gradients: each is reached, and each is right."""

from dataclasses import replace

import pytest
import torch

from lora_kernels.reference import multi_infer
from lora_kernels.reference.multi_infer import multi_lora_linear_infer
from lora_kernels.testing import Pool, assert_close
from lora_kernels.testing.multi import fuzz_mixes, make_multi_problem, mix_ids, multi_plain, multi_truth, problem_of


@pytest.mark.parametrize("shard", range(3))
def test_fuzz(shard):
    pool = Pool()
    for case in fuzz_mixes(100, seed=40 + shard):
        p = problem_of(case)
        pool.assert_close(
            multi_lora_linear_infer(p.X, p.W, p.slots, p.ids, p.bias), multi_plain(p).Y, multi_truth(p).Y, what="Y"
        )
    pool.close()


ORDERS = {  # what is meant: rows, run, dtype, whether 16 bits come in tiles, ranks
    "runs, one": (40, 40, torch.bfloat16, False, (16, 0, 7, 1)),
    "runs, as many as adapters": (40, 10, torch.float32, False, (16, 3, 7, 1)),
    "runs, long": (1024, 64, torch.float32, False, (16, 0, 7, 1)),
    "masked, few rows": (64, 1, torch.bfloat16, False, (16, 0, 7, 1)),
    "masked, tiles": (64, 1, torch.bfloat16, True, (16, 0, 7, 1)),
    "sorted": (64, 1, torch.float32, False, (16, 0, 7, 1)),
    "sorted, tiles": (300, 1, torch.float16, True, (16, 30, 40, 20)),
    "groups": (600, 1, torch.float32, False, (16, 0, 7, 1)),
    "groups in 16 bit": (64, 1, torch.bfloat16, False, (16, 30, 40, 20)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_every_order_is_taken_where_it_is_meant_and_is_right(name, monkeypatch):
    M, run, dtype, tiles, ranks = ORDERS[name]
    ids = mix_ids("distinct" if run == 10 else "uniform", M, 4, run=run, seed=3)
    p = make_multi_problem(ids, 20, 28, ranks, dtype, pool_layout=True, gap=3)
    monkeypatch.setattr(multi_infer, "tiles_of_16_bit", lambda: tiles)
    if name != "masked, few rows":
        monkeypatch.setattr(multi_infer, "MASKED_PRODUCTS", 0)
    taken = []
    masked, add_runs = multi_infer._masked, multi_infer._add_runs
    monkeypatch.setattr(multi_infer, "_masked", lambda *args: taken.append("masked") or masked(*args))
    monkeypatch.setattr(multi_infer, "_add_runs", lambda Y, X, *a: taken.append(X is p.X) or add_runs(Y, X, *a))
    Y = multi_lora_linear_infer(p.X, p.W, p.slots, p.ids, p.bias)
    meant = {"masked": ["masked"], "runs": [True], "sorted": [False], "groups": []}
    assert taken == meant[name.partition(",")[0].partition(" in")[0]]
    assert_close(Y, multi_plain(p).Y, multi_truth(p).Y)


def test_a_cpu_is_asked_once_whether_it_has_tiles(monkeypatch):
    multi_infer.tiles_of_16_bit.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert multi_infer.tiles_of_16_bit()
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert multi_infer.tiles_of_16_bit()
    multi_infer.tiles_of_16_bit.cache_clear()
    assert not multi_infer.tiles_of_16_bit()
    multi_infer.tiles_of_16_bit.cache_clear()


@pytest.mark.parametrize("starts", [(4, 0, 8), (0, 4, 8), (8, 4, 0), (0, 0, 4)])
def test_masked_with_slots_in_any_order_and_two_that_share_their_rows(starts):
    ids = mix_ids("uniform", 32, 3, seed=1)
    p = make_multi_problem(ids, 20, 28, (4, 4, 4), torch.bfloat16)
    p = replace(p, slots=p.slots._replace(starts=torch.tensor(starts, dtype=torch.int32)))
    Y = multi_lora_linear_infer(p.X, p.W, p.slots, p.ids, p.bias)
    assert_close(Y, multi_plain(p).Y, multi_truth(p).Y)


def test_scales_are_kept_for_the_same_adapters_and_made_anew_for_others(monkeypatch):
    rows = multi_infer.rows_of(torch.tensor([1, 0, -1, 1, 5], dtype=torch.int32))
    there = ((0, 2, 0.5, 1), (2, 1, 3.0, 0))
    scales, others = rows.scales(2, there, torch.float32)
    assert scales.tolist() == [[0.5, 0.5, 0], [0, 0, 3], [0, 0, 0], [0.5, 0.5, 0], [0, 0, 0]]
    assert torch.equal(others, scales == 0)
    assert rows.scales(2, there, torch.float32)[0] is scales
    assert rows.scales(2, ((0, 2, 1.5, 1), there[1]), torch.float32)[0][0, 0] == 1.5
    assert not rows.scales(2, ((0, 2, 0.0, 1), there[1]), torch.float32)[1][0, 0]
    monkeypatch.setattr(multi_infer, "KEPT_SCALES", 1)
    assert rows.scales(2, there[:1], torch.float64)[0].dtype == torch.float64
    assert len(rows._scales) == 1


def test_rows_are_remembered_until_the_ids_change():
    ids = mix_ids("uniform", 16, 4)
    rows = multi_infer.rows_of(ids)
    assert multi_infer.rows_of(ids) is rows
    assert multi_infer.rows_of(ids.clone()) is not rows
    rows = multi_infer.rows_of(ids)
    ids.fill_(2)
    assert multi_infer.rows_of(ids).in_order == [(2, 0, 16)]
    with torch.inference_mode():
        quiet = ids + 0
        assert multi_infer.rows_of(quiet) is not multi_infer.rows_of(quiet)


def test_a_batch_whose_ids_change_in_place_between_calls():
    ids = mix_ids("uniform", 32, 3, seed=1)
    p = make_multi_problem(ids, 20, 28, (4, 2, 8), torch.float32)
    for seed in range(3):
        ids.copy_(mix_ids("uniform", 32, 3, seed=seed))
        Y = multi_lora_linear_infer(p.X, p.W, p.slots, p.ids, p.bias)
        assert_close(Y, multi_plain(p).Y, multi_truth(p).Y)


def test_ids_that_name_nothing_and_no_rows_at_all():
    p = make_multi_problem(torch.full((6,), -1), 8, 12, (4, 0), torch.float32)
    base = torch.nn.functional.linear(p.X, p.W, p.bias)
    for ids in ([-1] * 6, [-5, 1, 2, 7, 1, -1]):
        assert torch.equal(multi_lora_linear_infer(p.X, p.W, p.slots, torch.tensor(ids), p.bias), base)
    assert multi_lora_linear_infer(p.X[:0], p.W, p.slots, p.ids[:0], p.bias).shape == (0, 8)
