"""Two processes under FSDP2 end where one does, and their adapter file is one process's; the cases are in fsdp.py."""

import pytest


@pytest.mark.slow
def test_our_layers_train_and_save_as_in_one_process(processes):
    processes("fsdp", "units_of_blocks", "saving_gathers", "loading_places_pieces")


@pytest.mark.slow
def test_mixed_settings(processes):
    processes("fsdp", "units_of_layers", "the_root_alone", "without_resharding_and_with_accumulation", "checkpointing")
    processes("fsdp", "moved_after_sharding", "adapters_left_whole", "mixed_precision")


@pytest.mark.slow
def test_refusals(processes):
    processes("fsdp", "a_failed_save_fails_everywhere", "what_cannot_be_sharded_says_so")
