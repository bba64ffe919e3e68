"""The cost model of mixed batches: launches as they are made, bytes counted by hand, floors."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from lora_kernels.planning.cost import Launch
from lora_kernels.planning.multi_cost import KERNELS, MultiCallShape, decode, launches

N = K = 4096
DECODE = MultiCallShape("fwd", 32, N, K, L=8, R=8 * 16, dtype=torch.bfloat16)
PREFILL = replace(DECODE, M=4096)
BACKWARD = replace(PREFILL, op="bwd", need_xa=True)


def names(plan, problem):
    return [launch.kernel for launch in launches(plan, problem)]


def test_launches_in_order():
    assert names("decode", DECODE) == names("cuda", DECODE) == ["multi_decode"]
    assert names("eager", PREFILL) == ["multi_shrink", "matmul", "multi_expand"]
    assert names("extend", PREFILL) == ["multi_shrink", "multi_extend"]
    assert names("eager", BACKWARD) == ["multi_shrink", "matmul", "multi_expand", "multi_rows", "multi_grads"]
    assert names("extend", BACKWARD) == ["multi_shrink", "multi_extend", "multi_rows", "multi_grads"]
    assert names("extend", replace(BACKWARD, need_dx=False)) == ["multi_shrink", "multi_rows", "multi_grads"]


def test_a_batch_holds_no_more_adapters_than_it_has_rows():
    assert (DECODE.distinct, DECODE.ranks, DECODE.rank) == (8, 128, 16)
    few = replace(DECODE, M=2)
    assert (few.distinct, few.ranks, few.rank) == (2, 32, 16)
    none = replace(DECODE, L=0, R=0)
    assert (none.distinct, none.ranks, none.rank) == (0, 0, 0)
    assert names("decode", none) == ["multi_decode"]


@pytest.mark.parametrize(("adapters", "floor"), [(1, 1.008), (8, 1.063), (32, 1.25)])
def test_decode_moves_what_the_floor_says(adapters, floor):
    """1 + L r (K + N) / (K N) of the weight's bytes, and X and Y beside it."""
    problem = replace(DECODE, L=adapters, R=16 * adapters)
    moved = decode(problem).bytes - 2 * problem.M * (N + K)
    assert moved / (2 * N * K) == pytest.approx(floor, abs=1e-3)


def test_the_update_after_the_product_reads_and_writes_y_again():
    eager, extend = (sum(launch.bytes for launch in launches(plan, PREFILL)) for plan in ("eager", "extend"))
    assert eager - extend == 2 * (2 * PREFILL.M * N)
    flop = [sum(launch.flop for launch in launches(plan, PREFILL)) for plan in ("eager", "extend")]
    assert flop[0] == flop[1] == 2 * PREFILL.M * (N * K + 16 * (N + K))


def test_gradients_walk_once_over_each_matrix():
    rows, grads = launches("extend", BACKWARD)[-2:]
    low, wide = BACKWARD.M * 16, N + K
    assert rows == Launch("multi_rows", 0, 4 * (2 * BACKWARD.M + 2 * 8))
    assert grads == Launch("multi_grads", 2 * low * wide, 2 * (BACKWARD.M * wide + 2 * low + BACKWARD.R * wide))


def test_every_launch_of_a_plan_is_among_the_kernels_or_the_librarys():
    for plan, problem in product(("eager", "extend"), (PREFILL, BACKWARD)):
        assert {*names(plan, problem)} <= {*KERNELS, "matmul"}
    assert KERNELS["multi_sum"](BACKWARD).bytes == (4 * 4 + 2) * BACKWARD.R * (N + K)
