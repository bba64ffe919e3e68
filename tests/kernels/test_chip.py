"""What is known of a GPU, and what is asked of its driver."""

from types import SimpleNamespace

import torch

from lora_kernels.kernels import chip


def probe(monkeypatch, **props):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**props))
    chip.chip_of.cache_clear()
    found = chip.chip_of(0)
    chip.chip_of.cache_clear()
    return found


def test_rates_come_from_the_driver(monkeypatch):
    found = probe(
        monkeypatch, major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448,
        clock_rate=1_980_000, memory_clock_rate=2_619_000, memory_bus_width=5120,
    )  # fmt: skip
    assert found.arch == "sm_90"
    assert found.shared == 232448
    assert 900 < found.tflops < 1100
    assert 3300 < found.gbps < 3400


def test_an_unknown_gpu_gets_careful_figures(monkeypatch):
    found = probe(monkeypatch, major=13, minor=7, multi_processor_count=10)
    assert found.arch == "sm_137"
    assert found.shared == chip.CHIPS["sm_80"].shared
    assert found.tflops > 0
    assert found.gbps > 0
