"""Accelerated PEFT models in two processes; the cases are in peft_models.py."""

import pytest


@pytest.mark.slow
def test_trains_and_saves_as_in_one_process(processes):
    cases = ("under_ddp", "under_fsdp", "saving", "adapters_as_units_of_their_own", "mixed_precision", "by_accelerator")
    processes("peft_models", *cases)
