"""Connects transformers.Trainer: one callback for PEFT models, for models of apply_lora, and for TRL's trainers."""

from __future__ import annotations

import functools
import os
import warnings
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import save_file
from torch import nn
from transformers.trainer_callback import ExportableState
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME

import lora_kernels
from lora_kernels.adapters import save_adapter
from lora_kernels.errors import ConfigError
from lora_kernels.finetune.train.run_state import changing_weights
from lora_kernels.models.explain import injection_of, unwrap

_SLIM = "lora_slim_checkpoints"


class AccelerateCallback(transformers.TrainerCallback, ExportableState):
    """Accelerate the LoRA layers of a Trainer's model, report it once, and keep checkpoints of our own models small.

    ``Trainer(model, ..., callbacks=[AccelerateCallback()])``, or TRL's SFTTrainer. For a model with PEFT's LoRA layers
    (PeftModel, or after ``model.add_adapter``) it calls lora_kernels.accelerate when the Trainer has been built, and
    again when training begins, for layers that were added or wrapped in between. A model of apply_lora or load_adapter
    already has our layers; its checkpoints contain only the adapter, see slim_checkpoints, unless ``slim`` is False.
    Trainer alone cannot resume from a checkpoint of a model with ``add_adapter``; the callback adds the trained weights
    that it lacks.

    The partners of groups (q, k, v share a dropout mask once they are known to read one input) are saved in
    trainer_state.json, so that a resumed run draws the same masks as an uninterrupted one.

    strict, group: as in lora_kernels.accelerate. verbose: print the report once, in the first process.
    A model without LoRA layers when training begins causes a warning, or ConfigError with ``strict``.
    """

    def __init__(self, *, strict: bool = False, group: bool = True, verbose: bool = True, slim: bool = True) -> None:
        self.strict, self.group, self.verbose, self.slim = strict, group, verbose, slim
        self.groups: list[Any] = []
        self._reported = False
        self._model: weakref.ref[nn.Module] | None = None

    def state(self) -> dict[str, Any]:
        """Return what Trainer saves of the callback in a checkpoint."""
        model = self._model() if self._model is not None else None
        if model is not None:
            known = (group for group in _groups(model) if group.sharing.partners is not None)
            self.groups = [[group.path, group.names, group.sharing.partners] for group in known]
        names = ("strict", "group", "verbose", "slim")
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {"groups": self.groups}}

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Accelerate before Trainer looks for a checkpoint: resuming loads into the layers that train."""
        if model is not None:
            self._apply(args, model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Accelerate for a callback or layers added after the Trainer was built; restore groups from a checkpoint."""
        name, found = type(self).__name__, self._apply(args, model)
        if state.stateful_callbacks is not None:  # a checkpoint written without this callback has no entry for it
            kept = state.stateful_callbacks.setdefault(name, self.state())
            if isinstance(kept, dict):
                _restore_partners(unwrap(model), kept["attributes"].get("groups", ()))
        if found:
            return
        message = (
            f"AccelerateCallback: {type(unwrap(model)).__name__} has no LoRA layers, neither PEFT's nor ours; "
            "give the model its adapter before training"
        )
        if self.strict:
            raise ConfigError(message)
        warnings.warn(message, stacklevel=2)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Add the trained weights, which Trainer reads when it resumes, to a checkpoint without model weights."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        inner = unwrap(model)
        written = {path.name for path in folder.glob("*.safetensors*")}
        if state.is_world_process_zero and _SLIM in vars(inner) and written == {ADAPTER_SAFE_WEIGHTS_NAME}:
            tensors = {name: tensor.detach().contiguous().clone() for name, tensor in changing_weights(inner).items()}
            save_file(tensors, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    def _apply(self, args: Any, model: nn.Module) -> bool:
        """Fuse the model's LoRA layers where possible; return whether it has any."""
        verbose = self.verbose and not self._reported and args.process_index == 0
        inner = unwrap(model)
        self._model = weakref.ref(inner)
        injection = injection_of(inner)
        if injection is not None:
            if self.slim and isinstance(inner, transformers.PreTrainedModel):
                slim_checkpoints(inner)
            if verbose:
                print(f"lora_kernels: {len(injection.adapted)} of {len(injection.layers)} linear layers have LoRA")
        elif has_peft_layers(inner):
            if getattr(inner, "_hf_peft_config_loaded", False):
                _accept_trained_alone(inner)
            lora_kernels.accelerate(model, strict=self.strict, group=self.group, verbose=verbose)
        else:
            return False
        self._reported = True
        return True


def has_peft_layers(model: nn.Module) -> bool:
    """Return whether a module of the model is a LoRA layer of PEFT's. PEFT need not be installed."""
    return any(hasattr(module, "base_layer") and hasattr(module, "lora_A") for module in model.modules())


def _groups(model: nn.Module) -> list[Any]:
    """Return the groups that accelerate formed, without importing PEFT."""
    members = (vars(module).get("_lora_group") for module in model.modules())
    return list({id(member.group): member.group for member in members if member is not None}.values())


def _restore_partners(model: nn.Module, known: Iterable[Any]) -> None:
    """Set the partners of groups that have none to those that a checkpoint holds for the same layers."""
    partners = {(path, *names): tuple(map(tuple, indices)) for path, names, indices in known}
    for group in _groups(model):
        saved = partners.get((group.path, *group.names))
        if saved is not None and group.sharing.partners is None:
            group.sharing = type(group.sharing)(len(group.names), saved)


def slim_checkpoints(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Make ``model.save_pretrained``, and so every Trainer, write the adapter in PEFT's format and no frozen weight.

    For models of apply_lora and load_adapter; changes the model in place and returns it. If all frozen weights are
    absent, ``load_state_dict`` no longer reports them as missing. A state dict passed to ``save_pretrained``, as FSDP
    and DeepSpeed do, is still written as transformers writes it. ``del model.save_pretrained`` restores the default.
    Raises ConfigError for a model without our layers.
    """
    if injection_of(model) is None:
        raise ConfigError(f"{type(model).__name__} has no adapter of ours; call apply_lora or load_adapter first")
    _accept_trained_alone(model)
    model.save_pretrained = functools.partial(_save_slim, model)  # type: ignore[method-assign]
    return model


def _accept_trained_alone(model: nn.Module) -> None:
    if _SLIM not in vars(model):
        setattr(model, _SLIM, True)
        model.register_load_state_dict_post_hook(_frozen_are_not_missing)


def _save_slim(
    model: transformers.PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    if state_dict is not None or kwargs.get("push_to_hub"):
        type(model).save_pretrained(model, save_directory, is_main_process, state_dict, **kwargs)
    elif is_main_process:
        save_adapter(model, save_directory)


def _frozen_are_not_missing(model: nn.Module, result: Any) -> None:
    frozen = model.state_dict().keys() - changing_weights(model).keys()
    if frozen and set(result.missing_keys) == frozen:
        result.missing_keys.clear()
