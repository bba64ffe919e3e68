"""transformers.Trainer and TRL over our own layers and over accelerated PEFT models."""

import copy
import json
import pickle
import shutil
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.utils.data import Dataset

import lora_kernels as lk
from lora_kernels.check.compat.families import FAMILIES, fill_adapters
from lora_kernels.errors import ConfigError
from lora_kernels.integrations.transformers import AccelerateCallback, has_peft_layers, slim_checkpoints
from lora_kernels.testing import assert_close

BERT = FAMILIES["BERT"]
KINDS = ("ours", "peft", "add_adapter")
PEFT_KINDS = KINDS[1:]


class Rows(Dataset):
    """Sentences of a family, one a row, always the same."""

    def __init__(self, family, count=16):
        batches = [family.example_inputs(seed) for seed in range(-(-count // 3))]
        self.rows = [{name: t[i] for name, t in batch.items()} for batch in batches for i in range(3)][:count]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(family=BERT, **changes):
    linear = list(family.linear)
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": linear, "task_type": family.task, **changes})


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with an adapter that counts as much as the base: every kind of model starts from it."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = peft.get_peft_model(BERT.model(), config())
    fill_adapters(model)
    model.save_pretrained(folder)
    return folder


def build(kind, adapter, dropout=0.0):
    base = BERT.model()
    if dropout:
        base.config.hidden_dropout_prob = dropout
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
    if kind == "ours":
        return lk.load_adapter(base, adapter, trainable=True)
    if kind == "peft":
        return peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
    dropout = json.loads((adapter / "adapter_config.json").read_text())["lora_dropout"]
    base.add_adapter(config(task_type=None, lora_dropout=dropout))
    peft.set_peft_model_state_dict(base, load_file(adapter / "adapter_model.safetensors"))
    base.classifier.load_state_dict(build("ours", adapter).classifier.state_dict())
    base.classifier.requires_grad_(True)
    return base


def trainer(model, out, callback=True, kind=transformers.Trainer, rows=None, **options):
    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 6, "optim": "sgd", "learning_rate": 0.05, "report_to": [],
        "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "save_strategy": "no", "seed": 3,
        "lr_scheduler_type": "linear", "max_grad_norm": 0.0,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(out), **{**defaults, **options})
    rows = rows or Rows(BERT)
    callbacks = [AccelerateCallback(verbose=False)] if callback else []
    return kind(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)


def trained(model):
    """The trained values in one row, in an order that all kinds of model share."""
    values = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for part in ("base_model.model.", ".modules_to_save", ".default", ".weight"):
                name = name.replace(part, "")
            values[name] = parameter.detach().flatten()
    assert len(values) == 2 * 13 + 2  # A and B of six layers in two blocks and of the pooler, the head
    return torch.cat([values[name] for name in sorted(values)])


def losses(run):
    return [record["loss"] for record in run.state.log_history if "loss" in record]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
    ],
    ids=["plain", "label smoothing", "checkpointing", "reentrant", "bf16"],
)
def test_trains_as_peft_does(options, adapter, tmp_path):
    def run(kind, callback, dtype=torch.float32, **options):
        model = build(kind, adapter).to(dtype)
        run = trainer(model, tmp_path, callback, **options)
        run.train()
        return trained(model)

    plain, truth = run("peft", False, **options), run("peft", False, torch.float64, **{**options, "bf16": False})
    before = trained(build("peft", adapter)).double()
    assert (truth - before).norm() > 0.01 * before.norm()
    for kind in KINDS:
        got = run(kind, True, **options)
        assert_close(got, plain, truth, what=kind, dtype=torch.bfloat16 if "bf16" in options else None)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluates_and_predicts_as_peft_does(kind, adapter, tmp_path):
    got, plain = (trainer(build(k, adapter), tmp_path, k == kind) for k in (kind, "peft"))
    truth = trainer(build("peft", adapter).double(), tmp_path, False).predict(Rows(BERT)).predictions
    outputs = [torch.tensor(run.predict(Rows(BERT)).predictions) for run in (got, plain)]
    assert_close(*outputs, torch.tensor(truth))
    assert got.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


@pytest.fixture
def dropping(adapter, tmp_path):
    """The adapter with a dropout of its own."""
    folder = shutil.copytree(adapter, tmp_path / "dropping")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "lora_dropout": 0.2}))
    return folder


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_ends_as_an_uninterrupted_one(kind, dropping, tmp_path):
    adapter = dropping
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 7, "optim": "adamw_torch", "save_total_limit": 2}
    whole = trainer(build(kind, adapter, 0.1), tmp_path / "whole", **options)
    whole.train()
    first = trainer(build(kind, adapter, 0.1), tmp_path / "parts", **options)
    first.add_callback(Stop(at=5))
    first.train()
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    second = trainer(build(kind, adapter, 0.1), tmp_path / "parts", **options)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert torch.equal(trained(second.model), trained(whole.model))
    assert losses(second) == losses(whole)
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"checkpoint-6", "checkpoint-7"}
    frozen = sum(p.numel() * 4 for p in BERT.model().parameters())
    for path in (tmp_path / "parts" / "checkpoint-7").glob("*.safetensors"):
        assert path.stat().st_size < 0.7 * frozen, path


def test_a_checkpoint_of_plain_peft_goes_on_with_the_callback(adapter, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    plain = trainer(build("peft", adapter), tmp_path, False, **options)
    plain.train()
    run = trainer(build("peft", adapter), tmp_path, **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.allclose(trained(run.model), trained(plain.model), rtol=1e-4, atol=1e-6)
    again = trainer(build("peft", adapter), tmp_path, False, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


class Stop(transformers.TrainerCallback):
    """Ends the training after a step, without a checkpoint."""

    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.at
        control.should_save = control.should_save and not control.should_training_stop


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_model_is_loaded_at_the_end(kind, adapter, tmp_path):
    run = trainer(
        build(kind, adapter), tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="first", greater_is_better=False, max_steps=4,
    )  # fmt: skip
    seen = []

    def first(outputs):
        seen.append(trained(run.model))
        return {"first": abs(len(seen) - 2)}  # the best is after the second step

    run.compute_metrics = first
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    assert torch.equal(trained(run.model), seen[1])
    assert not torch.equal(seen[1], seen[3])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
def test_save_model_leaves_an_adapter_that_both_read(kind, adapter, tmp_path):
    run = trainer(build(kind, adapter), tmp_path / "run")
    run.train()
    run.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    if kind == "add_adapter":  # transformers writes the adapter, but not the head
        saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
        assert len(saved) == 26
        return
    want = run.predict(Rows(BERT)).predictions
    ours = lk.load_adapter(BERT.model(), tmp_path / "saved")
    theirs = peft.PeftModel.from_pretrained(BERT.model(), tmp_path / "saved")
    for model in (ours, theirs):
        got = trainer(model, tmp_path, False).predict(Rows(BERT)).predictions
        assert abs(got - want).max() < 1e-4 * abs(want).max()


def test_our_own_checkpoints_without_the_callback_are_whole_models(adapter, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trainer(build("ours", adapter), tmp_path, False, **options)
    whole.train()
    again = trainer(build("ours", adapter), tmp_path, False, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(trained(again.model), trained(whole.model))
    assert len(load_file(tmp_path / "checkpoint-2" / "model.safetensors")) == len(whole.model.state_dict())


def test_slim_checkpoints_are_an_adapter_and_the_trained_weights(adapter, tmp_path, recwarn):
    model = slim_checkpoints(slim_checkpoints(build("ours", adapter)))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    part = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    assert not model.load_state_dict(part).missing_keys
    assert not trained(model).any()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(dict(list(part.items())[1:]))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.classifier.bias.data.fill_(3.0)
        copied.save_pretrained(tmp_path / "copy")
        saved = load_file(tmp_path / "copy" / "adapter_model.safetensors")
        assert (saved["base_model.model.classifier.bias"] == 3).all()
    model.save_pretrained(tmp_path / "full", state_dict=model.state_dict())
    assert (tmp_path / "full" / "model.safetensors").exists()
    del model.save_pretrained
    model.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").exists()
    with pytest.raises(ConfigError, match="has no adapter of ours"):
        slim_checkpoints(BERT.model())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_peft_layers_are_ours_before_training_begins(kind, adapter, tmp_path, capsys):
    run = trainer(build(kind, adapter), tmp_path, callback=False)
    assert has_peft_layers(run.model)
    plain = {type(module) for module in run.model.modules()}
    run.add_callback(AccelerateCallback())
    run.train()
    after = {type(module) for module in run.model.modules()} - plain
    assert {cls.__module__.partition(".")[0] for cls in after} == {"lora_kernels"}
    first = capsys.readouterr().out
    assert first.count("fused") == 1
    trainer(run.model, tmp_path).train()
    assert "fused" not in capsys.readouterr().out


def test_the_report_is_printed_once(adapter, tmp_path, capsys):
    model = build("ours", adapter)
    run = transformers.Trainer(
        model, transformers.TrainingArguments(str(tmp_path), report_to=[], max_steps=1, use_cpu=True),
        train_dataset=Rows(BERT), callbacks=[AccelerateCallback()],
    )  # fmt: skip
    said = capsys.readouterr().out
    assert said == "lora_kernels: 13 of 14 linear layers have LoRA\n"
    run.train()
    assert "linear layers" not in capsys.readouterr().out


def test_a_model_without_lora_is_noticed(tmp_path):
    def run(strict):
        run = trainer(BERT.model(), tmp_path, False, max_steps=1)
        run.add_callback(AccelerateCallback(strict=strict))
        run.train()

    with pytest.warns(UserWarning, match="BertForSequenceClassification has no LoRA layers"):
        run(False)
    with pytest.raises(ConfigError, match="no LoRA layers"):
        run(True)


@pytest.mark.parametrize("kind", KINDS)
def test_inside_ddp(kind, adapter, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = build(kind, adapter)
        run = trainer(model, tmp_path, callback=False)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        plain = [type(module) for module in model.modules()]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            AccelerateCallback(verbose=False).on_train_begin(run.args, run.state, run.control, model=wrapped)
        changed = [type(module) for module in model.modules()] != plain
        assert changed == (kind != "ours")
        assert wrapped.module is model
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_trl_trains_an_accelerated_peft_model_as_peft_does(tmp_path):
    import datasets
    import trl

    family = FAMILIES["Llama"]
    rows = datasets.Dataset.from_list([{"input_ids": [2 + (i + j) % 30 for j in range(9)]} for i in range(12)])

    def run(callback, dtype):
        torch.manual_seed(0)
        model = peft.get_peft_model(family.model(), config(family))
        fill_adapters(model)
        model = model.to(dtype)
        arguments = trl.SFTConfig(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, optim="sgd", learning_rate=0.05, report_to=[],
            disable_tqdm=True, use_cpu=True, save_strategy="no", bf16=False, seed=3, logging_steps=1,
        )  # fmt: skip
        callbacks = [AccelerateCallback(verbose=False)] if callback else []
        run = trl.SFTTrainer(
            model, arguments, train_dataset=rows, processing_class=tokenizer(tmp_path), callbacks=callbacks
        )
        run.train()
        assert any(type(m).__module__.startswith("lora_kernels") for m in model.modules()) == callback
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    assert_close(run(True, torch.float32), run(False, torch.float32), run(False, torch.float64))


def tokenizer(folder):
    words = {"<pad>": 0, "<eos>": 1, **{str(i): i for i in range(2, 64)}}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<pad>"}
    file = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(file))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", eos_token="<eos>"
    )
