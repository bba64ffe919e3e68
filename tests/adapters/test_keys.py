"""Keys that do not fit: what the message shows, what a prefix map does, and which of PEFT's own forms are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_kernels.adapters import load_adapter
from lora_kernels.adapters.keys import is_base_tensor, mismatch, renamed, shown, to_peft
from lora_kernels.errors import AdapterFormatError
from lora_kernels.pool import AdapterPool
from tests.adapters.oracle import assert_same, randomised
from tests.adapters.unets import UNet, made, trained

X = torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(3))
ONE, TWO, BASE = torch.ones(1), torch.ones(2), "base_model.model."


def saved(tmp_path: Path, change: Any = lambda key: key, **config: Any) -> tuple[Path, nn.Module]:
    """An adapter of PEFT's whose keys are changed, and PEFT's model."""
    theirs = trained(made(UNet), ["to_q", "to_v"], **config)
    theirs.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = {change(key): tensor.clone() for key, tensor in load_file(file).items()}
    save_file({key: tensor for key, tensor in tensors.items() if key}, file)
    return tmp_path, theirs


def test_the_longest_prefix_counts_once() -> None:
    mapping = {"a.": "b.", "a.b.": "c.", "": "all.", "b.": "never."}
    found = renamed({"a.x": ONE, "a.b.x": ONE, "y": ONE, "b.z": ONE}, mapping)
    assert list(found) == ["b.x", "c.x", "all.y", "never.z"]


def test_a_prefix_of_pefts_fits_keys_without_it_and_none_leaves_out() -> None:
    found = renamed({"model.x": ONE, "vision.y": TWO}, {"base_model.model.model.": "m.", "vision.": None})
    assert list(found) == ["m.x"]


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        ({"b": "c"}, "no key starts with 'b'; the first key is 'a.x'"),
        ({"a.x": "z", "a.y": "z"}, "gives two tensors the key 'z'"),
        ([("a", "b")], "accepted is a dictionary"),
        ({"a": 3}, "accepted is a dictionary"),
        ({3: "a"}, "accepted is a dictionary"),
        ("a", "accepted is a dictionary"),
    ],
)
def test_a_map_that_makes_no_sense_is_refused(mapping: Any, says: str) -> None:
    with pytest.raises(AdapterFormatError, match=says):
        renamed({"a.x": ONE, "a.y": TWO}, mapping)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ("q.lora_A.default.weight", "q.lora_A.weight"),
        ("base_model.model.q.lora_B.default.weight", "q.lora_B.weight"),
        ("q.lora_B.default.bias", "q.lora_B.bias"),
        ("q.lora_magnitude_vector.default.weight", "q.lora_magnitude_vector"),
        ("q.lora_magnitude_vector.default", "q.lora_magnitude_vector"),
        ("q.lora_magnitude_vector.weight", "q.lora_magnitude_vector"),
        ("e.lora_embedding_A.default", "e.lora_embedding_A"),
        ("q.lora_A.w.weight", "q.lora_A.weight"),
        ("q.lora_A.weight", "q.lora_A.weight"),
        ("base_model.model.q.lora_A.weight", "q.lora_A.weight"),
    ],
)
def test_forms_of_pefts_own_keys(found: str, wanted: str) -> None:
    assert list(to_peft({found: ONE})) == [f"base_model.model.{wanted}"]


def test_several_adapters_or_one_key_twice_are_refused() -> None:
    with pytest.raises(AdapterFormatError, match=r"name 2 adapters \(one, two\)"):
        to_peft({"q.lora_A.one.weight": ONE, "q.lora_A.two.weight": ONE})
    with pytest.raises(AdapterFormatError, match=r"two keys become 'base_model.model.q.lora_A.weight'"):
        to_peft({"q.lora_A.one.weight": ONE, "q.lora_A.weight": ONE})


def test_a_tensor_of_the_base_is_known_by_its_bits() -> None:
    state = {"q.weight": torch.arange(4.0)}
    key = "base_model.model.q.base_layer.weight"
    assert is_base_tensor(key, torch.arange(4.0), state)
    assert is_base_tensor("base_model.model.q.weight", torch.arange(4.0), state)
    assert not is_base_tensor(key, torch.arange(4.0) + 1, state)
    assert not is_base_tensor(key, torch.arange(4.0).half(), state)
    assert not is_base_tensor("base_model.model.v.weight", torch.arange(4.0), state)


def test_the_message_shows_the_two_keys_that_are_most_alike() -> None:
    expected = {f"base_model.model.model.layers.{i}.{m}.lora_A.weight" for i in range(3) for m in ("q", "v")}
    found = {key.replace(".model.model.", ".model.language_model.") for key in expected}
    says = mismatch(expected, expected, found)
    assert says == (
        "'base_model.model.model.layers.0.q.lora_A.weight' is missing (6 keys expected, 6 missing, 6 too many); the "
        "nearest key in the file is 'base_model.model.language_model.layers.0.q.lora_A.weight'. "
        "key_mapping={'base_model.model.language_model.': 'base_model.model.model.'} makes all of them fit"
    )
    odd = mismatch(expected, expected, found | {"x.lora_A.weight"})
    assert "If the two are the same, pass key_mapping={found prefix: expected prefix}" in odd
    assert mismatch(expected, expected, set()) == (
        "'base_model.model.model.layers.0.q.lora_A.weight' is missing (6 keys expected, 6 missing, 0 too many)"
    )
    surplus = mismatch(expected, set(), {"base_model.model.model.layers.2.k.lora_A.weight"})
    assert "is in the file but not expected" in surplus
    assert "the nearest expected key is 'base_model.model.model.layers.2." in surplus
    assert len(shown("k" * 10_000)) < 220


CHANGES = {
    "another prefix": (lambda key: key.replace(BASE, "module.net."), {"module.net.": BASE}),
    "a level more": (lambda key: key.replace(BASE, f"{BASE}inner."), {f"{BASE}inner.": BASE}),
    "a level less": (
        lambda key: key.replace(".down_blocks.", "."),
        {f"{BASE}{i}": f"{BASE}down_blocks.{i}" for i in range(2)},
    ),
    "an empty prefix": (lambda key: key.removeprefix("base_model."), {"": "base_model."}),
}


@pytest.mark.parametrize("where", ["load_adapter", "pool"])
@pytest.mark.parametrize("case", CHANGES)
def test_a_file_of_other_prefixes_loads_with_the_map_and_not_without(tmp_path: Path, case: str, where: str) -> None:
    change, mapping = CHANGES[case]
    folder, theirs = saved(tmp_path, change)
    model = made(UNet)
    pool = AdapterPool(model, capacity=1, max_rank_total=4) if where == "pool" else None

    def load(**options: Any) -> None:
        load_adapter(model, folder, **options) if pool is None else pool.load("a", folder, **options)

    with pytest.raises(AdapterFormatError, match=r"is missing .* nearest key in the file is .*key_mapping="):
        load()
    load(key_mapping=mapping)

    class Served(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with pool.batch(["a"]):
                return model(x)

    assert_same(model if pool is None else Served(), theirs, made(UNet), X)


def test_the_map_that_a_message_shows_makes_the_file_fit(tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path, CHANGES["another prefix"][0])
    with pytest.raises(AdapterFormatError) as caught:
        load_adapter(made(UNet), folder)
    text = str(caught.value).partition("key_mapping=")[2].partition("}")[0] + "}"
    assert_same(load_adapter(made(UNet), folder, key_mapping=eval(text)), theirs, made(UNet), X)


@pytest.mark.parametrize("bare", [False, True], ids=["prefixed", "bare"])
@pytest.mark.parametrize("name", ["default", "sql"])
def test_old_keys_with_the_adapters_name(tmp_path: Path, name: str, bare: bool) -> None:
    def change(key: str) -> str:
        key = key.removeprefix("base_model.model.") if bare else key
        return key.replace(".weight", f".{name}.weight")

    folder, theirs = saved(tmp_path, change)
    assert_same(load_adapter(made(UNet), folder), theirs, made(UNet), X)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"bias": "all"}, {"use_rslora": True}], ids=str)
def test_a_whole_state_dict_of_pefts_model(tmp_path: Path, config: dict[str, Any]) -> None:
    settings = {"r": 2, "target_modules": ["to_q", "proj_in"], "modules_to_save": ["conv_in"]} | config
    theirs = randomised(peft.get_peft_model(made(UNet), peft.LoraConfig(**settings)))
    theirs.save_pretrained(str(tmp_path))
    state = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    assert_same(load_adapter(made(UNet), tmp_path), theirs, made(UNet), X)
    state["base_model.model.mid_block.attn1.to_k.weight"] += 1
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterFormatError, match=r"mid_block.attn1.to_k.weight' is in the file but not expected"):
        load_adapter(made(UNet), tmp_path)


def test_a_pool_reads_them_from_memory_too() -> None:
    theirs, model = trained(made(UNet), ["to_q"]), made(UNet)
    pool = AdapterPool(model, capacity=1, max_rank_total=4)
    state, config = theirs.state_dict(), theirs.peft_config["default"]
    pool.load("a", state, config)
    pool.load("a", {f"x.{key}": tensor for key, tensor in state.items()}, config, key_mapping={"x.": ""})
