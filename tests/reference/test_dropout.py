"""Keep masks: rate, independence, and what they may depend on."""

import math

import pytest
import torch

from lora_kernels.reference import generator_keep_mask, pack_keep, packed_width, philox_keep_mask, unpack_keep
from lora_kernels.reference.dropout import drop_threshold

M, K = 512, 1024


def seed(a: int, b: int = 0) -> torch.Tensor:
    return torch.tensor([a, b], dtype=torch.int64)


def masks(p: float, first: int = 7) -> dict[str, torch.Tensor]:
    return {
        "philox": philox_keep_mask(seed(first), p, M, K),
        "generator": generator_keep_mask(seed(first), p, M, K),
    }


def sigmas(count: float, expected: float, n: int) -> float:
    """How many standard deviations a binomial count lies from its expectation."""
    return abs(count - expected * n) / math.sqrt(n * expected * (1 - expected))


@pytest.mark.parametrize("kind", ["philox", "generator"])
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_keep_rate_overall_by_row_and_by_column(kind, p):
    keep = masks(p)[kind]
    assert sigmas(float(keep.sum()), 1 - p, M * K) < 5
    for axis, n in ((0, M), (1, K)):
        worst = max(sigmas(float(count), 1 - p, n) for count in keep.sum(axis))
        assert worst < 5.5  # the largest of 1,024 normal deviates exceeds this once in 25,000 runs


@pytest.mark.parametrize("kind", ["philox", "generator"])
def test_neighbours_rows_and_columns_are_independent(kind):
    keep = masks(0.5)[kind].float() * 2 - 1
    for shift_m, shift_k in ((0, 1), (0, 2), (0, 4), (0, 8), (1, 0), (1, 1), (2, 0), (0, 64)):
        product = keep[shift_m:, shift_k:] * keep[: M - shift_m, : K - shift_k]
        assert abs(float(product.mean())) * math.sqrt(product.numel()) < 5


@pytest.mark.parametrize("kind", ["philox", "generator"])
def test_seeds_and_offsets_give_unrelated_masks(kind):
    make = {"philox": philox_keep_mask, "generator": generator_keep_mask}
    reference = make[kind](seed(7), 0.5, M, K).float() * 2 - 1
    for other in (seed(8), seed(7, 1), seed(7 + 2**32), seed(7, 2**32), seed(-7)):
        product = reference * (make[kind](other, 0.5, M, K).float() * 2 - 1)
        assert abs(float(product.mean())) * math.sqrt(product.numel()) < 5
    again = make[kind](seed(7), 0.5, M, K).float() * 2 - 1
    assert torch.equal(reference, again)


def test_philox_depends_on_the_position_alone():
    whole = philox_keep_mask(seed(3), 0.3, 40, 50)
    assert torch.equal(philox_keep_mask(seed(3), 0.3, 11, 13), whole[:11, :13])


def test_philox_known_answer():
    """Philox4x32-7 of key 0 and counter 0, from the generator's published known-answer vectors (Random123)."""
    words = [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    lanes = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    for p in (0.1, 0.3, 0.5, 0.9):
        expected = torch.tensor([lane >= drop_threshold(p) for lane in lanes])
        assert torch.equal(philox_keep_mask(seed(0), p, 1, 8)[0], expected)


@pytest.mark.parametrize("make", [philox_keep_mask, generator_keep_mask])
def test_edges_of_the_probability(make):
    assert make(seed(1), 0.0, 9, 9).all()
    assert not make(seed(1), 1.0, 9, 9).any()
    assert make(seed(1), 0.5, 0, 9).shape == (0, 9)


@pytest.mark.parametrize("K", [1, 8, 127, 128, 129])
def test_bits_unpack_to_what_was_packed(K):
    keep = philox_keep_mask(seed(5), 0.5, 13, K)
    bits = pack_keep(keep)
    assert bits.shape == (13, packed_width(K))
    assert packed_width(K) % 16 == 0
    assert torch.equal(unpack_keep(bits, K), keep)
    assert bits[3, 0] & 1 == keep[3, 0]
