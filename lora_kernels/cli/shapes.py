"""The linear layers of a model: from a list of names, or from a transformers configuration, without weights."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_kernels.errors import ConfigError, LoRAKernelsError
from lora_kernels.finetune.tasks.pretrained import hub, locate, source_of
from lora_kernels.finetune.train.extras import require
from lora_kernels.kernels.chip import Chip
from lora_kernels.planning.cost import CallShape, seconds
from lora_kernels.planning.plans import launches
from lora_kernels.planning.tuned import bucket, key_of


class Shape(NamedTuple):
    """A shape of linear layers: N out, K in, whether it has a bias."""

    N: int
    K: int
    bias: bool = False


# The number of layers of each shape in "all-linear".
MODELS = {
    "bert-base": {Shape(768, 768, True): 48, Shape(3072, 768, True): 12, Shape(768, 3072, True): 12},
    "llama-3-8b": {Shape(4096, 4096): 64, Shape(1024, 4096): 64, Shape(14336, 4096): 64, Shape(4096, 14336): 32},
    "llama-3-70b": {Shape(8192, 8192): 160, Shape(1024, 8192): 160, Shape(28672, 8192): 160, Shape(8192, 28672): 80},
    "qwen2.5-7b": {
        Shape(3584, 3584, True): 28, Shape(3584, 3584): 28, Shape(512, 3584, True): 56, Shape(18944, 3584): 56,
        Shape(3584, 18944): 28,
    },
}  # fmt: skip
MODEL_HELP = f"a folder, a config.json, a hub id, or one of {', '.join(MODELS)}"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_LAYERS = 10_000  # most layers, and most labels, of a configuration that is built

# Configurations to build these models without a network. Other values are the defaults of transformers.
CONFIGS: dict[str, dict[str, Any]] = {
    "bert-base": {"model_type": "bert"},
    "llama-3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 8192, "architectures": ["LlamaForCausalLM"],
    },
    "llama-3-70b": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 8192, "architectures": ["LlamaForCausalLM"],
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "max_position_embeddings": 131072, "architectures": ["Qwen2ForCausalLM"],
    },
}  # fmt: skip


def shapes_from(source: str) -> dict[Shape, int]:
    """Count the linear layers of a model by shape. source: a name of MODELS, a folder, a config.json, or a hub id.

    The model is built from its configuration on the meta device: no weights are read and no memory is used. It has no
    head, which gets no adapters.

    Raises:
        ConfigError: no such model, or no linear layer.
        MissingLibraryError: transformers is required and not installed.
    """
    if source in MODELS:
        return dict(MODELS[source])
    model = on_meta(source)
    found: Counter[Shape] = Counter(
        Shape(module.out_features, module.in_features, module.bias is not None)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )
    if not found:
        raise ConfigError(f"{source!r} is a {type(model).__name__} without linear layers")
    return dict(found)


def configuration(source: str) -> Any:
    """Load the transformers configuration of a name of CONFIGS, a folder, a config.json or a hub id.

    Raises ConfigError if there is none, MissingLibraryError without transformers.
    """
    auto = require("transformers").AutoConfig
    path = Path(locate(source)).expanduser()
    if source.startswith((".", "/", "~")) and not path.exists():
        raise ConfigError(f"{source!r}: there is no such file or folder")
    if source in CONFIGS:
        return auto.for_model(**CONFIGS[source])
    try:
        file = path if path.is_file() else path / "config.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            _check_sizes(source, found)
        if path.is_file():
            return auto.for_model(**found)
        name = source_of(source)
        with hub(name):
            return auto.from_pretrained(name, trust_remote_code=False)
    except (LoRAKernelsError, MemoryError):
        raise
    except Exception as error:  # transformers raises errors of any class for unexpected values
        raise _no_model(source, error) from error


def _check_sizes(source: str, values: Any) -> None:
    """Raise ConfigError for extreme sizes: building the model would take hours, or overflow."""
    if not isinstance(values, dict) or "model_type" not in values:
        raise ConfigError(
            f"{source!r} gives no model: expected a configuration, which is a JSON object with a model_type"
        )
    for name, value in values.items():
        most = MAX_LAYERS if name.endswith(("layers", "n_layer", "num_labels")) else 2**31 - 1
        if isinstance(value, int) and abs(value) > most:
            raise ConfigError(f"{source!r}: {name} is {value}; accepted are at most {most}")


def on_meta(source: str, auto_class: str = "AutoModel", config: Any = None, **arguments: Any) -> nn.Module:
    """Build ``transformers.<auto_class>`` of ``config`` (default: ``configuration(source)``) on the meta device."""
    config = configuration(source) if config is None else config
    try:
        with torch.device("meta"):
            made = getattr(require("transformers"), auto_class)
            return made.from_config(config, trust_remote_code=False, **arguments)
    except (LoRAKernelsError, MemoryError):
        raise
    except Exception as error:  # as above
        raise _no_model(source, error) from error


def _no_model(source: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return ConfigError(f"{source!r} gives no model: {type(error).__name__}: {reason} (give {MODEL_HELP})")


def problems_of(
    shapes: dict[Shape, int],
    tokens: Sequence[int],
    r: int,
    dtype: torch.dtype,
    dropouts: Sequence[bool],
    ops: Sequence[str],
    chip: Chip,
) -> list[CallShape]:
    """List one problem for each entry of a tuned table, in descending order of predicted time in the model."""
    weights: Counter[tuple[object, ...]] = Counter()
    problems: dict[tuple[object, ...], CallShape] = {}
    for (N, K, bias), count in shapes.items():
        for M, dropout, op in itertools.product(tokens, dropouts, ops):
            q = CallShape(op, M, N, K, r, dtype, dropout, bias and op == "fwd")
            kind = (*key_of(q), bucket(M))
            problems.setdefault(kind, q)
            weights[kind] += count * int(1e9 * sum(seconds(launch, dtype, chip) for launch in launches("eager", q)))
    return [problems[kind] for kind, _ in weights.most_common()]
