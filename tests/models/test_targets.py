"""Selection equals PEFT's: for many models and configurations, the same layers with the same rank and scaling."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lora_kernels.config import LoRAConfig
from lora_kernels.errors import ConfigError
from lora_kernels.models.inject import plan_injection
from lora_kernels.models.targets import Matcher

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}


def bert_classifier() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SIZES))


def bert_lm() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SIZES))


def roberta_classifier() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(RobertaConfig(**SIZES))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


def plain() -> nn.Module:
    """No transformers model: dots, digits and equal ends in unexpected places."""

    def block() -> nn.Module:
        inner = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)}), nn.Linear(4, 4)])
        return nn.ModuleDict({"q": nn.Linear(4, 4), "my_q": nn.Linear(4, 4), "h": inner})

    net = nn.ModuleDict({"h": nn.ModuleList([block() for _ in range(3)])})
    return nn.ModuleDict({"net": net, "h": nn.ModuleList([block()]), "q": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})


MODELS: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f for f in (bert_classifier, bert_lm, roberta_classifier, llama, t5, plain)
}
BUILT: dict[str, nn.Module] = {}


def model_called(name: str) -> nn.Module:
    if name not in BUILT:
        BUILT[name] = MODELS[name]()
    return BUILT[name]


def pefts_choice(model: nn.Module, **config: Any) -> dict[str, tuple[int, float]] | None:
    """{path: (r, scaling)} of the layers that PEFT adapts; None where it raises."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
        except (ValueError, TypeError):
            return None
    layers = wrapped.base_model.model.named_modules()
    return {
        path: (m.r["default"], m.scaling["default"]) for path, m in layers if isinstance(m, peft.tuners.lora.Linear)
    }


def our_choice(model: nn.Module, **config: Any) -> dict[str, tuple[int, float]] | None:
    try:
        injection = plan_injection(model, LoRAConfig(**config))
    except ConfigError:
        return None
    return {p: (layer.r, injection.config.scaling(layer.r, layer.lora_alpha)) for p, layer in injection.adapted.items()}


CASES: list[tuple[str, dict[str, Any]]] = [
    ("bert_classifier", {}),
    ("bert_classifier", {"task_type": "SEQ_CLS"}),
    ("bert_classifier", {"target_modules": "all-linear"}),
    ("bert_classifier", {"target_modules": "All-Linear", "task_type": "SEQ_CLS"}),
    ("bert_classifier", {"target_modules": ["query", "value"]}),
    ("bert_classifier", {"target_modules": ["dense"]}),
    ("bert_classifier", {"target_modules": ["output.dense"]}),
    ("bert_classifier", {"target_modules": ["bert.pooler.dense", "key"]}),
    ("bert_classifier", {"target_modules": ["uery"]}),
    ("bert_classifier", {"target_modules": ["classifier", "query"], "task_type": "SEQ_CLS"}),
    ("bert_classifier", {"target_modules": ["classifier"], "task_type": "SEQ_CLS"}),
    ("bert_classifier", {"target_modules": ["query", "dropout"]}),
    ("bert_classifier", {"target_modules": r".*\.layer\.[01]\..*(query|key)"}),
    ("bert_classifier", {"target_modules": r"layer\.0"}),
    ("bert_classifier", {"target_modules": r".*\.(que|key)"}),
    ("bert_classifier", {"target_modules": "all-linear", "exclude_modules": r".*\.(que|key)"}),
    ("bert_classifier", {"target_modules": r".*LayerNorm"}),
    ("bert_classifier", {"target_modules": ["query", "key"], "exclude_modules": ["layer.1.attention.self.key"]}),
    ("bert_classifier", {"target_modules": "all-linear", "exclude_modules": r".*(dense|key)"}),
    ("bert_classifier", {"target_modules": ["query"], "exclude_modules": ["query"]}),
    ("bert_classifier", {"target_modules": ["dense", "query"], "modules_to_save": ["pooler"]}),
    ("bert_classifier", {"target_modules": ["query"], "modules_to_save": ["embeddings", "nothing"]}),
    ("bert_classifier", {"target_modules": ["query"], "layers_to_transform": 1}),
    ("bert_classifier", {"target_modules": ["query", "dense"], "layers_to_transform": [0, 2]}),
    ("bert_classifier", {"target_modules": ["query"], "layers_to_transform": []}),
    ("bert_classifier", {"target_modules": ["query"], "layers_to_transform": [7]}),
    ("bert_classifier", {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"}),
    ("bert_classifier", {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": ["h", "layer"]}),
    ("bert_classifier", {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "h"}),
    ("bert_classifier", {"layers_to_transform": [1]}),
    ("bert_classifier", {"target_modules": ["query", "key"], "rank_pattern": {"query": 3, "key": 5}}),
    ("bert_classifier", {"target_modules": ["query", "key"], "rank_pattern": {"ery": 3, ".*0.*": 5}, "r": 2}),
    ("bert_classifier", {"target_modules": ["query", "key"], "alpha_pattern": {"^bert.*key": 3}, "use_rslora": True}),
    ("bert_classifier", {"target_modules": ["query"], "rank_pattern": {r"layer\.\d+\.attention\.self\.query": 1}}),
    ("bert_classifier", {"target_modules": ["query"], "rank_pattern": {"query": 3, r"0\..*query": 4}}),
    ("bert_classifier", {"target_modules": ["query"], "alpha_pattern": {"query|key": 1, "x": 2}, "lora_alpha": 64}),
    ("bert_lm", {}),
    ("bert_lm", {"target_modules": "all-linear"}),
    ("bert_lm", {"target_modules": ["decoder", "query"]}),
    ("roberta_classifier", {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    ("roberta_classifier", {"task_type": "SEQ_CLS", "target_modules": ["dense", "out_proj"]}),
    ("roberta_classifier", {"target_modules": "all-linear"}),
    ("llama", {}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    ("llama", {"target_modules": ["q_proj", "gate_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    ("llama", {"target_modules": r".*mlp.*", "exclude_modules": r".*mlp"}),
    ("llama", {"target_modules": r".*(gate|up)_proj", "exclude_modules": r".*1\.mlp.*"}),
    ("llama", {"target_modules": ["self_attn"]}),
    ("t5", {}),
    ("t5", {"target_modules": "all-linear"}),
    ("t5", {"target_modules": ["q", "wi"], "layers_to_transform": [1], "layers_pattern": ["block"]}),
    ("plain", {"target_modules": ["q"]}),
    ("plain", {"target_modules": ["my_q", "h.1"], "exclude_modules": ["net.h.1"]}),
    ("plain", {"target_modules": ["my_q", "0.h.1"]}),
    ("plain", {"target_modules": "all-linear"}),
    ("plain", {"target_modules": ["q"], "layers_to_transform": [0, 2]}),
    ("plain", {"target_modules": ["q", "0"], "layers_to_transform": [1], "layers_pattern": "h"}),
    ("plain", {"target_modules": ["my_q"], "layers_to_transform": [1, 2], "layers_pattern": "h"}),
    ("plain", {}),
    ("llama", {"target_modules": r"^(?!.*layers\.1).*(?:q|k|v|o)_proj$"}),
    ("llama", {"target_modules": r"(?i).*\.(Q|V)_PROJ"}),
    (
        "llama",
        {"target_modules": r".*(?<=layers\.)[0-1]\.self_attn\.\w+", "exclude_modules": r".*(?!k_)\w_proj(?<!v_proj)"},
    ),
    ("llama", {"target_modules": r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)"}),
    ("llama", {"target_modules": r"(\w+\.)+(q|v)_proj", "rank_pattern": {r"(\w*\.)*v_proj": 3}}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["(no|lm)_head", r"layers\.1"]}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"k_proj)|(q_proj": 3, "(?:[qv])_proj": 4}}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": r"la\w*"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["(h|layers)", "x"]}),
    ("plain", {"target_modules": ["0", "my_q"], "layers_to_transform": [1], "layers_pattern": ".*?h"}),
]


BACKTRACKING = ("llama", {"target_modules": ["v_proj"], "rank_pattern": {r"(\w*\.?)*v_proj": 3}})  # re takes a minute


@pytest.mark.slow
def test_a_pattern_on_which_re_backtracks_gives_pefts_ranks() -> None:
    name, config = BACKTRACKING
    assert our_choice(model_called(name), **config) == pefts_choice(model_called(name), **config) is not None


@pytest.mark.parametrize(("name", "config"), CASES, ids=[f"{name}-{config}" for name, config in CASES])
def test_same_layers_ranks_and_scalings_as_peft(name: str, config: dict[str, Any]) -> None:
    model = model_called(name)
    expected = pefts_choice(model, **config)
    assert our_choice(model, **config) == expected
    assert expected is None or expected  # an empty choice would compare nothing


def test_the_table_has_both_outcomes() -> None:
    outcomes = [our_choice(model_called(name), **config) is None for name, config in CASES]
    assert 8 <= sum(outcomes) <= len(CASES) - 30


names = st.lists(
    st.sampled_from(["query", "key", "dense", "output.dense", "layer.1", "self.value", "bert.pooler.dense", "nope"]),
    min_size=1, max_size=3,
)  # fmt: skip
patterns = st.sampled_from([r".*query", r"bert\..*dense", r".*\.1\..*", r".*(key|value)", "nope"])
configs = st.fixed_dictionaries(
    {"target_modules": names | patterns | st.just("all-linear")},
    optional={
        "exclude_modules": names | patterns,
        "modules_to_save": st.sampled_from([["pooler"], ["classifier"], ["embeddings"]]),
        "layers_to_transform": st.integers(0, 3) | st.lists(st.integers(0, 3), max_size=2),
        "layers_pattern": st.sampled_from(["layer", "h", ["layer", "h"]]),
        "rank_pattern": st.dictionaries(st.sampled_from(["query", "dense", "0.*key", "^bert.*"]), st.integers(1, 9)),
        "alpha_pattern": st.dictionaries(st.sampled_from(["value", "dense", "2.*", "^bert.*"]), st.integers(1, 9)),
        "use_rslora": st.booleans(),
        "task_type": st.sampled_from(["SEQ_CLS", None]),
    },
)


@settings(max_examples=60)
@given(configs)
def test_drawn_configurations_select_as_peft_does(config: dict[str, Any]) -> None:
    assume(not (isinstance(config["target_modules"], str) and {"layers_to_transform", "layers_pattern"} & set(config)))
    assume(not ("layers_pattern" in config and "layers_to_transform" not in config))
    model = model_called("bert_classifier")
    assert our_choice(model, **config) == pefts_choice(model, **config)


def test_reasons_and_slips() -> None:
    config = LoRAConfig(
        target_modules=["q", "quer"], exclude_modules=["nope"], modules_to_save=["head", "nothing"],
        layers_to_transform=1, layers_pattern="h", rank_pattern={"k": 2}, task_type="SEQ_CLS",
    )  # fmt: skip
    matcher, paths = Matcher(config), ["h.0.q", "h.1.q", "h.1.k", "head"]
    assert [matcher.why_not(path) for path in paths] == [
        "not in layers_to_transform", None, "not in target_modules", "trained whole by modules_to_save",
    ]  # fmt: skip
    slips = "\n".join(matcher.slips(paths, ["h.1.q"]))
    assert all(slip in slips for slip in ("'quer'", "['nope']", "'nothing'", "rank_pattern: 'k'"))
    assert len(slips.splitlines()) == 4
    assert (
        Matcher(LoRAConfig(target_modules=["q"], exclude_modules=["q"])).why_not("a.q") == "excluded by exclude_modules"
    )


def test_an_index_that_depends_on_the_path_taken_is_refused() -> None:
    matcher = Matcher(LoRAConfig(target_modules=["q"], layers_to_transform=[1], layers_pattern=r".*h"))
    assert matcher.why_not("net.h.1.q") is None
    with pytest.raises(ConfigError, match=r"finds the indices \[0, 1\] in net.h.1.h.0.q"):
        matcher.why_not("net.h.1.h.0.q")


HANGS = ["(.*.*)*!", r"((\w|\.)*)*!", r"(?:\w?\.?){60}!", "(?=(.+)+!).*"]
FIELDS: list[Callable[[str], dict[str, Any]]] = [
    lambda pattern: {"target_modules": pattern},
    lambda pattern: {"target_modules": ["q"], "exclude_modules": pattern},
    lambda pattern: {"target_modules": ["q"], "modules_to_save": [pattern]},
    lambda pattern: {"target_modules": ["q"], "rank_pattern": {pattern: 3}},
    lambda pattern: {"target_modules": ["q"], "alpha_pattern": {pattern: 3}},
    lambda pattern: {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": pattern},
]


@pytest.mark.parametrize("field", range(len(FIELDS)))
@pytest.mark.parametrize("pattern", HANGS)
def test_patterns_that_keep_re_busy_for_years_match_nothing_here(field: int, pattern: str) -> None:
    matcher = Matcher(LoRAConfig(**FIELDS[field](pattern), r=2))
    path = "network_with_a_long_name.h.1.attention.self.inner.projection.q"
    plain = field in (1, 2, 3, 4)  # "q" is adapted where the pattern excludes nothing
    assert (matcher.why_not(path) is None) == plain
    assert matcher.rank_and_alpha(path) == (2, 8)


def test_many_patterns_for_many_layers_are_refused_by_count() -> None:
    rank_pattern = {f".*.*{i}.?": 1 for i in range(1500)}
    matcher = Matcher(LoRAConfig(target_modules=["q"], rank_pattern=rank_pattern))
    with pytest.raises(ConfigError, match="take too many steps"):
        [matcher.rank_and_alpha(f"model.layers.{i}.q!") for i in range(300)]


def test_a_rank_for_each_layer_of_a_large_model_is_within_bounds() -> None:
    paths = [f"model.layers.{i}.{name}_proj" for i in range(80) for name in "qkvoabc"]
    config = LoRAConfig(r=1, target_modules=".*_proj", rank_pattern=dict(zip(paths, range(2, 999), strict=False)))
    matcher = Matcher(config)
    assert [matcher.why_not(path) for path in paths] == [None] * len(paths)
    assert [matcher.rank_and_alpha(path)[0] for path in paths] == list(range(2, len(paths) + 2))
