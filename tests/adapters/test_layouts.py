"""Files of diffusers and Kohya: the numbers that PEFT has with the same matrices, or a refusal that names the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_kernels.adapters import load_adapter, merge_lora, save_adapter, unmerge_lora
from lora_kernels.adapters.layouts import from_layout
from lora_kernels.errors import AdapterFormatError, UnservableAdapterError
from lora_kernels.pool import AdapterPool
from tests.adapters.oracle import assert_same
from tests.adapters.unets import (
    TEXT_TARGETS,
    UNET_TARGETS,
    Pipeline,
    TextEncoder,
    UNet,
    diffusers,
    kohya,
    made,
    parts,
    pipeline,
    trained,
)

X = torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(3))


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, metadata=metadata)
    return path


def unet_adapter(**config: Any) -> nn.Module:
    return trained(made(UNet), UNET_TARGETS, **config)


def text_adapter(**config: Any) -> nn.Module:
    return trained(made(TextEncoder), TEXT_TARGETS, **config)


VARIED = {
    "rank_pattern": {"to_q": 3, "mid_block.attn1.to_v": 1},
    "alpha_pattern": {"to_k": 7, "mid_block.attn1.to_q": 0.5},
}


@pytest.mark.parametrize("config", [{}, VARIED], ids=["alike", "varied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kohya_into_a_unet_is_what_peft_computes(tmp_path: Path, config: Any, dtype: torch.dtype) -> None:
    theirs = unet_adapter(**config)
    file = write(
        tmp_path / "kohya.safetensors", {k: t.to(dtype) for k, t in kohya("lora_unet_", parts(theirs)).items()}
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameter.to(dtype))
    ours = load_adapter(made(UNet), file)
    assert_same(ours, theirs, made(UNet), X)
    save_adapter(ours, tmp_path / "again")
    assert_same(load_adapter(made(UNet), tmp_path / "again"), theirs, made(UNet), X)
    import peft

    back = peft.PeftModel.from_pretrained(made(UNet), str(tmp_path / "again")).eval()
    assert_same(ours, back, made(UNet), X)
    assert_same(merge_lora(ours), theirs, made(UNet), X)
    assert_same(unmerge_lora(ours), theirs, made(UNet), X)


def test_kohya_without_alpha_has_the_scaling_1(tmp_path: Path) -> None:
    theirs = unet_adapter(lora_alpha=2)
    file = write(tmp_path / "kohya.safetensors", kohya("lora_unet_", parts(theirs), alpha=False))
    assert_same(load_adapter(made(UNet), file), theirs, made(UNet), X)


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_"])
def test_kohya_into_a_text_encoder(tmp_path: Path, prefix: str) -> None:
    theirs = text_adapter()
    file = write(tmp_path / "kohya.safetensors", kohya(prefix, parts(theirs)))
    assert_same(load_adapter(made(TextEncoder), file), theirs, made(TextEncoder), X)


@pytest.mark.parametrize("style", ["peft", "lora", "processor"])
def test_diffusers_into_a_unet(tmp_path: Path, style: str) -> None:
    theirs = trained(made(UNet), ["to_q", "to_k", "to_v", "to_out.0"], lora_alpha=2)
    write(tmp_path / "pytorch_lora_weights.safetensors", diffusers("unet.", parts(theirs), style))
    assert_same(load_adapter(made(UNet), tmp_path), theirs, made(UNet), X)


@pytest.mark.parametrize("style", ["peft", "linear", "processor"])
def test_diffusers_into_a_text_encoder(tmp_path: Path, style: str) -> None:
    theirs = text_adapter(lora_alpha=2)
    write(tmp_path / "any.safetensors", diffusers("text_encoder.", parts(theirs), style))
    assert_same(load_adapter(made(TextEncoder), tmp_path), theirs, made(TextEncoder), X)


@pytest.mark.parametrize("component", ["transformer", "text_encoder_2", "unet"])
def test_diffusers_metadata_and_alphas_give_the_scaling(tmp_path: Path, component: str) -> None:
    theirs = unet_adapter(lora_alpha=5, use_rslora=True, alpha_pattern={"to_k": 2.0})
    tensors = diffusers(f"{component}.", parts(theirs))
    settings = {"r": 2, "lora_alpha": 5, "use_rslora": True, "alpha_pattern": {"to_k": 2.0}, "target_modules": ["x"]}
    flat = {"lora_adapter_metadata": json.dumps({f"{component}.{name}": value for name, value in settings.items()})}
    file = write(tmp_path / "a.safetensors", tensors, flat)
    assert_same(load_adapter(made(UNet), file), theirs, made(UNet), X)
    alphas = {f"{component}.{path}.alpha": one["alpha"] for path, one in parts(theirs).items()}
    file = write(tmp_path / "b.safetensors", tensors | alphas)
    assert_same(load_adapter(made(UNet), file), theirs, made(UNet), X)


def test_a_layer_saved_as_a_convolution_of_one_point(tmp_path: Path) -> None:
    theirs = unet_adapter()
    tensors = {
        key: tensor[..., None, None] if tensor.dim() else tensor
        for key, tensor in kohya("lora_unet_", parts(theirs)).items()
    }
    assert_same(load_adapter(made(UNet), write(tmp_path / "a.safetensors", tensors)), theirs, made(UNet), X)


def whole_file(tmp_path: Path, layout: str) -> tuple[Path, nn.Module, nn.Module]:
    unet, text = unet_adapter(lora_alpha=2), text_adapter(lora_alpha=2)
    if layout == "kohya":
        tensors = kohya("lora_unet_", parts(unet)) | kohya("lora_te_", parts(text))
    else:
        tensors = diffusers("unet.", parts(unet)) | diffusers("text_encoder.", parts(text), "linear")
    return write(tmp_path / "both.safetensors", tensors), unet, text


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_of_a_file_for_two_models_each_takes_its_part_and_warns(tmp_path: Path, layout: str) -> None:
    file, unet, text = whole_file(tmp_path, layout)
    with pytest.warns(
        UserWarning, match=r"also holds \d+ tensors for '(lora_te_|text_encoder\.)', which were not loaded"
    ):
        ours = load_adapter(made(UNet), file)
    assert_same(ours, unet, made(UNet), X)
    with pytest.warns(UserWarning, match=r"also holds \d+ tensors for '(lora_unet_|unet\.)'"):
        ours = load_adapter(made(TextEncoder), file)
    assert_same(ours, text, made(TextEncoder), X)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_a_module_of_both_takes_the_whole_file(tmp_path: Path, layout: str) -> None:
    file, unet, text = whole_file(tmp_path, layout)
    theirs = Pipeline(unet, text)
    assert_same(load_adapter(pipeline(), file), theirs, pipeline(), X)


def test_which_of_two_text_encoders_is_meant(tmp_path: Path) -> None:
    first = trained(made(TextEncoder, 8, 2), TEXT_TARGETS)
    second = trained(made(TextEncoder, 12, 3), TEXT_TARGETS)
    tensors = kohya("lora_te1_", parts(first)) | kohya("lora_te2_", parts(second))
    file = write(tmp_path / "both.safetensors", tensors)
    with pytest.warns(UserWarning, match="lora_te2_"):
        assert_same(load_adapter(made(TextEncoder, 8, 2), file), first, made(TextEncoder, 8, 2), X)
    x = torch.randn(16, 5, 12, generator=torch.Generator().manual_seed(4))
    with pytest.warns(UserWarning, match="lora_te1_"):
        assert_same(load_adapter(made(TextEncoder, 12, 3), file), second, made(TextEncoder, 12, 3), x)
    same = write(tmp_path / "same.safetensors", kohya("lora_te1_", parts(first)) | kohya("lora_te2_", parts(first)))
    with pytest.raises(
        AdapterFormatError, match=r"several of them fit TextEncoder: 'lora_te1_', 'lora_te2_'.*key_mapping"
    ):
        load_adapter(made(TextEncoder, 8, 2), same)
    ours = load_adapter(made(TextEncoder, 8, 2), same, key_mapping={"lora_te2_": None})
    assert_same(ours, first, made(TextEncoder, 8, 2), X)


class Twins(nn.Module):
    """Two modules whose paths are one name in Kohya's layout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.a_b = nn.Module(), nn.Module()
        self.a.b_c, self.a_b.c = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a_b.c(torch.tanh(self.a.b_c(x)))


def test_an_ambiguous_name_is_refused_until_the_mapping_chooses(tmp_path: Path) -> None:
    theirs = trained(Twins(), ["a.b_c"])
    file = write(tmp_path / "a.safetensors", kohya("lora_unet_", parts(theirs)))
    with pytest.raises(AdapterFormatError, match=r"'lora_unet_a_b_c' may be 'a.b_c' or 'a_b.c'"):
        load_adapter(Twins(), file)
    mapping = {"lora_unet_a_b_c": "base_model.model.a.b_c"}
    assert_same(load_adapter(Twins(), file, key_mapping=mapping), theirs, Twins(), X)


def test_a_target_is_not_taken_for_a_module_that_ends_in_its_path(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential()
        model.add_module("q", nn.Linear(8, 8))
        model.add_module("in", nn.Sequential())
        model.get_submodule("in").add_module("q", nn.Linear(8, 8))
        return model

    theirs = trained(base(), r"q")
    file = write(tmp_path / "a.safetensors", kohya("lora_unet_", parts(theirs)))
    assert_same(load_adapter(base(), file), theirs, base(), X)


ONE, Q = torch.ones(2, 8), "lora_unet_mid_block_attn1_to_q."
CONVOLUTION: dict[str, Tensor | None] = {
    "lora_unet_conv_in.lora_down.weight": torch.ones(2, 8, 1),
    "lora_unet_conv_in.lora_up.weight": torch.ones(8, 2, 1),
}
REFUSED: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no such module": (
        {"lora_unet_down_blocks_7_attn1_to_q.lora_down.weight": ONE},
        r"names no module of UNet; the nearest is '(down_blocks\.\d|mid_block)\.attn1\.to_q'.*key_mapping=\{'lora_",
    ),
    "LoHa": ({Q + "hada_w1_a": ONE}, "belongs to LoHa"),
    "LoKr": ({Q + "lokr_w1": ONE}, "belongs to LoKr"),
    "CP": ({Q + "lora_mid.weight": ONE}, "belongs to a CP-decomposed"),
    "DoRA": ({Q + "dora_scale": ONE}, "belongs to DoRA"),
    "difference": ({Q + "diff": ONE}, "belongs to a full difference"),
    "anything": ({"metadata": ONE}, "'metadata' is not a key of an adapter; accepted ends are"),
    "two alphas": ({Q + "alpha": torch.ones(2)}, "expected one finite number"),
    "infinite alpha": ({Q + "alpha": torch.tensor(float("inf"))}, "expected one finite number"),
    "huge alpha": ({Q + "alpha": torch.tensor(1e300, dtype=torch.float64)}, "accepted is"),
    "alpha alone": ({"lora_unet_conv_in.alpha": torch.tensor(1.0)}, "conv_in has no lora_A and lora_B"),
    "half a pair": ({Q + "lora_up.weight": None}, "mid_block.attn1.to_q.lora_B.weight' is missing"),
    "a vector": ({Q + "lora_down.weight": torch.ones(8)}, "expected a matrix"),
    "empty": ({Q + "lora_down.weight": torch.ones(0, 8)}, "expected a matrix"),
    "a shape": ({Q + "lora_down.weight": torch.ones(2, 9)}, "shape .2, 9., expected .2, 8."),
    "a convolution": (
        CONVOLUTION,
        "conv_in, which is a Conv1d; only nn.Linear is supported",
    ),
    "twice": (
        {"base_model.model.mid_block.attn1.to_q.lora_A.weight": ONE, Q + "lora_down.weight": ONE},
        "two keys become|several of them fit|also holds",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    change, says = REFUSED[case]
    tensors: dict[str, Any] = kohya("lora_unet_", parts(unet_adapter())) | change
    file = write(tmp_path / "a.safetensors", {key: tensor for key, tensor in tensors.items() if tensor is not None})
    model = made(UNet)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterFormatError, match=says):
        load_adapter(model, file)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_pool_reads_both_layouts(tmp_path: Path) -> None:
    theirs, model = unet_adapter(**VARIED), made(UNet)
    tensors = kohya("lora_unet_", parts(theirs))
    pool = AdapterPool(model, capacity=3, max_rank_total=16)
    pool.load("file", write(tmp_path / "a.safetensors", tensors))
    pool.load("memory", tensors)
    again = trained(made(UNet), ["to_q", "to_out.0"], lora_alpha=2)
    write(tmp_path / "pytorch_lora_weights.safetensors", diffusers("unet.", parts(again), "processor"))
    pool.load("folder", tmp_path / "pytorch_lora_weights.safetensors")

    class Served(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            with pool.batch([self.name]):
                return model(x)

    for name in ("file", "memory"):
        assert_same(Served(name), theirs, made(UNet), X)
    assert_same(Served("folder"), again, made(UNet), X)
    with pytest.raises(UnservableAdapterError, match=r"conv_in \(a Conv1d, no linear layer\)"):
        pool.load("no", tensors | CONVOLUTION)


def test_the_configuration_names_full_paths_and_the_usual_numbers() -> None:
    theirs = unet_adapter(**VARIED)
    _, config = from_layout(made(UNet), kohya("lora_unet_", parts(theirs)), {})
    assert (config["r"], config["lora_alpha"]) == (2, 3.0)
    queries = {f"{block}.attn1.to_q": 3 for block in ("down_blocks.0", "down_blocks.1", "mid_block")}
    assert config["rank_pattern"] == queries | {"mid_block.attn1.to_v": 1}
    assert "mid_block.proj_in" in config["target_modules"]
