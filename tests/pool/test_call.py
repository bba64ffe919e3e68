"""A call's inputs by name, and where the requests can be."""

from __future__ import annotations

import torch

from lora_kernels.pool.call import Call, len_of, tensors_of


def call(reads_media: bool = False, **inputs: tuple[int, ...]) -> Call:
    tensors = {name: torch.zeros(shape) for name, shape in inputs.items()}
    return Call((), tensors, (), reads_media)


def test_names() -> None:
    x, y, z = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert dict(tensors_of([x, 5, y], {"more": [z, {"deep": x}], "flag": True}, ["first"])) == {
        "first": x, "args.2": y, "more.0": z, "more.1.deep": x,
    }  # fmt: skip


def test_media_are_apart_where_the_model_reads_text() -> None:
    shapes = {"input_ids": (2, 5), "pixel_values": (3, 1, 4, 4), "image_sizes": (3, 2), "attention_mask": (2, 5)}
    both = call(**shapes)
    assert (list(both.main), list(both.media)) == (["input_ids", "attention_mask"], ["pixel_values", "image_sizes"])
    assert list(call(True, **shapes).main) == list(shapes)


def test_where_the_requests_can_be() -> None:
    one = call(x=(4, 3, 8))
    assert one.dims(4, None) == [(0,)]
    assert one.dims(3, None) == [(1,)]
    assert one.dims(12, None) == [(0, 1)]
    assert one.dims(5, None) == []
    assert one.dims(3, 0) == []
    assert one.dims(4, 1) == []
    assert one.dims(12, 1) == [(0, 1)]
    assert call(x=(3, 3, 8)).dims(3, None) == [(0,), (1,)]
    assert call(x=(1, 6)).dims(6, None) == [(0, 1)]  # tokens
    assert call(x=(1, 6)).dims(6, 1) == [(1,)]
    assert call(table=(5, 5), x=(2, 3)).dims(2, None) == [(0,)]


def test_what_is_left_of_the_shapes() -> None:
    one = call(x=(4, 3, 8), steps=(4,))
    assert one.view((0,)) == ({"x": 3}, (("x", (3, 8)), ("steps", ()), ()))
    assert one.view((1,)) == ({"x": 4, "steps": 4}, (("x", (4, 8)), ("steps", (4,)), ()))
    assert one.view((0, 1))[1] == (("x", (8,)), ("steps", ()), ())
    assert one.shapes() == "x (4, 3, 8), steps (4,)"
    assert call().shapes() == "no tensor"
    assert [len_of(torch.zeros(4, 3), dims) for dims in ((0,), (1,), (0, 1))] == [4, 3, 12]
    assert len_of(torch.zeros(4), (1,)) == 0
