"""What persistent kernels share: who makes XA, and the flags of a stream, of another and of a captured graph."""

import itertools

import torch

from lora_kernels.kernels import persistent
from lora_kernels.kernels.persistent import one_launch_flags, one_launch_grid


def test_flags_of_two_streams_and_of_a_capture(monkeypatch):
    """One pair a stream; a capture has its own."""
    streams = [type("Stream", (), {"device_index": 0, "cuda_stream": handle}) for handle in (0, 7)]
    zeros, capturing, current = torch.zeros, [False], [streams[0]]
    monkeypatch.setattr(persistent, "_flags", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: zeros(*shape, dtype=dtype))
    gpu = torch.device("cuda", 0)
    first = one_launch_flags(4, gpu)
    assert first.shape == (2, 4)
    assert one_launch_flags(9, gpu).data_ptr() == first.data_ptr()
    assert one_launch_flags(1000, gpu).shape == (2, 1000)
    kept = one_launch_flags(4, gpu).data_ptr()
    current[0] = streams[1]
    assert one_launch_flags(4, gpu).data_ptr() != kept
    current[0], capturing[0] = streams[0], True
    assert one_launch_flags(4, gpu).data_ptr() != kept


def test_who_makes_xa():
    assert one_launch_grid(64, 16, 132) == (132, 32)  # 1,024 tiles leave 32 programs with a tile less
    assert one_launch_grid(2, 16, 132) == (34, 2)  # one wave: programs without any tile
    assert one_launch_grid(33, 4, 132) == (132, 8)  # no slack: a few all the same
    for num_m, num_n, units in itertools.product((1, 2, 7, 64, 500), (1, 3, 16), (1, 20, 132)):
        programs, xa_programs = one_launch_grid(num_m, num_n, units)
        assert 1 <= xa_programs <= min(num_m, programs)
        assert programs <= units
        first = [pid - xa_programs + (programs if pid < xa_programs else 0) for pid in range(programs)]
        assert sorted(first) == list(range(programs))
