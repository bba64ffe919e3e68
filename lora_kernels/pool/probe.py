"""Probes of a pool's model: find which row of every pooled layer belongs to which request."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.errors import AdapterPoolError
from lora_kernels.locks import fork_safe_rlock
from lora_kernels.pool.active import ActiveBatch
from lora_kernels.pool.batch import OpenBatch
from lora_kernels.pool.call import MEDIA, Call, Dims, len_of
from lora_kernels.pool.content import is_content, is_extent, kept_values, other_content, with_other_extents
from lora_kernels.pool.isolation import NOTHING, At, Isolation, isolate
from lora_kernels.pool.model import PooledModel
from lora_kernels.pool.rows import Evidence, RowLayout, first_layout

SEQUENCES, LENGTHS = 3, (7, 5)  # of the generated calls for a model of transformers


class Probe:
    """Probes a model and stores the result in its layers' ``pool_rows``."""

    def __init__(self, pooled: PooledModel, active: ActiveBatch, batch_dim: int | None) -> None:
        self.pooled, self.active = pooled, active
        model = pooled.model
        self._main = getattr(model, "main_input_name", None) if hasattr(model, "config") else None
        active.batch_dim = 0 if batch_dim is None and self._main else batch_dim
        active.learn, active.make_call = self.learn, self.call
        self.names = list(inspect.signature(model.forward).parameters)
        first = self._main if isinstance(self._main, str) else next(iter(self.names), "")
        self._reads_media = bool(MEDIA.search(first))
        self._lock, self._made_up = fork_safe_rlock(), False
        self._same: dict[object, RowLayout] = {}
        self._meant: set[int] | None = None

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """A call of the model with its inputs by name."""
        return Call(args, kwargs, self.names, self._reads_media, single=not self._main)

    def make_up(self) -> None:
        """Probe a model of transformers, once, with inputs that are generated from its configuration."""
        with self._lock:
            if self._made_up or not self._main or _capturing():
                return
            self._made_up = True
            for length in LENGTHS:
                try:
                    kwargs = self._inputs(length)
                except (AttributeError, TypeError, ValueError):  # a configuration of another kind
                    return
                self._study(self.call((), kwargs), [((0,), SEQUENCES)], None)

    def learn(self, batch: OpenBatch) -> bool:
        """Probe with the running call of the batch; False if there is no call or it was probed before."""
        call = batch.call
        if call is None or call.probed or batch.problem or _capturing():
            return False
        call.probed = True
        count, images = batch.requests.count * batch.expand, batch.images
        items = None if images is None else images.count * batch.expand
        with self._lock:
            dims = call.dims(count, self.active.batch_dim)
            self._study(call, [(at, count) for at in dims], items)
        return True

    def show(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Probe with the given arguments. Raises AdapterPoolError if that shows nothing."""
        call = self.call(args, kwargs)
        known = self.active.batch_dim
        dims: list[Dims] = [(0,), (1,)] if known is None else [(known,)]
        dims = [at for at in dims if next(_counts(call, at), 0) > 1]
        dims = dims if (dims and dims[0] != (1,)) or known == 1 else []
        with self._lock:
            found = self._study(call, [(at, next(_counts(call, at))) for at in dims], None, first=True)
        if not found:
            raise AdapterPoolError(
                f"the probe with {call.shapes()} did not show for any layer which row belongs to which request"
                f"{self.active.failure}. Give the inputs of a call of the model with at least two requests of "
                "different content on dimension 0 (or on batch_dim of the pool)"
            )

    def _study(self, call: Call, options: list[tuple[Dims, int]], images: int | None, first: bool = False) -> bool:
        """Find the dimension of the requests among the options, and store the result of the probe.

        Returns whether the probe shows anything. first: prefer the first option if another one fits as well.
        """
        self.active.failure = ""
        others = []
        if [dims for dims, _ in options] == [(1,)]:  # rows may be equally independent along dimension 0
            others = [((0,), count) for count in _counts(call, (0,)) if count > 1 and self.active.batch_dim is None][:1]
        results = list[tuple[Dims, int, Isolation]]()
        for dims, count in [*options, *others]:
            results.append((dims, count, self._best(call, dims, count)))
            if first and results[0][2].complete():
                break
        if not results:
            return False
        best = max(results, key=lambda result: len(result[2].apart))
        for dims, _, other in results:
            apart = best[2].apart
            if dims != best[0] and not first and apart and not other.apart < apart:
                self.active.failure = (
                    f" (dimension {best[0][0]} or {dims[0]} of the inputs, {call.shapes()}, may be that of the "
                    "requests; make the pool with batch_dim=0 or 1, or first call the model with other sizes)"
                )
                return False
        dims, count, found = best
        if dims not in [at for at, _ in options]:
            self.active.failure = f" (the probe found the requests on dimension {dims[0]} of {call.shapes()})"
            return False
        if not found.known() and count > 1 and self.active.batch_dim is None:
            self.active.failure = self.active.failure or f" (the probe found no request's rows for {call.shapes()})"
            return False
        if found.apart and len(dims) == 1:
            self.active.batch_dim = dims[0]
        self._keep(call, dims, found.places, images=False)
        if call.media:
            count = images or next((tensor.shape[0] for tensor in call.media.values() if tensor.dim()), 0)
            altered = {name: T for name, T in call.media.items() if len_of(T, (0,)) == count and is_content(name)}
            if altered and count:
                seen = self._attempt(call, altered, (0,), count, ()) or NOTHING
                left = {at: places for at, places in seen.places.items() if at not in found.places}
                self._keep(call, dims, left, images=True)
        return bool(found.known())

    def _best(self, call: Call, dims: Dims, count: int) -> Isolation:
        """Alter the inputs in several ways, and return what shows most; NOTHING if each raises in the model."""
        content = {
            name: tensor for name, tensor in call.main.items()
            if len_of(tensor, dims) == count and is_content(name)
        }  # fmt: skip
        if not content:
            self.active.failure = f" (no input of {call.shapes()} has content for {count} requests)"
            return NOTHING
        found = None
        for kept in kept_values(content, bool(call.media)):
            found = self._attempt(call, content, dims, count, kept)
            if found is not None:
                break
        if (found is None or not found.known()) and len(content) > 1:  # the other inputs may not belong to the requests
            name = next(iter(content))
            less = self._attempt(call, {name: content[name]}, dims, count, ())
            found = less if found is None or less is None else less.agreeing(found._replace(places={}))
        about = [tensor for name, tensor in call.main.items() if is_extent(name) and len_of(tensor, (0,)) == count]
        if found is not None and found.known() and about and dims == (0,):  # the model may sort sequences by length
            args, kwargs = with_other_extents(about, call.args, call.kwargs)
            again = self._attempt(self.call(args, kwargs), content, dims, count, ())
            found = found if again is None else found.agreeing(again)
        return found or NOTHING

    def _attempt(
        self, call: Call, inputs: Mapping[str, Tensor], dims: Dims, count: int, kept: Sequence[int]
    ) -> Isolation | None:
        own = {id(tensor) for tensor in inputs.values()}
        other = other_content([*kept, *self._special()])

        def alter(tensor: Tensor, subset: Tensor, generator: torch.Generator) -> Tensor | None:
            if id(tensor) not in own:
                return None
            lead = [size if dim in dims else 1 for dim, size in enumerate(tensor.shape)]
            return torch.where(subset.view(lead).to(tensor.device), other(tensor, generator), tensor.detach())

        try:
            found = isolate(self.pooled.model, self.active, call.args, dict(call.kwargs), count, alter, len(dims) == 2)
        except Exception as error:  # the model may refuse generated inputs
            self.active.failure = f" (a probe failed: {type(error).__name__}: {error!s:.120})"
            return None
        if found.places and count == 1:  # one request: shows only which layers depend on it
            return Isolation(dict.fromkeys(found.places), found.apart)
        return found

    def _keep(self, call: Call, dims: Dims, found: Mapping[At, Any], images: bool) -> None:
        sizes, key = call.view(dims)
        for (path, dim), places in found.items():
            rows = self.pooled.layers[path].pool_rows
            at, evidence = (len(dims) == 2, dim), Evidence(images, places)
            old = rows.get(at)
            if old is not None and old.images and not images:
                old = None  # the layer depends on the sequences too
            if old is not None and images and not old.images:
                continue
            layout = first_layout(evidence, sizes, key) if old is None else old.after(evidence, sizes, key)
            rows[at] = self._same.setdefault(layout.content(), layout)

    def _special(self) -> set[int]:
        """Ids of special tokens, above all placeholders of images."""
        if self._meant is None:
            config = getattr(self.pooled.model, "config", None)
            places = [vars(place) for place in (config, getattr(config, "text_config", None)) if place is not None]
            for module in self.pooled.model.modules():
                places += [vars(module), vars(type(module))]
            named = [value for place in places for name, value in place.items() if "token" in name.lower()]
            self._meant = {value for value in named if isinstance(value, int) and not isinstance(value, bool)}
        return self._meant

    def _inputs(self, length: int) -> dict[str, Tensor]:
        """Inputs of SEQUENCES sequences of ``length`` random tokens, or SEQUENCES images of random pixels."""
        model: Any = self.pooled.model
        device = next(iter(self.pooled.layers.values())).weight.device
        config, generator = model.config, torch.Generator().manual_seed(length)
        if self._main == "pixel_values":
            size = config.image_size
            shape = (SEQUENCES, config.num_channels, *(size if isinstance(size, list | tuple) else (size, size)))
            dtype = next(iter(self.pooled.layers.values())).weight.dtype
            return {"pixel_values": torch.randn(shape, generator=generator).to(device, dtype)}
        if self._main != "input_ids":
            raise ValueError(self._main)
        config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        usual = torch.tensor(sorted(set(range(config.vocab_size)) - self._special()))

        def tokens(length: int) -> Tensor:
            return usual[torch.randint(len(usual), (SEQUENCES, length), generator=generator)].to(device)

        inputs = {"input_ids": tokens(length)}
        if getattr(model.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = tokens(sum(LENGTHS) - length)
        return inputs


def _counts(call: Call, dims: Dims) -> Iterator[int]:
    """The number of requests on these dimensions, for each main input that has them."""
    return (len_of(tensor, dims) for tensor in call.main.values() if len_of(tensor, dims))


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
