"""Hooks of a pool on its model while batches are open: they record calls, and how often generate() repeats requests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from lora_kernels.pool.active import ActiveBatch

GENERATE, EXPAND = "generate", "_expand_inputs_for_generation"  # of transformers' GenerationMixin


class Root:
    """Attaches hooks when the first batch opens, and removes them when the last one closes. The caller holds the pool's
    lock."""

    def __init__(self, model: nn.Module, active: ActiveBatch) -> None:
        self.model, self.active = model, active
        self._users, self._undo = 0, list[Callable[[], object]]()
        self._before = RemovableHandle(model._forward_pre_hooks, extra_dict=model._forward_pre_hooks_with_kwargs)
        self._after = RemovableHandle(model._forward_hooks)
        self._hooks = Entering(active), Leaving(active)
        self._generates = hasattr(model, EXPAND)

    def attach(self) -> None:
        """Count a batch that is opened, and attach the hooks if it is the first."""
        self._users += 1
        if self._users > 1:
            return
        # register_forward_pre_hook(prepend=True, with_kwargs=True) does the same, but takes 10 us to make its handles
        model, before = self.model, self._before.id
        model._forward_pre_hooks[before], model._forward_hooks[self._after.id] = self._hooks
        model._forward_pre_hooks.move_to_end(before, last=False)  # type: ignore[attr-defined]  # an OrderedDict
        model._forward_pre_hooks_with_kwargs[before] = True
        self._undo = [self._before.remove, self._after.remove]
        for name, kind in ((GENERATE, Generating), (EXPAND, Expanding)) if self._generates else ():
            if callable(getattr(model, name, None)):
                own = vars(model)
                undo = functools.partial(own.__setitem__, name, own[name]) if name in own else None
                self._undo.append(undo or functools.partial(own.pop, name, None))
                own[name] = kind(getattr(model, name), self.active)

    def detach(self) -> None:
        """Count a batch that is closed, and remove the hooks if it was the last."""
        self._users -= 1
        while not self._users and self._undo:
            self._undo.pop()()


class Entering:
    """Forward pre-hook: gives the call's arguments to the open batch."""

    def __init__(self, active: ActiveBatch) -> None:
        self.active = active

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if is_compiling():
            return
        batch = self.active.get()
        if batch is not None and batch.mixed and not batch.refusal:
            batch.enter(self.active.make_call(args, kwargs))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()


class Leaving:
    """Forward hook: notes in the open batch that the call has ended."""

    def __init__(self, active: ActiveBatch) -> None:
        self.active = active

    def __call__(self, *_: object) -> None:
        if is_compiling():
            return
        batch = self.active.get()
        if batch is not None and batch.mixed:
            batch.leave()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()


class Generating:
    """Wraps generate(): sets the number of copies of each request to 1 at its beginning, and restores it at its end.
    If generate() calls an encoder directly, a call of the model with the same inputs is noted for probing."""

    def __init__(self, method: Callable[..., Any], active: ActiveBatch) -> None:
        functools.update_wrapper(self, method)
        self.method, self.active = method, active

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self.active.get()
        if batch is None:
            return self.method(*args, **kwargs)
        before, batch.expand = batch.expand, 1
        inputs = _inputs(getattr(self.method, "__self__", None), args, kwargs) if batch.mixed else None
        if inputs is not None:
            batch.enter(self.active.make_call((), inputs))
        try:
            return self.method(*args, **kwargs)
        finally:
            batch.expand = before


class Expanding(Generating):
    """Wraps transformers' _expand_inputs_for_generation: records how often generate() repeats each request."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self.active.get()
        if batch is not None:
            batch.expand = kwargs.get("expand_size", args[0] if args else 1)
        return self.method(*args, **kwargs)


def _inputs(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Inputs for a call of an encoder-decoder model that runs the encoder as generate() with these arguments does; None
    for other models."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return None
    main = args[0] if args else kwargs.get("inputs", kwargs.get(model.main_input_name))
    if not isinstance(main, Tensor) or not main.dim():
        return None
    start = torch.full((len(main), 2), getattr(config, "decoder_start_token_id", None) or 0, device=main.device)
    masks = {name: kwargs[name] for name in ("attention_mask",) if isinstance(kwargs.get(name), Tensor)}
    return {model.main_input_name: main, "decoder_input_ids": start, **masks}


class _Nothing:
    """Does nothing: replaces a hook in a copy of the model, which has no pool."""

    def __call__(self, *_: object) -> None:
        pass
