"""Tests which layers are found to read the same tensor, and when that may change how they run."""

import threading

import torch
from torch.utils.checkpoint import checkpoint

from lora_kernels.integrations.peft.sharing import MAX_ROUNDS_WITHOUT_SHARING, SharingDetector


def play(detector, rounds, dropout=False):
    """Make rounds of calls, each a string of index and tensor ("0a 1a 2b"). Each round has new tensors."""
    for text in rounds:
        tensors = {}
        for call in text.split():
            x = tensors.setdefault(call[1:], torch.ones(2))
            detector.observe(int(call[0]), x, dropout)
    return detector.partners


def test_layers_that_read_one_tensor_are_partners_from_the_next_round_on():
    detector = SharingDetector(4)
    assert play(detector, ["0a 1a 2a 3b"]) is None
    assert play(detector, ["0a"]) == ((0, 1, 2), (0, 1, 2), (0, 1, 2), ())


def test_two_pairs():
    assert play(SharingDetector(4), ["0a 1b 2a 3b", "0a"]) == ((0, 2), (1, 3), (0, 2), (1, 3))


def test_a_layer_that_reads_it_twice_is_left_out():
    assert play(SharingDetector(3), ["0a 1a 1a 2a", "0a"]) == ((0, 2), (), (0, 2))


def test_a_tensor_that_was_changed_is_another():
    detector, x = SharingDetector(3), torch.ones(2)
    detector.observe(0, x, False)
    x.add_(1)
    for index in (1, 2, 0):
        detector.observe(index, x, False)
    assert detector.partners == ((), (1, 2), (1, 2))


def test_an_equal_tensor_in_the_memory_of_one_that_is_gone_is_another():
    detector = SharingDetector(2)
    for _ in range(MAX_ROUNDS_WITHOUT_SHARING + 1):
        for index in (0, 1):
            detector.observe(index, torch.ones(2), False)
    assert detector.partners == ((), ())


def test_one_tensor_for_all_rounds():
    detector, x = SharingDetector(2), torch.ones(2)
    for index in (0, 1, 0):
        detector.observe(index, x, False)
    assert detector.partners == ((0, 1), (0, 1))


def test_a_round_that_was_cut_short_teaches_nothing():
    detector = SharingDetector(2)
    assert play(detector, ["0a", "0a 1a"]) is None
    assert play(detector, ["0a"]) == ((0, 1), (0, 1))


def test_nothing_in_common_is_not_looked_for_for_ever():
    detector = SharingDetector(2)
    assert play(detector, ["0a 1b"] * MAX_ROUNDS_WITHOUT_SHARING) is None
    assert play(detector, ["0a"]) == ((), ())


def test_misses_running_make_it_forget_and_it_learns_again():
    pair = ((0, 1), (0, 1))
    detector = SharingDetector(2, pair)
    detector.miss(pair)
    detector.complete()
    detector.miss(pair)
    assert detector.partners is pair
    detector.miss(pair)
    assert detector.partners is None
    detector.miss(pair)  # of a round that began before
    learned = play(detector, ["0a 1a", "0a"])
    assert learned == pair
    detector.miss(learned)
    assert detector.partners is learned
    detector.miss(learned)
    detector.partners = pair
    detector.miss(pair)
    detector.miss(pair)
    assert detector.partners == ((), ())


def test_calls_without_gradients_and_with_dropout_may_be_recomputed():
    detector = SharingDetector(2)
    with torch.no_grad():
        assert play(detector, ["0a 1a"] * 4, dropout=True) is None
        assert play(SharingDetector(2), ["0a 1a", "0a"]) is not None


def test_what_may_be_recomputed_holds_the_change_up():
    """Saved-tensor hooks of checkpoint are alive until the backward has ended."""
    detector, weight = SharingDetector(2), torch.ones(2, requires_grad=True)

    def body(x):
        h = x * weight
        for index in (0, 1):
            detector.observe(index, h, True)
        return (h * weight).exp()

    for reentrant in (False, True):
        detector = SharingDetector(2)
        first = checkpoint(body, torch.ones(2, requires_grad=True), use_reentrant=reentrant).sum()
        second = checkpoint(body, torch.ones(2, requires_grad=True), use_reentrant=reentrant).sum()
        assert detector.partners is None
        second.backward()
        third = checkpoint(body, torch.ones(2, requires_grad=True), use_reentrant=reentrant).sum()
        assert detector.partners is None
        (first + third).backward()
        detector.observe(0, torch.ones(2), True)
        assert detector.partners == ((0, 1), (0, 1))


def test_a_recomputation_that_stops_early_is_no_round():
    detector, weight = SharingDetector(2), torch.ones(2, requires_grad=True)

    def body(x):
        h = x * weight
        detector.observe(0, h, False)
        y = h.exp()
        detector.observe(1, h, False)
        return y

    for _ in range(2):
        checkpoint(body, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert detector.partners == ((0, 1), (0, 1))


def test_each_thread_has_rounds_of_its_own():
    detector = SharingDetector(2)
    for _ in range(2):
        x, y = torch.ones(2), torch.ones(2)
        detector.observe(0, x, False)
        other = threading.Thread(target=detector.observe, args=(1, y, False))
        other.start()
        other.join()
        detector.observe(1, x, False)
    assert detector.partners == ((0, 1), (0, 1))
