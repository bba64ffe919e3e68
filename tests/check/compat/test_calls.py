import torch
from peft.tuners.lora.layer import Linear

from lora_kernels.check.compat.calls import counted
from lora_kernels.check.compat.families import FAMILIES
from lora_kernels.check.compat.stage import Stage


def test_calls_are_counted_by_what_ran_them():
    own = Linear.forward
    with counted() as calls:
        model, inputs = Stage(FAMILIES["Llama"], accelerated=True).build()
        plain, _ = Stage(FAMILIES["Llama"]).build()
        with torch.no_grad():
            model(**inputs)
            plain(**inputs)  # PEFT's own layers do not count
            assert (calls.begun, calls.peft, calls.fused) == (14, 0, 14)
            with model.disable_adapter():
                model(**inputs)
    assert (calls.begun, calls.peft, calls.fused) == (28, 14, 14)
    calls.note(model)
    assert dict(calls.reasons) == {"its adapters are disabled": 14}
    assert Linear.forward is own


def test_layers_without_a_fused_class_are_noted():
    model, _ = Stage(FAMILIES["Mixtral"], accelerated=True).build(
        Stage(FAMILIES["Mixtral"]).config(target_parameters=["mlp.experts.gate_up_proj"])
    )
    with counted() as calls:
        pass
    calls.note(model)
    assert calls.fused == 0
    assert any("ParamWrapper" in reason for reason in calls.reasons)
