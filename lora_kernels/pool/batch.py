"""OpenBatch: finds the adapter id of each row of a layer's input."""

from __future__ import annotations

import math
from collections.abc import Container
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from lora_kernels.autograd.call import batched, derived
from lora_kernels.errors import AdapterPoolError, UnknownRowsError
from lora_kernels.operands.slots import Slots
from lora_kernels.pool.active import ActiveBatch, Refusing
from lora_kernels.pool.call import Call, Dims
from lora_kernels.pool.ids import BatchIds, with_factors
from lora_kernels.pool.rows import RowLayout

REMEDY = (
    "Probe a call of the model with at least two requests: pool.probe(*args, **kwargs), before torch.compile and "
    "before a CUDA graph is captured; or serve one adapter at a time"
)


class OpenBatch:
    """An open batch. requests: ids of the model's sequences. images: ids of the items of its image inputs, or None.

    touched: paths of the layers in which one of its adapters has weights. held: slots that are kept while it is open.
    virtual: slots int64 (v,) and factors float32 (v,) of adapters that a request uses with its own scale; their ids
    come after those of the pool's slots. frame: the frame of the generator that opened the batch, or None.
    expand: how often generate() has repeated each request. tokens: an id belongs to a token, not to a sequence.
    outer: the batch that was open in this context before. outer_in_thread: the batch that was open in this thread
    before, in any context. interleaved: the two differ, so a traced graph could use the wrong one.
    """

    def __init__(
        self,
        active: ActiveBatch,
        requests: BatchIds,
        images: BatchIds | None = None,
        touched: Container[str] = (),
        held: set[int] | None = None,
        virtual: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.active, self.requests, self.images, self.touched = active, requests, images, touched
        self.held, self.virtual = held or set(), virtual
        self.frame: FrameType | None = None
        self.expand, self.tokens, self.problem, self.refusal = 1, False, "", ""
        self.call: Call | None = None
        self.outer: OpenBatch | None = None
        self.outer_in_thread: OpenBatch | None = None
        self.ended = self.interleaved = False
        self.mixed = not requests.named or self._one() is None
        self.none = requests.named and not self.held  # no request uses an adapter
        self._scaled: dict[str, Slots] = {}

    def refuse(self, message: str) -> None:
        """Make every later use of the batch raise AdapterPoolError with this message."""
        self.refusal, self.touched = message, Refusing(message)
        self.call = self.frame = None
        self._scaled.clear()

    def enter(self, call: Call) -> None:
        """Note a call of the model; find out whether an id belongs to a sequence or to a token of its inputs."""
        self.call, count, dim = call, self.requests.count * self.expand, self.active.batch_dim
        dims = call.dims(count, dim)
        self.tokens, self.problem = dims == [(0, 1)], ""
        if call.main and not dims:
            self.problem = (
                f"none of the model's inputs ({call.shapes()}) has {count} requests on dimension "
                f"{'0 or 1' if dim is None else dim}. Give one id for each sequence of the inputs, as often as the "
                "inputs are repeated"
            )

    def leave(self) -> None:
        """Note that the call has ended."""
        self.call, self.tokens, self.problem = None, False, ""

    def dims(self) -> Dims:
        """The dimensions of the model's inputs that count the requests."""
        return (0, 1) if self.tokens else (self.active.batch_dim or 0,)

    def of(self, x: Tensor, layer: Any) -> Tensor | None:
        """int32 (M,): the slot of each of the M rows of the layer's input x (..., K); None if x is empty.

        Raises UnknownRowsError if no probe has shown which request a row belongs to, ShapeError for ids out of range,
        AdapterPoolError if a CUDA graph would keep ids that the batch frees at its end.
        """
        layout = layer.pool_rows.get((self.tokens, x.dim()))
        ids = self.requests if layout is None or not layout.images or self.images is None else self.images
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            if ids.named:
                raise AdapterPoolError(
                    "a CUDA graph is captured inside a batch of names, whose ids are freed when it ends; allocate a "
                    "tensor, fill it by pool.ids(names, out=tensor), and capture inside pool.batch(tensor)"
                )
            return self._find(x, layer)  # part of the graph, since a replay may read other ids
        if derived():  # a tensor made under a transform must not outlive it
            if batched(x) and self._one() is None:
                raise AdapterPoolError(
                    f"{layer.pool_path} is called under torch.func.vmap, which hides a dimension of x: {tuple(x.shape)}"
                    f" does not show which of the {ids.count} ids a row has. Open a batch of one adapter, or use vmap "
                    "over lora_kernels.multi_lora_linear with an id for each row"
                )
            return self._find(x, layer)
        kept = ids.now()
        if kept is None or self.problem or (layout is None and self.images is not None):
            return self._find(x, layer)
        call = self.call
        view = None
        if call is not None and layout is not None and (layout.plain is None or call.numbers):
            view = call.view(self.dims())
        key = layout, x.shape, x.device, self.expand, view and view[1]
        found = kept.get(key)
        if found is None:
            found = self._find(x, layer)
            if found is not None and layout is layer.pool_rows.get((self.tokens, x.dim())):
                kept[key] = found
        return found

    def _find(self, x: Tensor, layer: Any) -> Tensor | None:
        if not x.numel():
            return None
        if self.images is not None:
            self.images.now()
        with torch.inference_mode(False):
            while True:
                found = self._known(x, layer)
                if isinstance(found, Tensor):
                    return found.to(x.device)
                if not self.active.learn(self):
                    break
        images = f" and {self.images.count} image ids" if self.images is not None else ""
        raise UnknownRowsError(
            f"{layer.pool_path} is called with x {tuple(x.shape)}, and the batch has {self.requests.count} adapter "
            f"ids{images}: "
            f"{found}"
        )

    def _known(self, x: Tensor, layer: Any) -> Tensor | str:
        """Return the id of each row, or the reason why no probe has shown it."""
        layout, lead = layer.pool_rows.get((self.tokens, x.dim())), tuple(x.shape[:-1])
        if self.tokens:
            lead = (math.prod(lead),)
        one = self._one()
        if one is None and layout is not None and self.images is not None:
            one = (self.images if layout.images else self.requests).uniform
        if one is not None:
            return one.expand(math.prod(lead)).contiguous()
        if layout is None or (layout.places is None and not layout.images):
            failure = self.active.failure
            return self.problem or f"no probe has shown which row belongs to which request{failure}. {REMEDY}"
        ids = self.images if layout.images else self.requests
        if ids is None:
            return (
                "its rows come from the images alone. Open the batch by pool.batch(ids, image_ids=...), with one id "
                "for each item of dimension 0 of the image inputs"
            )
        if self.problem:
            return self.problem
        sizes, key = ({}, None) if self.call is None else self.call.view(self.dims())
        if self.call is not None and self.call.numbers and not layout.has_seen(key):
            return f"no probe has shown it for a call with these sizes and numbers{self.active.failure}. {REMEDY}"
        found = layout.find(lead, ids.count * self.expand, sizes, key)
        if found is not None:
            return found.spread(ids.repeated(self.expand), lead)
        if layout.places is not None and not layout.places:
            return (
                "probes have shown that its rows mix the requests or follow no known order (routed, packed or shared "
                "rows). Serve one adapter at a time, or leave the layer out by target_modules"
            )
        return (
            f"this shape does not fit what probes have shown for {ids.count * self.expand} requests. Give one id for "
            f"each sequence of the model's inputs, as often as the inputs are repeated. {REMEDY}"
        )

    def _one(self) -> Tensor | None:
        """int32 (1,): the id of all rows, or None if there are several."""
        one, images = self.requests.uniform, self.images
        return one if images is None or (images.value is not None and images.value == self.requests.value) else None

    def traced(self, x: Tensor, layer: Any) -> Tensor | None:
        """Return what ``of`` returns, under torch.compile, from earlier probes only; None: only the base layer runs."""
        if self.refusal:
            raise AdapterPoolError(self.refusal)
        if self.interleaved:
            raise AdapterPoolError(
                "several tasks of this thread have a batch open, and torch.compile cannot tell which task calls; do "
                "not await inside a batch that calls a compiled model, or call it in a thread of its own"
            )
        if self.none:
            return None
        known: RowLayout | None = None
        for tokens in (False, True):
            layout = layer.pool_rows.get((tokens, x.dim()))
            if layout is not None and layout.plain is not None:
                given, place = self.images if layout.images else self.requests, layout.plain
                lead = (x.shape[:-1].numel(),) if tokens else x.shape[:-1]
                ids = (
                    None if given is None else given.repeated(self.expand, live=True)
                )  # its size may be symbolic in the graph
                if ids is not None and lead[place.axis] == ids.shape[0] * place.repeats:
                    return place.spread(ids, lead).to(x.device)
            known = known or layout
        if known is None and layer.pool_path not in self.touched:
            return None
        if self.requests.always is not None and self.images is None:
            return self.requests.always.expand(x.shape[:-1].numel()).contiguous().to(x.device)
        raise UnknownRowsError(
            f"{layer.pool_path} is called with x {tuple(x.shape)} under torch.compile, and the batch has "
            f"{self.requests.count} adapter ids: it is not known which row belongs to which request. {REMEDY}"
        )

    def slots(self, layer: Any) -> Slots:
        """The layer's slots, followed by the slots of this batch that have their own scale."""
        if self.virtual is None:
            return layer.pool_slots  # type: ignore[no-any-return]
        made = self._scaled.get(layer.pool_path)
        if made is None:
            made = self._scaled[layer.pool_path] = with_factors(layer.pool_slots, *self.virtual)
        return made
