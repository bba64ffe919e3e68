import json
import struct

import pytest
import torch
from safetensors.torch import save
from torch import nn

from lora_kernels.finetune.train.checkpoint import (
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
        with pytest.warns(UserWarning, match=r"resuming from step-000000001\.safetensors.*step-000000002"):
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


def test_any_changed_bit_is_found(tmp_path):
    state = {"step": 1, "weights": {"x": torch.arange(6.0).view(2, 3)}, "flags": torch.tensor([True]), "rate": 0.5}
    save_checkpoint(tmp_path, 1, {"step": 0})
    newest = save_checkpoint(tmp_path, 2, state)
    whole = newest.read_bytes()
    for place in range(len(whole)):
        for bit in (0, 3, 7):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            newest.write_bytes(damaged)
            if _header(damaged) == _header(whole) and damaged[_data(whole) :] == whole[_data(whole) :]:
                continue  # white space, or an escape for the same character: the same content
            with pytest.warns(UserWarning, match="newer checkpoints are damaged"):
                assert load_newest(tmp_path)["step"] == 0, f"bit {bit} of byte {place}"


def _data(content):
    return 8 + struct.unpack("<Q", content[:8])[0]


def _header(content):
    try:
        return json.loads(content[8 : _data(content)])
    except ValueError:
        return None


def test_values_that_moved_between_tensors_are_found(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 0})
    newest = save_checkpoint(tmp_path, 2, {"a": torch.zeros(2), "b": torch.ones(2)})
    content = newest.read_bytes()
    newest.write_bytes(content.replace(b'"state.a"', b'"state.c"').replace(b'"state.b"', b'"state.a"').replace(
        b'"state.c"', b'"state.b"'))  # fmt: skip
    with pytest.warns(UserWarning, match="SHA-256"):
        assert load_newest(tmp_path) == {"step": 0}


def test_a_checkpoint_without_a_digest_is_not_resumed_from(tmp_path):
    (tmp_path / "step-000000001.safetensors").write_bytes(save({}, metadata={"format": "pt", "state": "{}"}))
    with pytest.raises(CheckpointError, match="no SHA-256"):
        load_newest(tmp_path)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_newer_file_does_not_push_out_what_was_written_after_it(tmp_path, keep):
    for step in (10, 20):
        newest = save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    save_checkpoint(tmp_path, 15, {"step": 15}, keep=keep)  # by the run that was resumed from step 10
    assert load_newest(tmp_path) == {"step": 15}
    assert len(checkpoints(tmp_path)) == keep
