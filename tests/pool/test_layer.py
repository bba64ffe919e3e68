"""One pooled layer: what it computes in an open batch, and how it is made and unmade."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from lora_kernels.errors import AdapterPoolError, ShapeError
from lora_kernels.pool.active import ActiveBatch
from lora_kernels.pool.batch import OpenBatch
from lora_kernels.pool.ids import BatchIds
from lora_kernels.pool.layer import BUFFERS, HOST, PooledLinear, PoolSettings, _Pooled, base_class, into_pooled
from lora_kernels.pool.layer import out_of_pooled as undo
from lora_kernels.pool.rows import BLOCK, TILED, RowLayout

K, N, CAPACITY = 5, 4, 3


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def layer(kind: type[nn.Module] = nn.Linear, **options: Any) -> Any:
    """A pooled layer with an adapter of rank 2 in slot 0, of rank 3 in slot 2 and none in slot 1."""
    torch.manual_seed(0)
    made = kind(K, N, **options) if kind is nn.Linear else kind(N, K)
    made.requires_grad_(False)
    made = into_pooled(made, PoolSettings(CAPACITY, 6, 4), ActiveBatch(), "its.path")
    with torch.no_grad():
        made.pool_A.normal_()
        made.pool_Bt.normal_()
    made.pool_starts.copy_(ints(0, 0, 3))
    made.pool_ranks.copy_(ints(2, 0, 3))
    made.pool_scalings.copy_(torch.tensor([0.5, 9.0, 2.0]))
    return made


def rows(axis: int, repeats: int = 1, order: str = BLOCK) -> RowLayout:
    """What probes have shown: each request has so many indices of this axis."""
    places = {(axis, order)} | ({(axis, TILED)} if repeats == 1 else set())
    return RowLayout(False, frozenset(places), frozenset({(axis, "", repeats)}), {})


def batch(made: Any, *ids: int, named: bool = True, **options: Any) -> OpenBatch:
    """A batch of one id a request, open; rows of sequences in the first dimension."""
    made.pool_rows = {(False, dim): rows(0) for dim in (2, 3, 4)}
    options = {"touched": {"its.path"}, "held": {0, 2}} | options
    opened = OpenBatch(made.pool_active, BatchIds(ints(*ids), CAPACITY, named=named, values=[*ids]), **options)
    made.pool_active.var.set(opened)
    made.pool_active.thread.batch = opened
    return opened


def wanted(made: Any, x: Tensor, ids: list[int]) -> Tensor:
    """y (M, N) for x (M, K), a row at a time."""
    rows = []
    for row, slot in zip(x, ids, strict=True):
        y = linear(row, made.base_weight(), made.bias)
        if slot in (0, 2):
            start, rank, s = {0: (0, 2, 0.5), 2: (3, 3, 2.0)}[slot]
            own = slice(start, start + rank)
            y = y + s * made.pool_Bt[own].t() @ (made.pool_A[own] @ row)
        rows.append(y)
    return torch.stack(rows)


def close(y: Tensor, other: Tensor) -> bool:
    return torch.allclose(y, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), [(nn.Linear, {}), (nn.Linear, {"bias": False}), (Conv1D, {})])
def test_each_row_with_its_own(kind: type[nn.Module], options: dict[str, Any]) -> None:
    made, x = layer(kind, **options), torch.randn(6, K)
    assert close(made(x), wanted(made, x, [-1] * 6))
    for ids in ([0, 2, -1, 1, 0, 2], [2, 0, -1], [0, -1]):
        batch(made, *ids)
        for shape, layout, each in (
            ((6 // len(ids), len(ids), K), rows(1), ids * (6 // len(ids))),
            ((len(ids), 6 // len(ids), K), rows(0), [slot for slot in ids for _ in range(6 // len(ids))]),
            ((6, K), rows(0, 6 // len(ids)), [slot for slot in ids for _ in range(6 // len(ids))]),
            ((6, K), rows(0, 6 // len(ids), TILED), ids * (6 // len(ids))),
        ):
            made.pool_rows = {(False, len(shape)): layout}
            assert close(made(x.view(shape)).view(6, N), wanted(made, x, each)), shape


def test_layers_of_one_layout_share_one_tensor() -> None:
    made, other = layer(), layer()
    opened = batch(made, 0, 2)
    other.pool_rows = dict(made.pool_rows)
    assert opened.of(torch.empty(2, 3, K), made) is opened.of(torch.empty(2, 3, K), other)
    assert opened.of(torch.empty(2, 4, K), made).tolist() == [0] * 4 + [2] * 4
    assert opened.of(torch.empty(0, 4, K), made) is None


@pytest.mark.parametrize("shape", [(3, K), (4, K), (3, 2, K), (1, 3, K), (K,), (2, 2, 2, 2, K)])
def test_rows_that_no_probe_has_shown(shape: tuple[int, ...]) -> None:
    made = layer()
    batch(made, 0, 2)
    with pytest.raises(
        AdapterPoolError, match=rf"its.path is called with x \({shape[0]},.*the batch has 2 adapter ids"
    ) as raised:
        made(torch.empty(shape))
    assert isinstance(raised.value, ShapeError)
    batch(made, 1, 1)  # one adapter fits all
    assert made(torch.randn(shape)).shape == (*shape[:-1], N)


def test_a_layer_without_weights_in_the_batch_does_not_ask() -> None:
    made, x = layer(), torch.randn(5, 7, K)
    batch(made, 0, 2, touched={"another.path"})
    assert torch.equal(made(x), linear(x, made.weight, made.bias))


def test_gradients_after_inference_mode_in_one_batch() -> None:
    made, x = layer(), torch.randn(4, K)
    batch(made, 0, 2, -1, 2)
    with torch.inference_mode():
        before = made(x)
    torch.testing.assert_close(made(x.requires_grad_()).detach(), before)  # other sums than the C++ operator's


def test_a_capture_inside_a_batch_of_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda, shape, device = True, torch.Size((2, K)), torch.device("cpu")

        def dim(self) -> int:
            return 2

        def numel(self) -> int:
            return 2 * K

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    x, made = OnGpu(), layer()
    with pytest.raises(AdapterPoolError, match=r"pool.ids\(names, out=tensor\)"):
        batch(made, 0, 1).of(x, made)  # type: ignore[arg-type]
    opened = batch(made, 0, 1, named=False)
    assert opened.of(x, made) is opened.requests.ids  # type: ignore[arg-type]  # the graph reads the caller's tensor


def test_a_thread_starts_with_nothing_open() -> None:
    made, x, seen = layer(), torch.randn(2, K), []
    batch(made, 0, 2)

    def run() -> None:
        seen.append((made.pool_active.get(), made.pool_active.thread.batch, made(x)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen[0][:2] == (None, None)
    assert close(seen[0][2], wanted(made, x, [-1, -1]))


def test_no_adapter_at_all_is_the_base_bit_for_bit() -> None:
    made, x = layer(), torch.randn(2, K)
    batch(made, -1, -1, -1, touched=(), held=set())  # of no matter how many rows
    assert torch.equal(made(x), linear(x, made.weight, made.bias))


def test_a_request_with_a_scale_of_its_own() -> None:
    made, x = layer(), torch.randn(4, K)
    batch(made, 0, 3, 4, -1, virtual=(torch.tensor([0, 2]), torch.tensor([0.5, -2.0])))
    plain, first, third = wanted(made, x, [-1] * 4), wanted(made, x, [0] * 4), wanted(made, x, [2] * 4)
    expected = [first[0], plain[1] + 0.5 * (first - plain)[1], plain[2] - 2 * (third - plain)[2], plain[3]]
    assert close(made(x), torch.stack(expected))
    torch._dynamo.reset()
    with torch.no_grad():
        assert close(torch.compile(made, backend="aot_eager", fullgraph=True)(x), torch.stack(expected))


def test_operands_that_do_not_fit_are_told_as_everywhere() -> None:
    made = layer()
    batch(made, 0, 2)
    with pytest.raises(ShapeError, match=r"X \(2, 6\) and W \(4, 5\) do not fit"):
        made(torch.randn(2, K + 1))
    with pytest.raises(ShapeError, match=r"X is torch.float64, W torch.float32"):
        made(torch.randn(2, K, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert made(torch.randn(2, K)).dtype == torch.bfloat16


def test_gradients_flow_to_x() -> None:
    made, x = layer(), torch.randn(4, K, requires_grad=True)
    batch(made, 0, 2, -1, 0)
    made(x).square().sum().backward()
    got = x.grad
    x.grad = None
    wanted(made, x, [0, 2, -1, 0]).square().sum().backward()
    assert got is not None
    assert x.grad is not None
    assert torch.allclose(got, x.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_made_and_unmade(kind: type[nn.Module]) -> None:
    original = kind(K, N)
    before = {name: id(value) for name, value in vars(original).items()}
    keys, hooks = list(original.state_dict()), []
    original.register_forward_hook(lambda *_: hooks.append(1))
    made = into_pooled(original, PoolSettings(CAPACITY, 6, 4), ActiveBatch(), "p")
    assert made is original
    assert isinstance(made, _Pooled)
    assert isinstance(made, kind)
    assert base_class(made) is kind
    assert list(made.state_dict()) == keys
    assert {name: (b.dtype, tuple(b.shape)) for name, b in made.named_buffers()} == {
        "pool_A": (torch.float32, (6, made.base_weight().shape[1])),
        "pool_Bt": (torch.float32, (6, made.base_weight().shape[0])),
        "pool_starts": (torch.int32, (3,)),
        "pool_ranks": (torch.int32, (3,)),
        "pool_scalings": (torch.float32, (3,)),
    }
    assert not any(buffer.any() for buffer in made.buffers())
    made(torch.randn(2, made.base_weight().shape[1]))
    assert hooks == [1]
    undo(made)
    assert type(original) is kind
    assert {name: id(value) for name, value in vars(original).items()} == before
    assert not set(vars(original)) & {*BUFFERS, *HOST}


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_copies_are_the_frozen_layer(kind: type[nn.Module]) -> None:
    made = layer(kind)
    for other in (copy.deepcopy(made), copy.copy(made), pickle.loads(pickle.dumps(made))):
        assert type(other) is kind
        assert not list(other.buffers())
        assert not set(vars(other)) & set(HOST)
        assert torch.equal(other.weight, made.weight)
    assert isinstance(made, _Pooled)
    assert len(list(made.buffers())) == 5


@pytest.mark.parametrize(
    ("weight", "adapters"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str
)
def test_a_small_B_stays_what_it_is_over_float16(weight: torch.dtype, adapters: torch.dtype) -> None:
    made = into_pooled(nn.Linear(K, N).to(weight), PoolSettings(CAPACITY, 6, 4), ActiveBatch(), "its.path")
    assert (made.pool_A.dtype, made.pool_Bt.dtype) == (adapters, adapters)


def test_conversions_keep_the_adapters_and_float32_scalings() -> None:
    made = layer()
    made.pool_scalings.fill_(1e6)
    A = made.pool_A.mul_(1e-6).clone()
    made.half()
    assert (made.weight.dtype, made.pool_A.dtype, made.pool_Bt.dtype) == (torch.float16, torch.float32, torch.float32)
    assert torch.equal(made.pool_A, A)
    made.pool_A.mul_(1e6)
    assert made.pool_scalings.tolist() == [1e6] * 3
    assert made.pool_slots.A is made.pool_A
    assert made.pool_slots.scalings is made.pool_scalings
    assert made.pool_slots.max_rank == 4
    made.double()
    made.pool_scalings.copy_(torch.tensor([0.5, 9.0, 2.0]))
    batch(made, 0, 2)
    x = torch.randn(2, K, dtype=torch.float64)
    assert close(made(x), wanted(made, x, [0, 2]))


def test_data_parallel_is_refused() -> None:
    with pytest.raises(AdapterPoolError, match="one process a GPU"):
        layer()._replicate_for_data_parallel()


def test_compiled_layer_reads_the_buffers() -> None:
    made: Any = layer()
    assert isinstance(made, PooledLinear)
    batch(made, 0, 2, -1)
    torch._dynamo.reset()
    compiled, x = torch.compile(made, backend="aot_eager", fullgraph=True), torch.randn(3, K)
    with torch.no_grad():
        assert close(compiled(x), wanted(made, x, [0, 2, -1]))
        made.pool_A.mul_(2)
        batch(made, 2, 2, 0)
        assert close(compiled(x), wanted(made, x, [2, 2, 0]))


def test_one_graph_for_batches_of_every_size() -> None:
    made: Any = layer()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for ids in ([0, 2, -1], [2, 0], [0, 1, 2, -1, 2]):
            batch(made, *ids)
            x = torch.randn(len(ids), K)
            assert close(compiled(x), wanted(made, x, ids))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_derivatives_of_every_kind_in_a_batch() -> None:
    made = layer()
    ids = [0, -1, 2, 2]
    batch(made, *ids)
    K = made.weight.shape[1]
    x = torch.randn(4, K).requires_grad_()

    def plain(x: Tensor) -> Tensor:
        return wanted(made, x, ids)

    tangents = [torch.func.jvp(run, (x.detach(),), (x.detach(),))[1] for run in (made, plain)]
    assert close(*tangents)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x.detach())
        assert close(torch.autograd.forward_ad.unpack_dual(made(dual)).tangent, tangents[1])
    second = []
    for run in (made, plain):
        (dx,) = torch.autograd.grad(run(x).pow(3).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(dx.square().sum(), x)[0])
    assert close(*second)
    for jacobian in (torch.func.jacfwd, torch.func.jacrev):
        assert close(jacobian(made)(x.detach()), jacobian(plain)(x.detach()))
    assert close(made(x), plain(x))  # nothing that a transform made is left behind


def test_vmap_hides_which_row_is_whose() -> None:
    made = layer()
    x = torch.randn(4, 4, made.weight.shape[1])
    batch(made, 0, 2, 2, -1)
    with pytest.raises(AdapterPoolError, match=r"torch\.func\.vmap"):
        torch.func.vmap(made)(x)
    batch(made, 2, 2, 2, 2)
    assert close(torch.func.vmap(made)(x), torch.stack([wanted(made, rows, [2] * 4) for rows in x]))
