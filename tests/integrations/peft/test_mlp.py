"""Tests gated MLPs that run as one call: PEFT's numbers in every mode, and what is saved for the backward."""

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed, nn

import lora_kernels as lk
from lora_kernels.check.compat.families import FAMILIES, fill_adapters
from lora_kernels.integrations.peft import accelerate, decelerate
from lora_kernels.integrations.peft.linear import projection_of
from lora_kernels.integrations.peft.mlp import dissolve_mlps, mlps_of
from tests.integrations.peft.gated import (
    F,
    Gated,
    K,
    Net,
    adapted,
    blocks,
    by_rule,
    example,
    gradients,
    plain_model,
    same,
    twins,
)


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Mistral", "Gemma 2", "Phi-3", "BERT"])
def test_families_compute_what_peft_computes(name, whole):
    family = FAMILIES[name]
    base, inputs = family.build()
    config = LoraConfig(r=4, target_modules=list(family.linear), task_type=family.task)
    plain = get_peft_model(base, config)
    fill_adapters(plain)
    ours = accelerate(copy.deepcopy(plain), verbose=False)
    expected = ["gate_proj + up_proj + down_proj in one call"] * 2 * (name in ("Llama", "Qwen2", "Mistral"))
    assert [names.describe() for names in mlps_of(ours).values()] == expected

    def results(model, inputs):
        model.zero_grad()
        out = model(**inputs)
        out.loss.backward()
        return {"logits": out.logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    if expected:
        truth = results(copy.deepcopy(plain).double(), inputs)
        by_rule(results(ours, inputs), results(plain, inputs), truth)
    assert len(whole) == len(expected)


def kept(model, x):
    """Return the bytes saved for the backward besides parameters, each storage once."""
    sizes, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    y.sum().backward()
    return sum(sizes.values())


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_half_is_kept_of_what_separate_layers_keep(p):
    model, twin = twins(p=p)
    M, r = 4096, 4
    x = example(M).requires_grad_()
    seeds = 32 * (p > 0)
    assert kept(model, x) - 4 * M * (K + 2 * F + 3 * r) * 2 <= 2 * (seeds + 16)
    assert kept(model, x) < 0.6 * kept(twin, x)
    without = accelerate(copy.deepcopy(model), verbose=False)
    dissolve_mlps(without)
    with torch.no_grad():
        for _ in range(2):
            without(x)
    assert kept(model, x) < 0.6 * kept(without, x)


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle 0": lambda model: pickle.loads(pickle.dumps(model, 0)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_run_whole_too(how, whole):
    model = adapted()
    expected = gradients(model)
    made = COPIES[how](model)
    assert type(blocks(made)[0]) is type(blocks(model)[0])
    whole.clear()
    same(gradients(made), expected, 0)
    assert whole == [0.0, 0.0]
    decelerate(made)
    assert {type(block) for block in blocks(made)} == {Gated}
    assert len(mlps_of(model)) == 2


def test_dropout_is_that_of_lora_mlp():
    model = adapted(p=0.3, net=Net())
    block, x = blocks(model)[0], example(64)
    gate, up, down = (projection_of(layer)[0] for layer in (block.a, block.b, block.c))
    torch.manual_seed(5)
    expected = lk.lora_mlp(x, gate, up, down, dropout_p=0.3)
    torch.manual_seed(5)
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_checkpoints_draw_the_same_masks_again(reentrant, p, whole):
    model = adapted(p=p)
    expected = gradients(model)
    model.base_model.model.reentrant = reentrant
    for _ in range(2):
        same(gradients(model), expected)
    assert set(whole) == {p}


def test_without_gradients_only_where_masks_are_drawn(whole):
    model, twin = twins(p=0.3)
    with torch.no_grad():
        model(example())
        assert whole == [0.3, 0.3]
        whole.clear()
        same({"y": model.eval()(example())}, {"y": twin.eval()(example())})
        assert whole == []
    model(example())
    assert whole == [0.0, 0.0]


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (7,), (1, 1, 2)])
def test_any_number_of_rows_and_dimensions(shape, whole):
    model, twin = twins()
    x = torch.randn(*shape, K, generator=torch.Generator().manual_seed(1))
    same(gradients(model, x), gradients(twin, x))
    assert len(whole) == 2


def test_rows_that_are_not_contiguous(whole):
    model, twin = twins()
    same(gradients(model, example().mT.contiguous().mT), gradients(twin))
    assert len(whole) == 2


@pytest.mark.parametrize("case", ["all of it", "the base", "autocast"])
def test_bfloat16(case, whole):
    plain = plain_model(r=16)
    for layer in (child for block in blocks(plain) for child in (block.a, block.b, block.c)):
        {"all of it": layer, "the base": layer.base_layer, "autocast": nn.Module()}[case].to(torch.bfloat16)
    ours = accelerate(copy.deepcopy(plain), verbose=False)
    x = example(96) if case == "autocast" else example(96).bfloat16()
    truth = gradients(copy.deepcopy(plain).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        got = gradients(ours, x)
    with torch.autocast(
        "cpu", torch.bfloat16, enabled=case != "all of it"
    ):  # as fp32 adapters over 16 bits are computed
        expected = gradients(plain, x)
    assert whole == [0.0, 0.0]
    assert got["y"].dtype is expected["y"].dtype
    by_rule(got, expected, truth, dtype=torch.bfloat16)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiles_whole_and_once(p):
    torch.compiler.reset()
    model, twin = twins(p=p)
    graphs = []

    def count(graph, inputs):
        graphs.append(str(graph.code))
        return graph

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if p == 0.0:
        same(gradients(compiled), {f"_orig_mod.{n}" if "." in n else n: g for n, g in gradients(twin).items()})
    assert gradients(compiled)["y"].isfinite().all()
    counted = torch.compile(model, fullgraph=True, backend=count)
    for scaling in (2.0, 3.0, 4.0, 5.0):
        blocks(model)[0].b.scaling["default"] = scaling
        counted(example())
    assert len(graphs) <= 2
    assert len(whole_calls(graphs[0])) == 2
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(example()), model.eval()(example()))


def whole_calls(code):
    """Return the lines of a graph that call the fused block."""
    return [line for line in code.splitlines() if "ops.higher_order.autograd_function_apply(" in line]


def test_transforms_take_the_layers_own_forward():
    model, twin = twins()
    x = example(4)
    torch.testing.assert_close(torch.func.vmap(model)(x[:, None]), twin(x)[:, None])
    got, expected = (torch.func.grad(lambda x, m=m: m(x).sum())(x) for m in (model, twin))
    torch.testing.assert_close(got, expected)


def test_the_output_may_be_changed_in_place():
    model, twin = twins()
    x = example().requires_grad_()
    y = blocks(model)[0](x)
    y += x
    expected = blocks(twin)[0](x) + x
    torch.testing.assert_close(y, expected)
    got, want = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
    torch.testing.assert_close(got, want)


def test_distributed_data_parallel(whole):
    model, twin = twins()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        got = {name.removeprefix("module."): value for name, value in gradients(wrapped).items()}
    finally:
        distributed.destroy_process_group()
    same(got, gradients(twin))
    assert len(whole) == 2
