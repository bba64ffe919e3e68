"""Lists the features of PEFT to run on a family. Each is a scenario that returns results and runs on every stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels.check.compat import lives, states
from lora_kernels.check.compat.families import Inputs
from lora_kernels.check.compat.judge import Answers
from lora_kernels.check.compat.stage import Stage, Unavailable, gradients, one_mask_a_shape

Scenario = Callable[[Stage], Answers]


@dataclass(frozen=True)
class Feature:
    """A feature of PEFT. scenario: returns results to compare. dtype: of the arithmetic, for the error rule."""

    name: str
    scenario: Scenario
    dtype: torch.dtype = torch.float32

    @property
    def draws(self) -> int:
        """Seeds to judge together, see judge.fault. In float32 the first is enough if it is far within the rule."""
        return 5 if self.dtype is torch.float32 else 16


def _train(stage: Stage, **options: object) -> Answers:
    return stage.step(*stage.build(stage.config(**options)))  # type: ignore[arg-type]


def _attention(stage: Stage) -> Answers:
    return stage.step(*stage.build(stage.config(stage.family.attention)))


def _half(stage: Stage, autocast_adapter_dtype: bool) -> Answers:
    return stage.step(*stage.build(dtype=torch.bfloat16, autocast_adapter_dtype=autocast_adapter_dtype))


def _dropout(stage: Stage) -> Answers:
    with one_mask_a_shape():
        return stage.step(*stage.build(stage.config(lora_dropout=0.3)))


def _dora_dropout(stage: Stage) -> Answers:
    with one_mask_a_shape():
        return stage.step(*stage.build(stage.config(lora_dropout=0.3, use_dora=True)))


def _pissa(stage: Stage) -> Answers:
    return stage.step(*stage.build(stage.config(init_lora_weights="pissa"), fill=False))


def _patterns(stage: Stage) -> Answers:
    first, last = stage.family.linear[0], stage.family.linear[-1]
    options = {"rank_pattern": {first: 2}, "alpha_pattern": {first: 7, last: 3}}
    return stage.step(*stage.build(stage.config(**options)))  # type: ignore[arg-type]


def _autocast(stage: Stage) -> Answers:
    model, inputs = stage.build()
    with torch.autocast("cpu", torch.bfloat16, enabled=not stage.exact):
        return stage.step(model, inputs)


def _accumulated(stage: Stage) -> Answers:
    model, inputs = stage.build()
    answers = stage.step(model, inputs, "first")
    model(**stage.batch(stage.family.example_inputs(stage.seed + 1))).loss.backward()
    return answers | gradients(model, "of two batches")


def _inference(stage: Stage) -> Answers:
    model, inputs = stage.build()
    answers = stage.infer(model, inputs)
    with torch.inference_mode():
        logits = model.eval()(**inputs).logits
    return answers | {"output:logits in inference_mode": logits.clone()}


def _checkpointing(stage: Stage, use_reentrant: bool) -> Answers:
    model, inputs = stage.build()
    if not getattr(model.get_base_model(), "supports_gradient_checkpointing", False):
        raise Unavailable("transformers has no gradient checkpointing for it")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        _inputs_need_gradients(model)
    return stage.step(model, inputs)


def _inputs_need_gradients(model: nn.Module) -> None:
    """Make embeddings and convolutions (of pixels) return tensors that require gradients.

    Otherwise a reentrant checkpoint of a frozen model passes on no gradient.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.Conv2d):
            module.register_forward_hook(lambda module, args, output: output.requires_grad_())


def _compiled(stage: Stage) -> Answers:
    if stage.exact or not stage.accelerated:
        return stage.step(*stage.build())
    return lives.compiled_step(stage)


def _generate(stage: Stage) -> Answers:
    if not stage.family.decodes:
        raise Unavailable("it generates nothing")
    model, inputs = stage.build()
    model = stage.cast(model).eval()
    made = model.generate(
        input_ids=inputs["input_ids"][:1], attention_mask=inputs["attention_mask"][:1], max_new_tokens=6,
        do_sample=False, use_cache=True, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return {"tokens": made.sequences, "output:logits": torch.stack(made.logits)}


def _embedding(stage: Stage) -> Answers:
    base = stage.family.model()
    tokens = base.get_input_embeddings()
    name = next(name for name, module in base.named_modules() if module is tokens)
    if not isinstance(tokens, nn.Embedding):
        raise Unavailable("it has no embedding of tokens")
    return stage.step(*stage.build(stage.config([name])))


def _convolution(stage: Stage) -> Answers:
    names = [name for name, module in stage.family.model().named_modules() if isinstance(module, nn.Conv2d)]
    if not names:
        raise Unavailable("it has no Conv2d")
    return stage.step(*stage.build(stage.config(names)))


def _experts(stage: Stage) -> Answers:
    model = stage.family.model()
    names = sorted({n for n, p in model.named_parameters() if p.dim() == 3 and "experts" in n})
    if not names:
        raise Unavailable("it has no experts")
    return stage.step(*stage.build(stage.config(target_parameters=names)))  # type: ignore[arg-type]


def _segment(stage: Stage) -> Answers:
    model, inputs = stage.build()

    def loss(batch: Inputs) -> torch.Tensor:
        return model(**batch).loss

    model = stage.cast(model)
    value = checkpoint(loss, inputs, use_reentrant=False)
    value.backward()
    return gradients(model) | {"output:loss": value.detach().reshape(1)}


FEATURES: dict[str, Feature] = {
    feature.name: feature
    for feature in (
        Feature("train, float32", _train),
        Feature("LoRA on attention only", _attention),
        Feature("bfloat16 base, float32 adapters", partial(_half, autocast_adapter_dtype=True), torch.bfloat16),
        Feature("bfloat16 base and adapters", partial(_half, autocast_adapter_dtype=False), torch.bfloat16),
        Feature("autocast to bfloat16", _autocast, torch.bfloat16),
        Feature("evaluation, inference_mode", _inference),
        Feature("lora_dropout", _dropout),
        Feature("lora_bias", partial(_train, lora_bias=True)),
        Feature('bias="lora_only"', partial(_train, bias="lora_only")),
        Feature("rsLoRA", partial(_train, use_rslora=True)),
        Feature("rank_pattern, alpha_pattern", _patterns),
        Feature("DoRA", partial(_train, use_dora=True)),
        Feature("DoRA with dropout", _dora_dropout),
        Feature("PiSSA", _pissa),
        Feature("embeddings as targets", _embedding),
        Feature("Conv2d as target", _convolution),
        Feature("experts by target_parameters", _experts),
        Feature("several active adapters", states.several_active),
        Feature("set_adapter, delete_adapter", states.set_and_delete),
        Feature("adapter_names, a mixed batch", states.mixed_batch),
        Feature("add_adapter on other targets later", states.added_later),
        Feature("add_weighted_adapter", states.weighted),
        Feature("disable_adapter", states.disabled),
        Feature("merge_adapter, unmerge_adapter", states.merged),
        Feature("merge_and_unload", states.unloaded),
        Feature("hotswap", states.hotswapped),
        Feature("hooks on base_layer, lora_A, lora_B", states.hooked),
        Feature("save_pretrained, from_pretrained", lives.saved),
        Feature("deepcopy, pickle", lives.copied),
        Feature("transformers' add_adapter", lives.injected),
        Feature("gradient accumulation", _accumulated),
        Feature("gradient checkpointing", partial(_checkpointing, use_reentrant=False)),
        Feature("gradient checkpointing, reentrant", partial(_checkpointing, use_reentrant=True)),
        Feature("the whole model in one checkpoint", _segment),
        Feature("torch.compile(fullgraph=True)", _compiled),
        Feature("generate with a cache", _generate),
        Feature("bitsandbytes 4-bit base", lives.four_bit, torch.bfloat16),
    )
}
