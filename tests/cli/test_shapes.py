import json
from collections import Counter

import pytest
import torch

from lora_kernels.cli.shapes import MODELS, Shape, on_meta, problems_of, shapes_from
from lora_kernels.errors import ConfigError
from lora_kernels.kernels.chip import CHIPS

H100 = CHIPS["sm_90"]


def problems(shapes, **changes):
    given = {"tokens": [512], "r": 16, "dtype": torch.bfloat16, "dropouts": [False], "ops": ["fwd"]} | changes
    return problems_of(shapes, *given.values(), H100)


def test_a_folder_and_its_config_file_give_the_same(tiny_model):
    found = shapes_from(str(tiny_model))
    assert found == {Shape(16, 16, True): 9, Shape(32, 16, True): 2, Shape(16, 32, True): 2}  # the pooler is one
    assert shapes_from(str(tiny_model / "config.json")) == found


def test_a_large_model_takes_no_memory(tmp_path):
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256} | sizes))
    assert shapes_from(str(path)) == MODELS["llama-3-70b"]


@pytest.mark.parametrize("source", ["./missing", "/tmp", "config.json"])
def test_what_is_no_model(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no model|no such file"):
        shapes_from(source)


def test_the_most_expensive_come_first_and_once():
    shapes = {Shape(1024, 4096): 2, Shape(4096, 4096): 2, Shape(4096, 4096, True): 1, Shape(1024, 1024): 500}
    found = problems(shapes, tokens=[512, 8192])
    assert (found[0].M, found[0].N, found[0].K) == (8192, 1024, 1024)
    assert len(found) == 6  # a bias makes no problem of its own
    assert [q.M for q in problems({Shape(1024, 4096): 1}, tokens=[500, 512, 300])] == [500]  # one bucket of rows
    both = problems(shapes, ops=["fwd", "bwd"], dropouts=[False, True])
    assert {(q.op, q.dropout) for q in both} == {(op, p) for op in ("fwd", "bwd") for p in (False, True)}
    assert not any(q.bias for q in both if q.op == "bwd")


def test_listed_models_add_up():
    parameters = {"llama-3-8b": 6.98e9, "llama-3-70b": 68.5e9, "bert-base": 85e6, "qwen2.5-7b": 6.5e9}
    for name, expected in parameters.items():
        total = sum(count * shape.N * shape.K for shape, count in MODELS[name].items())
        assert total == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", list(MODELS))
def test_the_listed_configurations_give_the_listed_layers(name):
    found = Counter(type(module).__name__ for module in on_meta(name).modules())
    assert found["Linear"] == sum(MODELS[name].values()) + (name == "bert-base")  # its pooler
    assert all(Shape(m.out_features, m.in_features, m.bias is not None) in MODELS[name]
               for m in on_meta(name).modules() if type(m).__name__ == "Linear")  # fmt: skip
