import json
import struct

import pytest
import torch
from torch import nn

from lora_kernels.finetune.checkpoint import (
    CheckpointError,
    checkpoints,
    load_newest,
    pack,
    save_checkpoint,
    unpack,
)


def roundtrip(tree):
    tensors = {}
    return unpack(json.loads(json.dumps(pack(tree, tensors))), tensors)


def test_pack_keeps_types_and_bits():
    tree = {
        "tuple": (1, 2.5, None, [True, "text"]),
        0: {"nested": {3: torch.tensor([1.5, -0.0])}},
        "empty": {},
        "tenth": 0.1 + 0.2,
        "scalar": torch.tensor(7),
    }
    back = roundtrip(tree)
    assert back.keys() == tree.keys()
    assert back["tuple"] == tree["tuple"]
    assert isinstance(back["tuple"], tuple)
    assert back["tenth"] == tree["tenth"]
    assert torch.equal(back[0]["nested"][3].view(torch.int32), tree[0]["nested"][3].view(torch.int32))
    assert back["scalar"].shape == ()
    assert roundtrip({"$tensor": "text", "$dict": 1}) == {"$tensor": "text", "$dict": 1}


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_optimizers_survive(optimizer):
    model = nn.Linear(3, 2)
    first = optimizer(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    first.step()
    second = optimizer(model.parameters(), lr=0.5)
    second.load_state_dict(roundtrip(first.state_dict()))
    assert str(second.state_dict()) == str(first.state_dict())


def test_what_would_need_pickle_is_refused():
    with pytest.raises(CheckpointError, match=r"state\.a\.1 is a function"):
        pack({"a": [1, lambda: None]}, {})


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, {"step": step, "x": torch.full((2,), float(step))}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000000010.safetensors", "step-000000002.safetensors"]
    assert load_newest(tmp_path)["step"] == 10


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    for step in (1, 2):
        newest = save_checkpoint(tmp_path, step, {"step": step, "x": torch.ones(100)})
    whole = newest.read_bytes()
    for damaged in (whole[:-50], whole[:4], b"", b"\xff" * len(whole), struct.pack("<Q", 2) + b"{}"):
        newest.write_bytes(damaged)
        assert load_newest(tmp_path)["step"] == 1
    checkpoints(tmp_path)[1].write_bytes(b"")
    with pytest.raises(CheckpointError, match="is whole"):
        load_newest(tmp_path)


def test_none_where_there_is_none(tmp_path):
    (tmp_path / "step-x.safetensors").write_bytes(b"")
    (tmp_path / ".step-000000001.safetensors.1.ab.tmp").write_bytes(b"")
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "missing") is None


def test_leftovers_of_a_killed_run_go(tmp_path):
    left = tmp_path / ".step-000000001.safetensors.1.ab.tmp"
    left.write_bytes(b"part")
    save_checkpoint(tmp_path, 2, {"step": 2})
    assert not left.exists()
