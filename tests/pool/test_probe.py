"""Which rows belong to which request, in models of several kinds: each request as alone, or an AdapterPoolError."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lora_kernels as lk

K = 8
SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "initializer_range": 0.2}
NAMES: list[Any] = ["a", None, "b"]
TOKENS = torch.randint(3, 90, (3, 6), generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def served(model: nn.Module, folder: Path, targets: Any = "all-linear", **options: Any) -> Any:
    """(the pool of the model, {name: PEFT's model with that adapter alone})"""
    references: dict[Any, Any] = {None: copy.deepcopy(model).eval()}
    for name in "ab":
        torch.manual_seed(ord(name))
        config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        references[name] = peft.get_peft_model(copy.deepcopy(model), config).eval()
        references[name].save_pretrained(folder / name)
    pool = lk.AdapterPool(model.eval(), capacity=2, max_rank_total=4, **options)
    for name in "ab":
        pool.load(name, folder / name)
    return pool, references


def close(got: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(got, wanted, rtol=1e-3, atol=1e-3)


def longformer() -> Any:
    return hf.LongformerModel(
        hf.LongformerConfig(**SIZES, attention_window=[4, 4], max_position_embeddings=64, pad_token_id=0)
    )


def xlnet() -> Any:
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "initializer_range": 0.2}
    return hf.XLNetModel(hf.XLNetConfig(vocab_size=97, **sizes))


def mixtral() -> Any:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4))


def shared_expert() -> Any:
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 4}
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**SIZES, **sizes, num_key_value_heads=2))


@pytest.mark.parametrize("shape", [(3, 8), (4, 4)])
@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (longformer, ["query", "value"]),  # (sequence, batch, K) inside
        (xlnet, ["layer_1", "layer_2"]),
        (mixtral, ["q_proj", "v_proj"]),  # the experts' products depend on the mix in their last bits
        (shared_expert, ["q_proj", "down_proj"]),  # (batch * sequence, K) inside
    ],
)
def test_transformers_models(make: Any, targets: list[str], shape: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    pool, references = served(model, tmp_path, targets)
    names = [*NAMES, "b"][: shape[0]]
    ids = torch.randint(3, 90, shape)
    with torch.no_grad(), pool.batch(names):
        got = model(input_ids=ids)[0]
    for row, name in enumerate(names):
        with torch.no_grad():
            assert close(got[row], references[name](input_ids=ids[row : row + 1])[0][0]), row


def clip() -> Any:
    vision = {key: value for key, value in SIZES.items() if key != "vocab_size"} | {"image_size": 8, "patch_size": 4}
    text = SIZES | {"max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 96}
    torch.manual_seed(0)
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def test_images_have_ids_of_their_own(tmp_path: Path) -> None:
    model = clip()
    pool, references = served(model, tmp_path)
    for images in (3, 4):  # as many as texts are no proof that they belong together
        pixels = PIXELS[:images]
        with (
            torch.no_grad(),
            pool.batch(NAMES),
            pytest.raises(lk.AdapterPoolError, match=r"vision_model.*from the images alone.*image_ids"),
        ):
            model(input_ids=TOKENS, pixel_values=pixels)
        image_names = ["b", "b", None, "a"][:images]
        with torch.no_grad(), pool.batch(NAMES, image_ids=image_names):
            got = model(input_ids=TOKENS, pixel_values=pixels)
            for row, name in enumerate(NAMES):
                wanted = references[name](input_ids=TOKENS[row : row + 1], pixel_values=pixels[:1])
                assert close(got.text_embeds[row], wanted.text_embeds[0])
            for row, name in enumerate(image_names):
                wanted = references[name](input_ids=TOKENS[:1], pixel_values=pixels[row : row + 1])
                assert close(got.image_embeds[row], wanted.image_embeds[0])
    with torch.no_grad(), pool.batch(["a"] * 3):  # one adapter for everything
        got = model(input_ids=TOKENS, pixel_values=PIXELS)
        assert close(got.image_embeds, references["a"](input_ids=TOKENS, pixel_values=PIXELS).image_embeds)
    with torch.no_grad(), pool.batch(["a"] * 3, image_ids=["b"]):
        got = model(input_ids=TOKENS, pixel_values=PIXELS[:1])
        assert close(got.image_embeds, references["b"](input_ids=TOKENS, pixel_values=PIXELS[:1]).image_embeds)
        assert close(got.text_embeds, references["a"](input_ids=TOKENS, pixel_values=PIXELS[:1]).text_embeds)


def test_a_tower_without_adapters_has_nothing_to_ask(tmp_path: Path) -> None:
    model = clip()
    pool, references = served(model, tmp_path, r".*text_model.*(q_proj|fc1)")
    with torch.no_grad(), pool.batch(NAMES):
        got = model(input_ids=TOKENS, pixel_values=PIXELS)
    for row, name in enumerate(NAMES):
        with torch.no_grad():
            wanted = references[name](input_ids=TOKENS[row : row + 1], pixel_values=PIXELS)
        assert close(got.text_embeds[row], wanted.text_embeds[0])


def llava() -> Any:
    vision = {key: value for key, value in SIZES.items() if key != "vocab_size"} | {"image_size": 8, "patch_size": 4}
    text = SIZES | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision),
        text_config=hf.LlamaConfig(**text),
        image_token_id=96,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    return hf.LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("beams", [1, 2])
def test_prompts_with_several_images_under_generate(beams: int, tmp_path: Path) -> None:
    model = llava()
    pool, references = served(model, tmp_path, r".*(q_proj|v_proj|linear_1)")
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(3))
    ids[:, 1:5] = ids[:, 6:10] = 96  # two images of four patches for each prompt
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": PIXELS}
    with pool.batch(["a", "b"]), pytest.raises(lk.AdapterPoolError, match="image_ids"):
        model.generate(**inputs, **options)
    with pool.batch(["a", "b"], image_ids=["a", "a", "b", "b"]):
        got = model.generate(**inputs, **options)
    for row, name in enumerate("ab"):
        one = {key: value[row : row + 1] for key, value in inputs.items()} | {"pixel_values": PIXELS[2 * row :][:2]}
        wanted = references[name].generate(**one, **options)[0]
        assert torch.equal(got[row][: len(wanted)], wanted)


def test_an_encoder_that_generate_calls_by_itself(tmp_path: Path) -> None:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 12}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    torch.manual_seed(0)
    config = hf.WhisperConfig(
        d_model=32, vocab_size=97, init_std=0.2, max_target_positions=16, suppress_tokens=[], **sizes, **tokens
    )
    model = hf.WhisperForConditionalGeneration(config)
    pool, references = served(model, tmp_path, ["q_proj", "v_proj", "fc1"])
    features = torch.randn(3, 8, 24)
    with pool.batch(NAMES):
        got = model.generate(features, max_new_tokens=6, do_sample=False)
    for row, name in enumerate(NAMES):
        wanted = references[name].generate(features[row : row + 1], max_new_tokens=6, do_sample=False)[0]
        assert got[row].tolist()[: len(wanted)] == wanted.tolist()


class Guided(nn.Module):
    """Like a UNet: images, a step, and a projection of the text that came with them."""

    def __init__(self, doubles: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.doubles = doubles
        self.time, self.inside, self.text = nn.Linear(1, K), nn.Linear(K, K), nn.Linear(K, K)
        self.conv = nn.Conv2d(3, K, 2, 2)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        h = self.conv(sample).flatten(2).transpose(1, 2) + self.time(timestep.float().view(-1, 1))[:, None]
        text = self.text(encoder_hidden_states)
        h = h + torch.softmax(h @ text.transpose(1, 2), -1) @ text
        if not self.doubles:
            return self.inside(h)
        one, two = self.inside(torch.cat([h, -h])).chunk(2)
        return one * two


def test_guidance_gives_each_input_its_id(tmp_path: Path) -> None:
    model = Guided()
    pool, references = served(model, tmp_path, ["time", "inside", "text"])
    inputs = PIXELS[:2], torch.tensor([5, 7]), torch.randn(2, 6, K)
    twice = tuple(torch.cat([value, value]) for value in inputs)
    with torch.no_grad():
        with pool.batch(["a", "b"]), pytest.raises(lk.AdapterPoolError, match=r"one id for each sequence"):
            model(*twice)
        with pool.batch(["a", "b"]):
            model(*inputs)
            with pytest.raises(
                lk.AdapterPoolError, match=r"time is called with x \(4, 1\), and the batch has 2 adapter ids"
            ):
                model(*twice)
        with pool.batch(["a", "b"] * 2):
            got = model(*twice)
        for row, name in enumerate("abab"):
            assert close(got[row], references[name](*(value[row : row + 1] for value in twice))[0])


def test_a_model_that_doubles_its_rows_inside(tmp_path: Path) -> None:
    model = Guided(doubles=True)
    pool, references = served(model, tmp_path, ["inside"])
    inputs = PIXELS, torch.tensor([5, 7, 1, 2]), torch.randn(4, 6, K)
    for rows in (4, 2):
        some = [value[:rows] for value in inputs]
        with torch.no_grad(), pool.batch(["a", "b", None, "a"][:rows]):
            got = model(*some)
        for row, name in enumerate(["a", "b", None, "a"][:rows]):
            with torch.no_grad():
                assert close(got[row], references[name](*(value[row : row + 1] for value in some))[0])


@pytest.mark.parametrize("length", [2, 3, 5])
def test_a_sequence_first_encoder(length: int, tmp_path: Path) -> None:
    """Also where the sequences are as many as their tokens."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(K, 2, 16), 2)
    pool, references = served(model, tmp_path, ["linear1", "linear2"])
    x = torch.randn(length, 3, K)
    with torch.no_grad(), pool.batch(NAMES):
        got = model(x)
    for column, name in enumerate(NAMES):
        with torch.no_grad():
            assert close(got[:, column], references[name](x[:, column : column + 1])[:, 0])


def test_inputs_that_do_not_say_which_dimension_counts_the_requests(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pool, references = served(nn.Sequential(nn.Linear(K, K)), tmp_path, ["0"])
    model, x = pool._pooled.model, torch.randn(3, 3, K)  # every token by itself
    with torch.no_grad():
        with pool.batch(NAMES), pytest.raises(lk.AdapterPoolError, match=r"dimension 0 or 1 of the inputs.*batch_dim"):
            model(x)
        with pool.batch(NAMES):
            model(torch.randn(3, 2, K))  # other sizes say it
            got = model(x)
        for row, name in enumerate(NAMES):
            assert close(got[row], references[name](x[row]))
        pool.close()
        pool = lk.AdapterPool(model, capacity=2, max_rank_total=4, batch_dim=1)
        for name in "ab":
            pool.load(name, tmp_path / name)
        with pool.batch(NAMES):
            got = model(x)
        for column, name in enumerate(NAMES):
            assert close(got[:, column], references[name](x[:, column]))
    with pytest.raises(lk.ConfigError, match="batch_dim = 2: accepted are 0, 1 and None"):
        lk.AdapterPool(nn.Sequential(nn.Linear(2, 2)), capacity=1, max_rank_total=1, batch_dim=2)


def test_packed_patches_are_refused_unless_all_have_one_adapter(tmp_path: Path) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv = nn.Linear(K, K)

        def forward(self, hidden: Tensor, lengths: list[int]) -> Tensor:
            parts = [part + part.mean(1, keepdim=True) for part in hidden.split(lengths, 1)]
            return self.qkv(torch.cat(parts, 1))

    model = Packed()
    pool, references = served(model, tmp_path, ["qkv"])
    x = torch.randn(1, 6, K)
    with torch.no_grad():
        for names in (NAMES, [name for name in NAMES for _ in "12"]):
            with pool.batch(names), pytest.raises(lk.AdapterPoolError, match=r"qkv is called with x \(1, 6, 8\)"):
                model(x, [4, 1, 1])
        with pool.batch(["a"] * 3):
            assert close(model(x, [4, 1, 1]), references["a"](x, [4, 1, 1]))


@pytest.mark.parametrize("by", ["lengths", "mask"])
def test_rows_in_an_order_by_length(by: str, tmp_path: Path) -> None:
    class Sorting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.core = nn.Linear(K, K)

        def forward(self, x: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
            extent = lengths if mask is None else mask.sum(1)
            order = torch.argsort(extent, descending=True, stable=True)
            return self.core(x[order])[torch.argsort(order)]

    model = Sorting()
    pool, _ = served(model, tmp_path, ["core"])
    x = torch.randn(3, 6, K)
    for lengths in ([6, 6, 6], [4, 6, 5]):
        extents = {"lengths": torch.tensor(lengths)}
        if by == "mask":
            extents = {"mask": (torch.arange(6) < extents["lengths"][:, None]).long()}
        with torch.no_grad(), pool.batch(NAMES), pytest.raises(lk.AdapterPoolError, match="core is called with x"):
            model(x, **extents)


@pytest.mark.parametrize("order", [False, True])
def test_rows_that_another_input_routes(order: bool, tmp_path: Path) -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.core = nn.Linear(K, K)

        def forward(self, x: Tensor, task: Tensor) -> Tensor:
            y, at = x.clone(), task == 1
            y[at] = self.core(x[at])
            return y

    model = Routed()
    pool, _ = served(model, tmp_path, ["core"])
    task = torch.tensor([[1, 0, 2], [0, 1, 2], [2, 0, 1]]) if order else torch.tensor([[0, 1, 0]] * 3)
    with torch.no_grad(), pool.batch(NAMES), pytest.raises(lk.AdapterPoolError, match="core is called with x"):
        model(torch.randn(3, 3, K), task)


def test_what_is_not_called_by_the_model_is_shown_to_the_pool(tmp_path: Path) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one = nn.Sequential(nn.Linear(K, K))

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x + x.mean(1, keepdim=True))

    model = Parts()
    pool, references = served(model, tmp_path, ["one.0"])
    x = torch.randn(3, 4, K)
    with torch.no_grad():
        with pool.batch(NAMES), pytest.raises(lk.AdapterPoolError, match=r"no probe has shown.*pool\.probe"):
            model.one(x)
        with pytest.raises(lk.AdapterPoolError, match="at least two requests"):
            pool.probe(x[:1])
        pool.probe(x)
        with pool.batch(NAMES):
            got = model.one(x)
        for row, name in enumerate(NAMES):
            assert close(got[row], references[name].one(x[row : row + 1])[0])


def test_a_probe_leaves_no_trace(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, K), nn.Dropout(0.5), nn.BatchNorm1d(K), nn.Linear(K, K))
    pool, _ = served(model, tmp_path, ["0", "3"])
    model[1].train()
    model[2].train()
    x = torch.randn(4, K)
    before = x.clone(), {name: value.clone() for name, value in model.state_dict().items()}, random.getstate()
    torch.manual_seed(3)
    pool.probe(x)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), drawn)
    assert random.getstate() == before[2]
    assert torch.equal(x, before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [False, True, True, False]
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_a_batch_attaches_to_the_model_while_it_is_open(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2))
    pool, _ = served(model, tmp_path, ["q_proj"])
    names = set(vars(model))
    with pool.batch(["a", "b"]), pool.batch(["b", None]):
        assert set(vars(model)) == names | {"generate", "_expand_inputs_for_generation"}
        other = copy.deepcopy(model)  # is the frozen model, with a generate of its own
        assert other.generate(TOKENS[:2], max_new_tokens=1, pad_token_id=0).shape == (2, 7)
    assert set(vars(model)) == names
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
