"""Tests accelerated layers with weights of inference mode and inputs of any kind: PEFT's results, or its errors."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_kernels as lk
from lora_kernels.check.compat.families import fill_adapters
from lora_kernels.integrations.peft.linear import CALLS
from tests.integrations.peft.gated import Gated

pytestmark = [
    pytest.mark.usefixtures("nothing_left_over"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR", "ignore:.*quantize"),
]
K = 16


class Pair(nn.Module):
    """Two layers that read one input."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(K, 8), nn.Linear(K, 8)

    def forward(self, x):
        return self.q(x) + self.k(x)


BASES = {
    "linear": lambda: nn.Sequential(nn.Linear(K, 8)),
    "dora": lambda: nn.Sequential(nn.Linear(K, 8)),
    "conv": lambda: nn.Sequential(nn.Conv1d(5, 8, 3)),
    "embedding": lambda: nn.Sequential(nn.Embedding(11, K)),
    "siblings": Pair,
    "mlp": lambda: nn.Sequential(Gated(K, 40)),
}
TARGETS = {"siblings": ["q", "k"], "mlp": ["a", "b", "c"]}


def model(kind, inference=""):
    """Return an adapted model whose base, or all of it, was created in inference mode."""
    torch.manual_seed(0)
    with torch.inference_mode(inference != ""):
        base = BASES[kind]()
    with torch.inference_mode(inference == "all"):
        made = get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS.get(kind, ["0"]), use_dora=kind == "dora"))
        fill_adapters(made)
    return made.eval()


class Sub(torch.Tensor):
    """A subclass that changes nothing."""


INPUTS = {
    "plain": lambda: torch.randn(3, 5, K),
    "one row": lambda: torch.randn(K),
    "scalar": lambda: torch.tensor(1.0),
    "no rows": lambda: torch.randn(0, 5, K),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(3, K), torch.randn(2, K)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.randn(3, K), torch.randn(2, K)], layout=torch.jagged),
    "coo": lambda: torch.randn(3, K).relu().to_sparse(),
    "csr": lambda: torch.randn(3, K).relu().to_sparse_csr(),
    "mkldnn": lambda: torch.randn(3, K).to_mkldnn(),
    "meta": lambda: torch.randn(3, K, device="meta"),
    "complex": lambda: torch.randn(3, K, dtype=torch.complex64),
    "integers": lambda: torch.ones(3, K, dtype=torch.int64),
    "quantised": lambda: torch.quantize_per_tensor(torch.randn(3, K), 0.1, 0, torch.qint8),
    "expanded": lambda: torch.randn(1, K).expand(4, K),
    "overlapping": lambda: torch.randn(40).as_strided((5, K), (2, 1)),
    "channels_last": lambda: torch.randn(2, 5, 3, K).to(memory_format=torch.channels_last),
    "negated view": lambda: torch.randn(3, K, dtype=torch.complex64).conj().imag,
    "buffer": lambda: nn.Buffer(torch.randn(3, K)),
    "subclass": lambda: torch.randn(3, K).as_subclass(Sub),
    "trained": lambda: torch.randn(3, 5, K).requires_grad_(),
}
IDS = {
    "plain": lambda: torch.arange(6).view(2, 3),
    "scalar": lambda: torch.tensor(3),
    "nested": lambda: torch.nested.nested_tensor([torch.tensor([1, 2, 3]), torch.tensor([4, 5])], dtype=torch.int64),
    "coo": lambda: torch.tensor([0, 1, 2]).to_sparse(),
    "meta": lambda: torch.ones(3, dtype=torch.int64, device="meta"),
    "int16": lambda: torch.ones(3, dtype=torch.int16),
    "none": lambda: torch.empty(0, dtype=torch.int64),
}
CASES = [(kind, name, "") for kind in BASES for name in (IDS if kind == "embedding" else INPUTS)]
CASES += [(kind, "plain", inference) for kind in BASES for inference in ("base", "all")]
CASES += [(kind, "trained", inference) for kind in BASES if kind != "embedding" for inference in ("base", "all")]
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def result(model, kind, name, mode):
    torch.manual_seed(3)
    try:
        with MODES[mode]():
            y = model((IDS if kind == "embedding" else INPUTS)[name]())
            return torch.cat([part.reshape(-1) for part in y.unbind()]) if y.is_nested else y
    except Exception as error:
        return error


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "name", "inference"), CASES)
def test_the_result_is_pefts(kind, name, inference, mode):
    """If PEFT raises, the accelerated layer raises too, or runs: PEFT's backward cannot save such weights."""
    plain, ours = model(kind, inference), lk.accelerate(model(kind, inference), verbose=False)
    for _ in range(3 if kind == "siblings" else 1):
        expected, got = (result(one, kind, name, mode) for one in (plain, ours))
        if isinstance(expected, Exception):
            assert type(got) is type(expected) or (inference and "Inference tensors" in str(expected)), got
            continue
        assert not isinstance(got, Exception), got
        assert (got.shape, got.dtype, got.layout, got.device) == (
            expected.shape,
            expected.dtype,
            expected.layout,
            expected.device,
        )
        if name != "meta":
            dense = [t.to_dense() if t.layout is not torch.strided else t for t in (got, expected)]
            torch.testing.assert_close(*(t.as_subclass(torch.Tensor) for t in dense))
    lk.explain(ours)
    lk.decelerate(ours)


@pytest.mark.parametrize("kind", ["linear", "dora", "conv", "embedding", "siblings", "mlp"])
def test_training_over_a_base_of_inference_mode(kind):
    ours, twin = lk.accelerate(model(kind, "base"), verbose=False), model(kind)
    x = (IDS if kind == "embedding" else INPUTS)["plain"]()
    for _ in range(3):
        grads = []
        for one in (ours, twin):
            one.zero_grad()
            one(x).square().sum().backward()
            grads.append([p.grad for p in one.parameters() if p.requires_grad])
        for got, expected in zip(*grads, strict=True):
            torch.testing.assert_close(got, expected)
    assert all(CALLS not in vars(layer) for layer in ours.modules())


REASONS = {
    "nested": "its input is a nested tensor",
    "coo": "its input is sparse_coo",
    "csr": "its input is sparse_csr",
    "mkldnn": "its input is mkldnn",
    "meta": "its input is on the meta device",
    "scalar": "its input has no dimensions",
    "jagged": "its input is a NestedTensor",
    "complex": "its input is complex64",
}


@pytest.mark.parametrize("name", REASONS)
def test_explain_has_the_reason(name):
    ours = lk.accelerate(model("linear"), verbose=False)
    result(ours, "linear", name, "no_grad")
    assert REASONS[name] in lk.explain(ours)


def test_an_adapter_of_inference_mode():
    ours = lk.accelerate(model("linear", "all"), verbose=False)
    assert "its adapter was created in inference mode, and no backward can save it" in lk.explain(ours)
    with torch.no_grad():
        assert "PEFT's own" not in lk.explain(ours)


def test_a_sparse_base_weight():
    plain = model("linear")
    base = plain.base_model.model[0].base_layer
    base.weight = nn.Parameter(base.weight.detach().relu().to_sparse_csr(), requires_grad=False)
    x = torch.randn(3, K)
    with torch.no_grad():
        expected = plain(x)
        ours = lk.accelerate(plain, verbose=False)
        assert torch.equal(ours(x), expected)
    assert "the weight of base_layer is sparse_csr" in lk.explain(ours)


def test_a_model_on_the_meta_device():
    ours = lk.accelerate(model("siblings").to("meta"), verbose=False)
    y = ours(torch.randn(3, 5, K, device="meta"))
    y.sum().backward()
    assert y.shape == (3, 5, 8)
    assert "the weight of base_layer is on the meta device" in lk.explain(ours)


@pytest.mark.parametrize("kind", ["linear", "dora", "conv", "embedding", "siblings", "mlp"])
def test_a_model_of_the_cpu_while_another_device_is_the_default(kind):
    plain, x = model(kind), (IDS if kind == "embedding" else INPUTS)["plain"]()
    expected = plain(x)
    torch.set_default_device("meta")
    try:
        ours = lk.accelerate(plain, verbose=False)
        for _ in range(3):
            torch.testing.assert_close(ours(x), expected)
    finally:
        torch.set_default_device(None)
    assert all(CALLS not in vars(layer) for layer in ours.modules())
