"""Tests siblings that run together under torch.compile."""

import pytest
import torch

from lora_kernels.integrations.peft.groups import groups_of
from tests.integrations.peft.siblings import Stack, adapted, attention, example, gradients, learned, same

pytestmark = pytest.mark.usefixtures("nothing_left_over")


def test_compiled_in_one_graph_without_recompiling():
    from torch._dynamo.testing import CompileCounterWithBackend

    model = learned(adapted())
    expected = gradients(model, example())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            same({k.removeprefix("_orig_mod."): v for k, v in gradients(compiled, example()).items()}, expected)
    names = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert sum("autograd_function_apply" in name for name in names) == 4  # q + k + v, and o, of two blocks
    assert all(group.traced is None for group in groups_of(model))
    with torch.no_grad():
        torch.testing.assert_close(compiled(example()), expected["y"])


def test_compiled_scalings_and_inputs_that_differ_from_what_was_learned():
    from torch._dynamo.testing import CompileCounterWithBackend

    model = learned(adapted(Stack(1)))
    block = attention(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for scaling in (0.5, 0.7, 0.9, 1.1):
        for layer in (block.q, block.k, block.v, block.o):
            layer.scaling["default"] = scaling
        torch.testing.assert_close(compiled(example()), model(example()))
    assert counter.frame_count == 2
    x, context = example(), example(1)
    torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x, context), block(x, context))


def test_compiled_before_anything_was_learned():
    model = adapted()
    expected = gradients(adapted(group=False), example())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        got = gradients(compiled, example())
        same({k.removeprefix("_orig_mod."): v for k, v in got.items()}, expected)
    learned(model)
    same({k.removeprefix("_orig_mod."): v for k, v in gradients(compiled, example()).items()}, expected)


def test_a_graph_break_between_siblings():
    model = learned(adapted())
    expected = gradients(model, example())
    for layer in model.base_model.model.layers:
        layer.between = lambda x: torch._dynamo.graph_break()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for seed in (0, 1, 0):
        got = gradients(compiled, example(seed))
        if seed == 0:
            same({k.removeprefix("_orig_mod."): v for k, v in got.items()}, expected)
