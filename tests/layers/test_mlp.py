"""LoRAMLP in the place of a SwiGLU block; a whole Llama with the containers against PEFT."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.errors import ConfigError

CONFIG = lk.LoRAConfig(r=4, lora_alpha=6, init_lora_weights=False)
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(36).view(3, 12)


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return lk.LoRAMLP.from_linears(nn.Linear(24, 40), nn.Linear(24, 40, bias=False), nn.Linear(40, 24), CONFIG)


def plainly(mlp, x):
    return mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def test_forward_and_gradients_are_those_of_the_children(mlp):
    x = torch.randn(2, 3, 24, requires_grad=True)
    parameters = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    results = []
    for y in (mlp(x), plainly(mlp, x)):
        results.append([y, *torch.autograd.grad(y.square().sum(), parameters)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_copies_merges_and_compiles(mlp):
    x = torch.randn(5, 24)
    y = mlp(x)
    assert torch.equal(copy.deepcopy(mlp)(x), y)
    lk.merge_lora(mlp)
    torch.testing.assert_close(mlp(x), y)
    lk.unmerge_lora(mlp)
    assert torch.equal(mlp(x), y)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x), y)
    mlp.double()
    torch.testing.assert_close(mlp(x.double()).float(), y)


def test_dropout_in_training_only(mlp):
    for layer in mlp.children_in_order():
        layer.lora_dropout = 0.5
    x = torch.randn(5, 24)
    assert not torch.equal(mlp(x), mlp(x))
    torch.testing.assert_close(mlp.eval()(x), plainly(mlp, x))


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="one width"):
        lk.LoRAMLP.from_linears(nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(5, 8))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.3, attention_bias=True)
    return transformers.LlamaForCausalLM(config)


class Attention(lk.LoRAQKV):
    """Llama's attention over a LoRAQKV: the projections keep their place below self_attn, o_proj beside them."""

    @classmethod
    def of(cls, attention: nn.Module) -> "Attention":
        module = cls.from_linears(attention.q_proj, attention.k_proj, attention.v_proj)
        module.o_proj, module.head_dim = attention.o_proj, attention.head_dim
        return module

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **_):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        q, k, v = (y.view(*y.shape[:-1], -1, self.head_dim).transpose(1, 2) for y in super().forward(hidden_states))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2)), None


def with_containers(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        layer.mlp = lk.LoRAMLP.from_linears(layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
        layer.self_attn = Attention.of(layer.self_attn)
    return model


def test_a_llama_equals_peft_and_exchanges_adapters_with_it(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False)
    theirs = peft.get_peft_model(llama(), config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = with_containers(lk.load_adapter(llama(), tmp_path / "theirs", trainable=True))
    results = []
    for model in (theirs, ours):
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        named = {
            name.replace("base_model.model.", "").replace(".default.weight", ""): parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        results.append({"logits": out.logits.detach(), **named})
    assert len(results[0]) == 1 + 2 * 2 * len(TARGETS)
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        torch.testing.assert_close(
            results[1][name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    lk.save_adapter(ours, tmp_path / "ours")
    from safetensors.torch import load_file

    files = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[1][key], tensor) for key, tensor in files[0].items())
    again = lk.load_adapter(
        with_containers(lk.apply_lora(llama(), lk.LoRAConfig(r=3, lora_alpha=6, target_modules=TARGETS))),
        tmp_path / "ours",
    )
    torch.testing.assert_close(again(input_ids=IDS).logits, results[0]["logits"], rtol=1e-4, atol=1e-5)
