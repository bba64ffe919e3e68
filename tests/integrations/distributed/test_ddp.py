"""Two processes under DistributedDataParallel end where one does; the cases are in ddp.py."""

import pytest


def test_our_layers_train_as_in_one_process(processes):
    processes("ddp", "one_step_each", "a_gradient_that_is_not_averaged_is_seen", "the_first_process_saves")


@pytest.mark.slow
def test_mixed_settings(processes):
    processes("ddp", "accumulation_with_no_sync", "checkpointing", "autocast_to_bfloat16", "zero_redundancy_optimizer")
    processes("ddp", "loads_into_a_wrapped_model")
