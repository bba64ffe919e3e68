"""Which file an adapter is read from, and where its configuration comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_kernels.adapters import load_adapter, save_adapter
from lora_kernels.adapters.sources import as_peft, open_source
from lora_kernels.errors import AdapterFormatError
from tests.adapters.oracle import assert_same
from tests.adapters.unets import UNET_TARGETS, UNet, diffusers, made, parts, trained

X = torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(3))


def test_a_file_has_the_configuration_beside_it_or_inside(tmp_path: Path) -> None:
    theirs = trained(made(UNet), UNET_TARGETS)
    theirs.save_pretrained(str(tmp_path / "peft"))
    ours = load_adapter(made(UNet), tmp_path / "peft" / "adapter_model.safetensors")
    assert_same(ours, theirs, made(UNet), X)
    save_adapter(ours, tmp_path / "ours")
    (tmp_path / "ours" / "adapter_model.safetensors").rename(tmp_path / "renamed.safetensors")
    assert_same(load_adapter(made(UNet), tmp_path / "renamed.safetensors"), theirs, made(UNet), X)
    save_adapter(ours, tmp_path / "ours")
    (tmp_path / "ours" / "adapter_config.json").unlink()
    assert_same(load_adapter(made(UNet), tmp_path / "ours"), theirs, made(UNet), X)


def test_pefts_keys_without_a_configuration_are_refused_as_the_scaling_is_not_known(tmp_path: Path) -> None:
    theirs = trained(made(UNet), UNET_TARGETS)
    theirs.save_pretrained(str(tmp_path))
    (tmp_path / "adapter_config.json").unlink()
    for where in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(
            AdapterFormatError, match=r"adapter_config.json is missing, and without it lora_alpha is not"
        ):
            load_adapter(made(UNet), where)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    bare = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    with pytest.raises(AdapterFormatError, match=r"adapter_config.json is missing"):
        as_peft(made(UNet), bare, None, {}, None)


def test_which_of_several_files_is_meant(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match=r"cannot be read: No such file"):
        load_adapter(made(UNet), tmp_path)
    theirs = trained(made(UNet), UNET_TARGETS, lora_alpha=2)
    for name in ("a", "b"):
        save_file(diffusers("unet.", parts(theirs)), tmp_path / f"{name}.safetensors")
    with pytest.raises(
        AdapterFormatError, match=r"2 .safetensors files \(a.safetensors, b.safetensors\); give the path of one"
    ):
        load_adapter(made(UNet), tmp_path)
    assert_same(load_adapter(made(UNet), tmp_path / "b.safetensors"), theirs, made(UNet), X)
    (tmp_path / "a.safetensors").rename(tmp_path / "pytorch_lora_weights.safetensors")
    assert_same(load_adapter(made(UNet), tmp_path), theirs, made(UNet), X)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"unet.r": "two"}', "lora_adapter_metadata: r = 'two'"),
        ('{"unet.use_qalora": true}', "use_qalora = True is a feature of PEFT's"),
        ('{"unet.lora_alpha": 1, "unet.lora_alpha": 2}', "a name occurs twice"),
    ],
)
def test_metadata_of_diffusers_that_cannot_be_followed(tmp_path: Path, settings: str, says: str) -> None:
    tensors = diffusers("unet.", parts(trained(made(UNet), UNET_TARGETS)))
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": settings})
    with pytest.raises(AdapterFormatError, match=says):
        load_adapter(made(UNet), tmp_path)


def test_a_configuration_beside_another_layout_is_refused(tmp_path: Path) -> None:
    theirs = trained(made(UNet), UNET_TARGETS)
    theirs.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 3
    save_file(diffusers("unet.", parts(theirs), "lora"), tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterFormatError, match=r"Kohya's layout, whose configuration is derived from the tensors"):
        load_adapter(made(UNet), tmp_path)


def test_links_are_followed_only_on_demand(tmp_path: Path) -> None:
    theirs = trained(made(UNet), UNET_TARGETS, lora_alpha=2)
    (tmp_path / "real").mkdir()
    save_file(diffusers("unet.", parts(theirs)), tmp_path / "real" / "a.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real" / "a.safetensors")
    with pytest.raises(AdapterFormatError, match="is a symbolic link"):
        load_adapter(made(UNet), tmp_path / "link.safetensors")
    ours = load_adapter(made(UNet), tmp_path / "link.safetensors", follow_symlinks=True)
    assert_same(ours, theirs, made(UNet), X)


@pytest.mark.parametrize("targets", [r".*vision\.(mid_block|down_blocks.*)\.attn1\.to_[qv]", "paths"])
def test_with_a_key_mapping_the_targets_follow_the_keys(tmp_path: Path, targets: str) -> None:
    theirs = trained(made(UNet), ["to_q", "to_v"])
    theirs.save_pretrained(str(tmp_path))
    file, base = tmp_path / "adapter_model.safetensors", "base_model.model."
    save_file({key.replace(base, f"{base}vision."): tensor for key, tensor in load_file(file).items()}, file)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    paths = [f"vision.{path}" for path in parts(theirs)]
    config["target_modules"] = paths if targets == "paths" else targets
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFormatError, match="does not fit UNet"):
        load_adapter(made(UNet), tmp_path)
    ours = load_adapter(made(UNet), tmp_path, key_mapping={f"{base}vision.": base})
    assert_same(ours, theirs, made(UNet), X)
    with pytest.raises(AdapterFormatError, match="does not fit UNet"):
        load_adapter(made(UNet), tmp_path, key_mapping={f"{base}vision.": f"{base}x."})


def test_of_pefts_folder_nothing_is_read_before_the_model_is_asked_for_its_places(tmp_path: Path) -> None:
    trained(made(UNet), UNET_TARGETS).save_pretrained(str(tmp_path))
    with open_source(made(UNet), tmp_path) as source:
        assert all(tensor.is_meta for tensor in source.described.values())
        assert source.read().keys() == source.described.keys()


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_lora_weights.bin"])
def test_pickles_are_refused_in_a_folder_and_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02")
    for where in (tmp_path, tmp_path / name):
        with pytest.raises(AdapterFormatError, match="a pickle, which can run code"):
            load_adapter(made(UNet), where)
