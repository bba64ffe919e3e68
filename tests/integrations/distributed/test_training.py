"""finetune.Trainer in two processes; the cases are in training.py."""

import pytest


@pytest.mark.slow
def test_trains_as_in_one_process(processes):
    processes("training", "steps_are_those_of_the_whole_batch", "interrupted_and_resumed_is_the_same")


@pytest.mark.slow
def test_mixed_settings(processes):
    processes("training", "wrapped_and_sampled_by_the_user", "masks_differ", "refusals")
