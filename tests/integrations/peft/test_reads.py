"""Who reads the same tensor, and when that may change how layers run."""

import threading

import torch
from torch.utils.checkpoint import checkpoint

from lora_kernels.integrations.peft.reads import PATIENCE, Reads


def play(reads, rounds, dropout=False):
    """Rounds of calls, each a string of seat and tensor ("0a 1a 2b"); tensors of one round are new ones."""
    for text in rounds:
        tensors = {}
        for call in text.split():
            x = tensors.setdefault(call[1:], torch.ones(2))
            reads.observe(int(call[0]), x, dropout)
    return reads.partners


def test_layers_that_read_one_tensor_are_partners_from_the_next_round_on():
    reads = Reads(4)
    assert play(reads, ["0a 1a 2a 3b"]) is None
    assert play(reads, ["0a"]) == ((0, 1, 2), (0, 1, 2), (0, 1, 2), ())


def test_two_pairs():
    assert play(Reads(4), ["0a 1b 2a 3b", "0a"]) == ((0, 2), (1, 3), (0, 2), (1, 3))


def test_a_layer_that_reads_it_twice_is_left_out():
    assert play(Reads(3), ["0a 1a 1a 2a", "0a"]) == ((0, 2), (), (0, 2))


def test_a_tensor_that_was_changed_is_another():
    reads, x = Reads(3), torch.ones(2)
    reads.observe(0, x, False)
    x.add_(1)
    for seat in (1, 2, 0):
        reads.observe(seat, x, False)
    assert reads.partners == ((), (1, 2), (1, 2))


def test_an_equal_tensor_in_the_memory_of_one_that_is_gone_is_another():
    reads = Reads(2)
    for _ in range(PATIENCE + 1):
        for seat in (0, 1):
            reads.observe(seat, torch.ones(2), False)
    assert reads.partners == ((), ())


def test_one_tensor_for_all_rounds():
    reads, x = Reads(2), torch.ones(2)
    for seat in (0, 1, 0):
        reads.observe(seat, x, False)
    assert reads.partners == ((0, 1), (0, 1))


def test_a_round_that_was_cut_short_teaches_nothing():
    reads = Reads(2)
    assert play(reads, ["0a", "0a 1a"]) is None
    assert play(reads, ["0a"]) == ((0, 1), (0, 1))


def test_nothing_in_common_is_not_looked_for_for_ever():
    reads = Reads(2)
    assert play(reads, ["0a 1b"] * PATIENCE) is None
    assert play(reads, ["0a"]) == ((), ())


def test_misses_running_make_it_forget_and_it_learns_again():
    pair = ((0, 1), (0, 1))
    reads = Reads(2, pair)
    reads.miss(pair)
    reads.complete()
    reads.miss(pair)
    assert reads.partners is pair
    reads.miss(pair)
    assert reads.partners is None
    reads.miss(pair)  # of a round that began before
    learned = play(reads, ["0a 1a", "0a"])
    assert learned == pair
    reads.miss(learned)
    assert reads.partners is learned
    reads.miss(learned)
    reads.partners = pair
    reads.miss(pair)
    reads.miss(pair)
    assert reads.partners == ((), ())


def test_calls_without_gradients_and_with_dropout_may_be_recomputed():
    reads = Reads(2)
    with torch.no_grad():
        assert play(reads, ["0a 1a"] * 4, dropout=True) is None
        assert play(Reads(2), ["0a 1a", "0a"]) is not None


def test_what_may_be_recomputed_holds_the_change_up():
    """Saved-tensor hooks of checkpoint live until backward is through."""
    reads, weight = Reads(2), torch.ones(2, requires_grad=True)

    def body(x):
        h = x * weight
        for seat in (0, 1):
            reads.observe(seat, h, True)
        return (h * weight).exp()

    for reentrant in (False, True):
        reads = Reads(2)
        first = checkpoint(body, torch.ones(2, requires_grad=True), use_reentrant=reentrant).sum()
        second = checkpoint(body, torch.ones(2, requires_grad=True), use_reentrant=reentrant).sum()
        assert reads.partners is None
        second.backward()
        third = checkpoint(body, torch.ones(2, requires_grad=True), use_reentrant=reentrant).sum()
        assert reads.partners is None
        (first + third).backward()
        reads.observe(0, torch.ones(2), True)
        assert reads.partners == ((0, 1), (0, 1))


def test_a_recomputation_that_stops_early_is_no_round():
    reads, weight = Reads(2), torch.ones(2, requires_grad=True)

    def body(x):
        h = x * weight
        reads.observe(0, h, False)
        y = h.exp()
        reads.observe(1, h, False)
        return y

    for _ in range(2):
        checkpoint(body, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert reads.partners == ((0, 1), (0, 1))


def test_each_thread_has_rounds_of_its_own():
    reads = Reads(2)
    for _ in range(2):
        x, y = torch.ones(2), torch.ones(2)
        reads.observe(0, x, False)
        other = threading.Thread(target=reads.observe, args=(1, y, False))
        other.start()
        other.join()
        reads.observe(1, x, False)
    assert reads.partners == ((0, 1), (0, 1))
