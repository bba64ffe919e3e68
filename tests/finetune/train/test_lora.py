import copy

import pytest
import torch
from torch import nn

from lora_kernels import LoRA, LoRAConfig, explain, load_adapter, merge_lora, save_adapter
from lora_kernels.adapters.files import read_adapter
from lora_kernels.errors import ShapeError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict({"first": nn.Linear(6, 10), "second": nn.Linear(10, 4)})
        self.note = "of the model"

    def forward(self, x, shift=0.0):
        return self.model["second"](self.model["first"](x).tanh()) + shift


@pytest.fixture
def wrapped():
    torch.manual_seed(0)
    return LoRA(Net(), LoRAConfig(r=3, lora_alpha=6, target_modules=["first", "second"]))


def test_only_adapters_are_trainable(wrapped):
    assert [tuple(p.shape) for p in wrapped.get_params()] == [(3, 6), (10, 3), (3, 10), (4, 3)]
    assert wrapped.get_num_params() == 18 + 30 + 30 + 12
    assert wrapped.get_num_params(total=True) == 90 + 70 + 44


def test_calls_and_attributes_go_to_the_model(wrapped):
    x = torch.randn(2, 6)
    assert torch.equal(wrapped(x, shift=1.0), wrapped.wrapped(x) + 1.0)
    assert wrapped.note == "of the model"
    with pytest.raises(AttributeError, match="nothing"):
        _ = wrapped.nothing


def test_adjusting_changes_the_output_and_keeps_the_parameter(wrapped):
    x = torch.randn(2, 6)
    before, parameter = wrapped(x), wrapped.get_params()[1]
    wrapped.adjust_parameters(torch.ones(10, 3), 1)
    assert wrapped.get_params()[1] is parameter
    assert torch.equal(parameter, torch.ones(10, 3))
    assert not torch.allclose(wrapped(x), before)


def test_adjusting_several(wrapped):
    wrapped.adjust_parameters([torch.ones(3, 6), torch.full((4, 3), 2.0)], [0, -1])
    assert float(wrapped.get_params()[0].detach().sum()) == 18
    assert float(wrapped.get_params()[3].detach().sum()) == 24


@pytest.mark.parametrize(
    ("values", "idx", "error", "message"),
    [
        (torch.ones(6, 3), 0, ShapeError, r"parameter 0 is \(3, 6\)"),
        (torch.ones(3, 6, dtype=torch.float64), 0, ShapeError, "float64"),
        (torch.full((3, 6), float("nan")), 0, ShapeError, "NaN"),
        (torch.ones(3, 6), 4, IndexError, "there are 4 trainable parameters"),
        (torch.ones(3, 6), [0, 1], ShapeError, "1 tensors for 2 indices"),
        ([torch.ones(3, 6), torch.full((10, 3), float("inf"))], [0, 1], ShapeError, "infinity"),
    ],
)
def test_values_that_do_not_fit_change_nothing(wrapped, values, idx, error, message):
    before = [p.clone() for p in wrapped.get_params()]
    with pytest.raises(error, match=message):
        wrapped.adjust_parameters(values, idx)
    assert all(torch.equal(p, q) for p, q in zip(wrapped.get_params(), before, strict=True))


def test_names_are_the_models_own(wrapped):
    """Although the model has a part called "model", as many transformers have."""
    assert list(wrapped.state_dict()) == list(wrapped.wrapped.state_dict())
    assert [name for name, _ in wrapped.named_parameters()] == [name for name, _ in wrapped.wrapped.named_parameters()]
    other = copy.deepcopy(wrapped)
    other.adjust_parameters(torch.ones(4, 3), 3)
    wrapped.load_state_dict(other.state_dict())
    assert torch.equal(wrapped.get_params()[3], torch.ones(4, 3))
    with pytest.raises(RuntimeError, match="Missing"):
        wrapped.load_state_dict({})


def test_names_inside_another_module(wrapped):
    outer = nn.Sequential(nn.Identity(), wrapped)
    state = outer.state_dict()
    assert {name.removeprefix("1.") for name in state} == set(wrapped.wrapped.state_dict())
    state = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    outer.load_state_dict(state)
    assert float(wrapped.get_params()[0].detach().abs().sum()) == 0


def test_the_wrappers_adapter_is_the_models(wrapped, tmp_path):
    wrapped.adjust_parameters(torch.ones(4, 3), 3)
    save_adapter(wrapped, tmp_path / "wrapper")
    save_adapter(wrapped.wrapped, tmp_path / "model")
    one, other = (read_adapter(tmp_path / name)[0] for name in ("wrapper", "model"))
    assert one.keys() == other.keys()
    torch.manual_seed(0)
    fresh = load_adapter(Net(), tmp_path / "wrapper")
    x = torch.randn(2, 6)
    assert torch.equal(fresh(x), wrapped(x))
    wrapped.adjust_parameters(torch.zeros(4, 3), 3)
    load_adapter(wrapped, tmp_path / "wrapper")
    assert torch.equal(fresh(x), wrapped(x))
    assert explain(wrapped) == explain(wrapped.wrapped)
    torch.testing.assert_close(merge_lora(wrapped)(x), fresh(x))
