"""Compare every figure of advise with measurements: written files, FLOPs and bytes of a real step."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import LoRAConfig, apply_lora, save_adapter
from lora_kernels.errors import ConfigError
from lora_kernels.finetune.advise.advise import adapter_bytes, advise, cost_of, select, target_sets, train_only
from lora_kernels.finetune.train.fake_step import MORE_FLOPS, fake_step
from lora_kernels.finetune.train.memory import saved_for_backward

BATCH, TOKENS, HIDDEN, HEADS, LAYERS = 3, 10, 16, 2, 2


def bert(device="cpu", dtype=torch.float32, dropout=0.0):
    from transformers import BertConfig, BertForSequenceClassification

    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config = BertConfig(vocab_size=50, max_position_embeddings=32, num_labels=3, **sizes, **drops)
    with torch.device(device):
        return BertForSequenceClassification._from_config(config, dtype=dtype)


def llama(device="cpu"):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=1, **sizes))


def lora(model, r=4, targets="all-linear", task_type="SEQ_CLS", dora=False):
    return apply_lora(model, LoRAConfig(r=r, target_modules=targets, task_type=task_type, use_dora=dora))


@pytest.mark.parametrize(
    ("r", "dtype", "dora"),
    [(1, torch.float32, False), (40, torch.float32, False), (7, torch.bfloat16, False), (4, torch.float32, True)],
)
def test_bytes_on_disk_are_those_of_the_files(tmp_path, r, dtype, dora):
    save_adapter(lora(bert(dtype=dtype), r, dora=dora), tmp_path)
    written = sum(path.stat().st_size for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert adapter_bytes(lora(bert("meta", dtype), r, dora=dora)) == written


def test_bytes_are_only_counted_of_what_is_known():
    with pytest.raises(ConfigError, match="apply_lora was called"):
        adapter_bytes(bert("meta"))
    with pytest.raises(ConfigError, match="bias"):
        adapter_bytes(apply_lora(bert("meta"), LoRAConfig(bias="all")))


def real_step(model):
    """Measure FLOPs and saved bytes of a real step with fused CPU attention, including the loss as advise does."""
    inputs = {"input_ids": torch.zeros(BATCH, TOKENS, dtype=torch.long)}
    saved = saved_for_backward(model, inputs)
    model.train()
    with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter:
        logits = model(**inputs).logits.flatten(0, -2)
        nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)).backward()
    return counter.get_total_flops(), saved, logits


@pytest.mark.parametrize("strategy", ["LoRA", "q,v", "head", "full"])
def test_a_fake_step_counts_what_a_real_one_does(strategy):
    def trained(device):
        model = bert(device)
        if strategy == "full":
            return model
        return train_only(model, "SEQ_CLS") if strategy == "head" else lora(model, targets=targets[strategy])

    targets = {"LoRA": "all-linear", "q,v": ["query", "value"]}
    flops, saved, logits = real_step(trained("cpu"))
    loss = logits.numel() * 4 + len(logits) * 8 + 4  # log-softmax, targets, the sum of the weights
    before = trained("meta")
    assert fake_step(before, BATCH, TOKENS) == (flops, saved + loss)
    assert all(p.device.type == "meta" and p.grad is None for p in before.parameters())


def test_dora_keeps_what_it_keeps_and_its_norms_cost_a_product():
    _, saved, logits = real_step(lora(bert(), dora=True))
    model = lora(bert("meta"), dora=True)
    caches = [module._norms for module in model.modules() if hasattr(module, "_norms")]
    got = fake_step(model, BATCH, TOKENS)
    assert got[1] == saved + logits.numel() * 4 + len(logits) * 8 + 4
    assert caches == [module._norms for module in model.modules() if hasattr(module, "_norms")]
    per_token = [fake_step(lora(bert("meta"), dora=True), batch, TOKENS)[0] for batch in (1, 2)]
    norms = 2 * per_token[0] - per_token[1]  # independent of the batch size
    assert norms == 2 * 4 * LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * 32) + 2 * 4 * HIDDEN * HIDDEN  # and the pooler


def test_a_causal_language_model_too():
    model = lora(llama(), task_type="CAUSAL_LM")
    flops, saved, logits = real_step(model)
    got = fake_step(lora(llama("meta"), task_type="CAUSAL_LM"), BATCH, TOKENS)
    assert got[0] == flops
    assert saved < got[1] <= saved + logits.numel() * 4 + len(logits) * 8 + 4  # the log-softmax may be kept in place


def test_flops_of_attention_are_those_of_its_matrix_products():
    """The fused kernel has five products in backward; plain attention has four, since it keeps the scores."""
    with sdpa_kernel(SDPBackend.MATH):
        plain = real_step(bert())[0]
    scores = 2 * BATCH * HEADS * TOKENS * TOKENS * (HIDDEN // HEADS)
    assert fake_step(bert("meta"), BATCH, TOKENS)[0] == plain + LAYERS * scores


def test_flops_of_a_linear_chain_by_hand():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.up, self.down = nn.Embedding(50, 8), nn.Linear(8, 24), nn.Linear(24, 6)

        def forward(self, input_ids):
            return self.down(self.up(self.embedding(input_ids)))

    r, (up, down) = 2, (8 * 24, 24 * 6)
    row = cost_of(lora(Chain(), r, ["up", "down"], None), "LoRA", "", r, 1, 5)
    forward = 2 * (up + down) + 2 * r * (8 + 24 + 24 + 6)
    # up: B's input gradient, dA, dB; down: also the input's, through W and through A
    backward = 2 * r * (24 + 8 + 24) + 2 * down + 2 * r * (6 + 24 + 6 + 24)
    assert row.flops == forward + backward
    assert (row.trainable, row.gradients, row.optimizer) == (r * 62, 4 * r * 62, 8 * r * 62)
    assert row.weights == 4 * (50 * 8 + up + down + 24 + 6 + r * 62)
    assert row.memory == row.weights + row.gradients + row.optimizer + row.activations


def test_dropout_in_attention_keeps_no_scores():
    keeps = [fake_step(bert("meta", dropout=p), 1, 32)[1] for p in (0.0, 0.1)]
    scores = 4 * LAYERS * HEADS * 32 * 32
    masks = 32 * HIDDEN * (2 * LAYERS + 1) + HIDDEN  # after the embeddings, twice a layer, before the classifier
    assert keeps[0] < keeps[1] <= keeps[0] + 5 * masks < keeps[0] + scores + masks


@pytest.mark.slow
def test_ranks_between_are_as_if_they_had_been_run():
    ranks = [2, 5, 16]
    rows = advise(lambda: bert("meta"), "SEQ_CLS", ranks, BATCH, TOKENS)
    assert [(row.strategy, row.targets, row.r) for row in rows] == [
        *[("LoRA", name, r) for name in ("q,v", "attention", "mlp", "all-linear") for r in ranks],
        *[("DoRA", "all-linear", r) for r in ranks],
        ("head only", "", 0),
        ("full", "", 0),
    ]
    for row in rows[1:15:3]:
        targets = target_sets(bert("meta"), "SEQ_CLS")[row.targets]
        model = lora(bert("meta"), 5, targets, dora=row.strategy == "DoRA")
        run = cost_of(model, row.strategy, row.targets, 5, BATCH, TOKENS)
        assert row == replace(run, flops=row.flops)
        assert row.flops == pytest.approx(run.flops, rel=1e-12)
    full = rows[-1]
    assert full.trainable == sum(p.numel() for p in bert().parameters())
    assert full.rows_in(full.memory, BATCH) == BATCH
    assert full.rows_in(full.memory - 1, BATCH) == BATCH - 1
    assert full.rows_in(0, BATCH) == 0
    assert [row.strategy for row in advise(lambda: llama("meta"), "CAUSAL_LM", [4], 1, 4)][-2:] == ["DoRA", "full"]


@pytest.mark.parametrize(("build", "task_type"), [(bert, "SEQ_CLS"), (llama, "CAUSAL_LM")])
def test_target_sets_part_the_linear_layers(build, task_type):
    def adapted(targets):
        return set(lora(build("meta"), 4, targets, task_type).lora_injection.adapted)

    sets = {name: adapted(targets) for name, targets in target_sets(build("meta"), task_type).items()}
    assert sets["q,v"] < sets["attention"]
    assert sets["attention"] | sets["mlp"] == sets["all-linear"]
    assert not sets["attention"] & sets["mlp"]
    assert len(sets["q,v"]) == 2 * LAYERS


def test_names_where_names_do_and_a_pattern_where_not():
    modules = ["m", "m.0", "m.0.att.dense", "m.0.dense", "m.0.up", "m.1.att.dense", "m.1.dense", "m.1.up"]
    assert select(["m.0.up", "m.1.up"], modules) == ["up"]
    assert select(["m.0.dense", "m.1.dense"], modules) == r"m\.\d+\.dense"
    assert select(["m.0.dense", "m.1.dense", "m.0.up", "m.1.up"], modules) == r"m\.\d+\.(dense|up)"


def test_a_head_alone():
    model = train_only(bert("meta"), "SEQ_CLS")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}
    with pytest.raises(ConfigError, match="no fresh head"):
        train_only(llama("meta"), "CAUSAL_LM")
