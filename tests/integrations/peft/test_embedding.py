"""Compares FastEmbedding with PEFT's own layer: outputs, gradients, and the calls that PEFT's forward runs."""

import copy
import io
import pickle

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from lora_kernels.check.compat.families import fill_adapters
from lora_kernels.integrations.peft import accelerate, decelerate
from lora_kernels.integrations.peft.embedding import FastEmbedding
from lora_kernels.testing import assert_close

VOCAB, N = 40, 32
IDS = torch.randint(0, VOCAB, (6, 17), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, make=nn.Embedding, **settings):
        super().__init__()
        self.emb = make(VOCAB, N, **settings)
        self.head = nn.Linear(N, 3)

    def forward(self, ids):
        return self.head(self.emb(ids))


def pair(make=nn.Embedding, dtype=torch.float32, config=None, autocast_adapter_dtype=True, **settings):
    """Return a PEFT model and its twin whose embedding is fused."""
    torch.manual_seed(0)
    config = {"r": 8, "lora_alpha": 13, "target_modules": ["emb"], **(config or {})}
    net = Net(make, **settings).to(dtype)
    model = get_peft_model(net, LoraConfig(**config), autocast_adapter_dtype=autocast_adapter_dtype)
    fill_adapters(model)
    twin = copy.deepcopy(model)
    embedding(twin).__class__ = FastEmbedding
    return model, twin


def embedding(model):
    return model.base_model.model.emb


def pass_through(model, ids=IDS):
    """Return Y of the embedding and every gradient of the adapters, by name."""
    layer = embedding(model)
    Y = layer(ids)
    made = {"Y": Y.detach()}
    if Y.requires_grad:
        Y.backward(torch.randn(Y.shape, generator=torch.Generator().manual_seed(2)).to(Y.dtype))
    made |= {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    return made


def compare(model, twin):
    """Apply the error rule to Y and all gradients in the models' own dtypes; PEFT in float64 is the truth."""
    own, fused, true = pass_through(model), pass_through(twin), pass_through(copy.deepcopy(model).double())
    assert fused.keys() == own.keys()
    for name, got in fused.items():
        assert_close(got, own[name], true[name], what=name)


def counted(twin):
    return embedding(twin).__dict__.get("_peft_forward_calls", {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter", [True, False], ids=["float32-adapter", "same"])
def test_as_peft_by_the_error_rule(dtype, adapter):
    torch.manual_seed(0)
    model = get_peft_model(
        Net(padding_idx=3).to(dtype),
        LoraConfig(r=8, lora_alpha=13, target_modules=["emb"]),
        autocast_adapter_dtype=adapter,
    )
    fill_adapters(model)
    twin = copy.deepcopy(model)
    embedding(twin).__class__ = FastEmbedding
    compare(model, twin)
    assert embedding(twin).why_not() is None
    assert not counted(twin)
    assert "fused" in embedding(twin).describe()[3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("make", "scale"), [(Gemma3TextScaledWordEmbedding, 5.6568), (BartScaledWordEmbedding, 4.0)], ids=["gemma", "bart"]
)
def test_embeddings_that_scale_their_rows(make, scale, dtype):
    model, twin = pair(make, dtype, padding_idx=0, embed_scale=scale)
    compare(model, twin)
    assert embedding(twin).why_not() is None


def test_several_adapters_and_a_changed_scale():
    model, twin = pair()
    for each in (model, twin):
        each.add_adapter("other", LoraConfig(r=3, target_modules=["emb"], use_rslora=True))
        fill_adapters(each, 1)
        each.base_model.set_adapter(["default", "other"])
        embedding(each).set_scale("default", 0.3)
    compare(model, twin)
    assert not counted(twin)


def test_autocast_and_inference_mode():
    model, twin = pair()
    with torch.autocast("cpu", torch.bfloat16):
        own, fused = pass_through(model), pass_through(twin)
    true = pass_through(copy.deepcopy(model).double())
    for name, got in fused.items():
        assert_close(got, own[name], true[name], what=name, dtype=torch.bfloat16)
    with torch.inference_mode():
        torch.testing.assert_close(embedding(twin)(IDS), embedding(model)(IDS))


@pytest.mark.parametrize(
    ("settings", "config", "reason"),
    [
        ({"max_norm": 1.0}, {}, "max_norm changes"),
        ({"sparse": True}, {}, "sparse gradients"),
        ({"scale_grad_by_freq": True}, {}, "scale_grad_by_freq"),
        ({}, {"use_dora": True}, "DoraEmbeddingVariant"),
    ],
    ids=["max_norm", "sparse", "freq", "dora"],
)
def test_what_stays_pefts(settings, config, reason):
    model, twin = pair(config=config, **settings)
    assert reason in embedding(twin).why_not()
    if "sparse" in reason:  # PEFT's own layer fails in its backward
        assert torch.equal(embedding(twin)(IDS), embedding(model)(IDS))
    else:
        own, fused = pass_through(model), pass_through(twin)
        assert all(torch.equal(own[name], fused[name]) for name in own)
    assert [reason in why for why in counted(twin)] == [True]


def test_a_scaled_embedding_derived_from_transformers_own_stays_pefts():
    _, twin = pair(Gemma3TextScaledWordEmbedding, padding_idx=0, embed_scale=2.0)
    base = embedding(twin).base_layer
    base.__class__ = type("NewScaledWordEmbedding", (type(base),), {"__module__": "transformers.models.new"})
    assert "NewScaledWordEmbedding" in embedding(twin).why_not()


def trainable_base(layer):
    layer.base_layer.weight.requires_grad_(True)


def hooked_base(layer):
    layer.base_layer.register_forward_hook(lambda module, args, output: 2 * output)


def disabled(layer):
    layer.enable_adapters(False)


def another_base(layer):
    base = type("Doubled", (nn.Embedding,), {"forward": lambda self, x: 2 * nn.Embedding.forward(self, x)})
    layer.base_layer.__class__ = base


@pytest.mark.parametrize("change", [trainable_base, hooked_base, disabled, another_base, nn.Module.eval])
def test_states_that_stay_pefts_and_come_back(change):
    model, twin = pair()
    for each in (model, twin):
        change(embedding(each))
    own, fused = pass_through(model), pass_through(twin)
    assert own.keys() == fused.keys()
    for name in own:
        torch.testing.assert_close(fused[name], own[name])
    assert bool(counted(twin)) == (change is not nn.Module.eval)
    assert (embedding(twin).why_not() is None) == (change is nn.Module.eval)


def test_accelerate_and_decelerate():
    model, twin = pair()
    accelerate(model, strict=True, verbose=False)
    assert "lora.Embedding(lora_kernels" in repr(embedding(model)).replace("\n", "").replace(" ", "")
    assert type(embedding(model)) is FastEmbedding
    assert torch.equal(embedding(model)(IDS), embedding(twin)(IDS))
    assert type(embedding(decelerate(model))) is peft.tuners.lora.layer.Embedding


def test_merged_and_unmerged():
    model, twin = pair()
    before = embedding(twin)(IDS)
    embedding(twin).merge()
    assert "merged" in embedding(twin).why_not()
    torch.testing.assert_close(embedding(twin)(IDS), before)
    embedding(twin).unmerge()
    assert embedding(twin).why_not() is None
    torch.testing.assert_close(embedding(twin)(IDS), embedding(model)(IDS))


def test_a_batch_of_several_adapters():
    model, twin = pair()
    names = ["default", "__base__"] * 3
    got, expected = (embedding(each)(IDS, adapter_names=names) for each in (twin, model))
    assert torch.equal(got, expected)
    assert any("adapter_names" in reason for reason in counted(twin))


def test_ids_out_of_range_and_of_a_wrong_kind_raise_as_in_peft():
    model, twin = pair()
    for ids, error in ((torch.tensor([VOCAB]), IndexError), (torch.randn(3), RuntimeError)):
        for each in (model, twin):
            with pytest.raises(error):
                embedding(each)(ids)


def test_deepcopy_pickle_and_torch_save_keep_the_class():
    _, twin = pair()
    layer, buffer = embedding(twin), io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert type(other) is FastEmbedding
        assert torch.equal(other(IDS), layer(IDS))


def test_compiles_whole():
    torch._dynamo.reset()
    model, twin = pair()
    compiled = torch.compile(embedding(twin), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), embedding(model)(IDS))
