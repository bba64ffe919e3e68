import pytest

from lora_kernels.check.compat import cells
from lora_kernels.check.compat.cells import ABSENT, FUSED, REFUSED, WRONG, try_cell
from lora_kernels.check.compat.families import FAMILIES
from lora_kernels.check.compat.features import FEATURES
from lora_kernels.check.compat.judge import fault
from lora_kernels.errors import ConfigError
from lora_kernels.integrations.peft import linear

TRAIN, HALF = FEATURES["train, float32"], FEATURES["bfloat16 base and adapters"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("feature", [TRAIN, HALF, FEATURES["lora_dropout"]], ids=lambda f: f.name)
@pytest.mark.parametrize("off", [1.001, 0.0])
def test_a_wrong_layer_is_wrong(feature, off, monkeypatch):
    right = linear.operands

    def wrong(*args):
        found = right(*args)
        return found if isinstance(found, str) else found._replace(scaling=found.scaling * off)

    if feature is HALF and off == 1.001:
        off = 1.05  # a bf16 scaling holds no more
    monkeypatch.setattr(linear, "operands", wrong)
    cell = try_cell(feature, FAMILIES["GPT-2"])
    assert cell.status == WRONG
    assert "PEFT's by" in cell.reasons[0]


@pytest.mark.parametrize(
    ("ratios", "drawn", "status"), [((1.9,), 1, FUSED), ((4.6, 1, 0.9, 1.2, 5), 5, FUSED), ((4.6,) * 5, 5, WRONG)]
)
def test_a_draw_in_doubt_is_judged_with_others(ratios, drawn, status, monkeypatch):
    seen = iter(ratios)
    monkeypatch.setattr(cells, "errors", lambda *_: {"gradient": (next(seen), 0.5)})
    judged = []
    monkeypatch.setattr(cells, "fault", lambda draws, *a: judged.append(len(draws)) or fault(draws, *a))
    assert try_cell(TRAIN, FAMILIES["GPT-2"]).status == status
    assert judged[-1] == drawn


def test_what_is_thrown_is_told(monkeypatch):
    def refuses(*args):
        raise ConfigError("not with this one")

    monkeypatch.setattr(linear, "operands", refuses)
    cell = try_cell(TRAIN, FAMILIES["GPT-2"])
    assert (cell.status, cell.reasons) == (REFUSED, ("not with this one",))

    def breaks(*args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(linear, "operands", breaks)
    cell = try_cell(TRAIN, FAMILIES["GPT-2"])
    assert (cell.status, cell.reasons) == (WRONG, ("RuntimeError: out of luck",))


def test_what_peft_does_not_do_is_not_ours():
    cell = try_cell(FEATURES["adapter_names, a mixed batch"], FAMILIES["OPT"])
    assert cell.status == ABSENT
    assert cell.reasons[0].startswith("PEFT: ValueError: Length of `adapter_names`")
    assert try_cell(FEATURES["generate with a cache"], FAMILIES["ViT"]).reasons == ("it generates nothing",)


def test_a_fused_cell_counts_its_calls():
    cell = try_cell(TRAIN, FAMILIES["Llama"])
    assert (cell.status, cell.reasons, cell.fused) == (FUSED, (), cell.calls)
    assert cell.calls == 2 * 14
