"""Accelerated PEFT models in two processes; the cases are in peft_models.py."""

import pytest


@pytest.mark.slow
def test_trains_and_saves_as_in_one_process(processes):
    processes("peft_models", "under_ddp", "under_fsdp", "saving", "mixed_precision", "by_accelerator", timeout=240)


@pytest.mark.slow
def test_adapters_as_units_of_their_own(processes):
    processes("peft_models", "adapters_as_units_of_their_own", timeout=240)
