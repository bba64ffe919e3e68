"""Tests accelerate and decelerate: a PEFT model remains one after everything that PEFT does with it."""

import copy
import io
import pickle
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn

import lora_kernels as lk
from lora_kernels.check.compat.families import FAMILIES, fill_adapters
from lora_kernels.errors import ConfigError
from lora_kernels.integrations.peft import accelerate as by_package
from lora_kernels.integrations.peft.accelerate import FUSED, TUNERS, accelerate, decelerate
from lora_kernels.integrations.peft.linear import FusedLinear

OTHER = LoraConfig(r=3, lora_alpha=5, target_modules=["first", "head"])


def base(model):
    return model.base_model.model


def filled(model, seed=0):
    fill_adapters(model, seed)
    return model.eval()


def add(model, tmp_path):
    model.add_adapter("other", OTHER)
    return filled(model)


def reload(model, tmp_path):
    torch.manual_seed(0)
    plain = copy.deepcopy(base(model)).__class__()
    model.save_pretrained(tmp_path)
    return accelerate(PeftModel.from_pretrained(plain, tmp_path), verbose=False)


def load_another(model, tmp_path):
    add(model, tmp_path)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    model.delete_adapter("other")
    model.load_adapter(tmp_path / "other", "again")
    model.set_adapter("again")
    return model


def both(model, tmp_path):
    add(model, tmp_path).base_model.set_adapter(["default", "other"])
    return model.eval()


def weighted(model, tmp_path):
    model.add_adapter("other", LoraConfig(r=4, target_modules=["first", "second", "third"]))
    filled(model).add_weighted_adapter(["default", "other"], [0.3, 1.2], "sum", combination_type="linear")
    model.set_adapter("sum")
    return model


def hotswap(model, tmp_path):
    another = filled(copy.deepcopy(model), seed=5)
    another.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path, adapter_name="default", torch_device="cpu")
    return model


def merged_and_back(model, tmp_path):
    model.merge_adapter()
    model.unmerge_adapter()
    return model


def disabled_and_back(model, tmp_path):
    with model.disable_adapter():
        model(torch.ones(2, 12))
    return model


def deleted(model, tmp_path):
    add(model, tmp_path).set_adapter("other")
    model.delete_adapter("default")
    return model


def converted(model, tmp_path):
    return model.to(torch.float64).to(torch.float32)


def saved_whole(model, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=False)


def pickled(model, tmp_path):
    return pickle.loads(pickle.dumps(model))


def copied(model, tmp_path):
    return copy.deepcopy(model)


def state_moved(model, tmp_path):
    filled(model, seed=4)
    state, buffer = model.state_dict(), io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer))
    return model


def trained_partly(model, tmp_path):
    model.requires_grad_(False)
    base(model).first.lora_A.requires_grad_(True)
    return model


def unloaded(model, tmp_path):
    return model.merge_and_unload()


def stripped(model, tmp_path):
    return model.unload()


# a change of the model, and how many of its layers run fused afterwards
LIFE = {
    add: 3, reload: 3, load_another: 2, both: 4, weighted: 3, hotswap: 3, merged_and_back: 3, disabled_and_back: 3,
    deleted: 2, converted: 3, saved_whole: 3, pickled: 3, copied: 3, state_moved: 3, trained_partly: 3, unloaded: 0,
    stripped: 0,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("event", LIFE, ids=lambda event: event.__name__)
def test_everything_that_peft_does_ends_the_same(event, adapted, example, run, calls, tmp_path, monkeypatch):
    with monkeypatch.context() as off:
        off.setenv("LORA_KERNELS_ACCELERATE", "0")  # for accelerate within an event
        (tmp_path / "plain").mkdir()
        plain = event(adapted(), tmp_path / "plain")
    (tmp_path / "ours").mkdir()
    model = event(accelerate(adapted(), verbose=False), tmp_path / "ours")
    calls.clear()
    assert [*model.state_dict()] == [*plain.state_dict()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
    got, want = run(model, example()), run(plain, example())
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=name)
    assert calls.pop("fused", 0) == LIFE[event]
    assert calls.keys() <= {"no adapter of it is active"}
    files = [{path.relative_to(tmp_path / kind) for path in (tmp_path / kind).rglob("*")} for kind in ("plain", "ours")]
    assert files[0] == files[1]


def test_classes_come_and_go_and_nothing_else_does(adapted):
    model = adapted()
    before = [(id(module), type(module), dict(vars(module))) for module in model.modules()]
    assert accelerate(model, verbose=False) is model
    assert accelerate(model, verbose=False) is model
    assert sum(isinstance(module, FusedLinear) for module in model.modules()) == 3
    assert isinstance(model.base_model, peft.LoraModel)
    assert repr(model.get_model_status()) == repr(adapted().get_model_status())
    assert repr(model.get_layer_status()) == repr(adapted().get_layer_status())
    assert decelerate(model) is model
    assert [(id(module), type(module), dict(vars(module))) for module in model.modules()] == before
    assert not {*FUSED.values(), *TUNERS.values()} & {type(module) for module in model.modules()}


def test_the_names_of_the_package():
    assert (lk.accelerate, lk.decelerate) == (accelerate, decelerate)
    assert by_package is accelerate


def test_the_report_is_printed_once(adapted, capsys):
    model = accelerate(adapted())
    assert capsys.readouterr().out == "lora_kernels: 3 of 3 PEFT LoRA layers fused\n"
    model(torch.ones(2, 12))
    accelerate(model, verbose=False)
    assert capsys.readouterr().out == ""


def test_strict_names_the_layers_and_leaves_the_model_alone(adapted):
    model = adapted()
    base(model).second.base_layer.register_forward_hook(lambda *_: None)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=r"2 of 3 .*\n  1: base_layer has forward hooks \(base_model.model.second\)"):
        accelerate(model, strict=True)
    assert [type(module) for module in model.modules()] == before
    with pytest.raises(ConfigError, match="0 of 0 PEFT LoRA layers fused: the model has none"):
        accelerate(nn.Linear(2, 2), strict=True)


def test_the_environment_switches_it_off_and_it_says_so(adapted, monkeypatch, capsys):
    monkeypatch.setenv("LORA_KERNELS_ACCELERATE", "0")
    model = accelerate(adapted(), strict=True, verbose=False)
    assert "LORA_KERNELS_ACCELERATE=0" in capsys.readouterr().out
    assert not any(type(module) in FUSED.values() for module in model.modules())


@pytest.mark.parametrize(("version", "warned"), [("0.17.0", 0), ("0.21.9", 0), ("0.22.0.dev0", 1), ("0.16.1", 1)])
def test_versions_of_peft_that_were_not_tried_warn_once(version, warned, adapted, monkeypatch):
    monkeypatch.setattr(peft, "__version__", version)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        accelerate(accelerate(adapted(), verbose=False), verbose=False)
    assert len([w for w in seen if version in str(w.message)]) == warned


@pytest.mark.parametrize("copied", [False, True])
def test_layers_that_come_later_where_peft_keeps_no_tuner(copied):
    model = FAMILIES["BERT"].model()
    inject_adapter_in_model(LoraConfig(target_modules=["query"]), model, "one")
    accelerate(model, verbose=False)
    if copied:
        model = copy.deepcopy(model)
    inject_adapter_in_model(LoraConfig(target_modules=["value"]), model, "two")
    inject_adapter_in_model(LoraConfig(target_modules=["key"]), model, "three")
    found = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, FusedLinear)}
    assert found == {"query", "value", "key"}
    decelerate(model)
    assert not any(name.startswith("_lora") for module in model.modules() for name in vars(module))
    inject_adapter_in_model(LoraConfig(target_modules=["dense"]), model, "four")
    assert not any(isinstance(module, FusedLinear) for module in model.modules())


def test_a_lone_layer_does_not_drag_its_model_along():
    model = FAMILIES["BERT"].model()
    inject_adapter_in_model(LoraConfig(target_modules=["query"]), model)
    size = sum(p.numel() for p in model.bert.encoder.layer[0].attention.self.query.parameters()) * 4
    accelerate(model, verbose=False)
    assert len(pickle.dumps(model.bert.encoder.layer[0].attention.self.query)) < size + 20_000
    assert isinstance(pickle.loads(pickle.dumps(model)).bert.encoder.layer[1].attention.self.query, FusedLinear)


def test_a_mixed_model_and_wrappers(adapted, example, calls):
    torch.manual_seed(0)
    mixed = get_peft_model(copy.deepcopy(base(adapted())).__class__(), LoraConfig(target_modules=["first"]), mixed=True)
    accelerate(mixed, verbose=False)
    mixed.add_adapter("hada", peft.LoHaConfig(target_modules=["head"]))
    mixed.add_adapter("late", LoraConfig(target_modules=["second"]))
    mixed.set_adapter(["default", "hada", "late"])
    mixed(example())
    assert calls == {"fused": 2}
    wrapped = accelerate(nn.DataParallel(adapted()), verbose=False)
    wrapped.module.add_adapter("other", OTHER)
    assert isinstance(base(wrapped.module).head, FusedLinear)


def test_compiled_whole_and_not_again_for_another_scaling(adapted, example, run):
    torch._dynamo.reset()
    plain = adapted(lora_bias=True)
    model = accelerate(copy.deepcopy(plain), verbose=False)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    made = []
    for step, scale in enumerate((1.0, 0.5, 2.5, -1.0)):
        for each in (model, plain):
            for layer in (base(each).first, base(each).second, base(each).third):
                layer.set_scale("default", scale)
        x = example(16 + step)
        got, want = run(compiled, x), run(plain, x)
        for name, value in want.items():
            torch.testing.assert_close(got[name.replace("d base", "d _orig_mod.base")], value, rtol=1e-4, atol=1e-4)
        made.append(len(graphs))
    assert made[0] == 1
    assert made[-1] == made[1] <= 2, made
    assert [graph.count("= torch.ops.lora_kernels.lora_linear_fwd(") for graph in graphs] == [3] * len(graphs)
