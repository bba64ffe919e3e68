"""Tensor parallel in two processes; the cases are in tp.py."""

import pytest


@pytest.mark.slow
def test_transformers_plan_and_refusals(processes):
    processes("tp", "transformers_plan", "our_layers_refuse")
