"""Records the injection of a model, and prints it as a table; for one layer prints every plan with its cost."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from lora_kernels.config import LoRAConfig
from lora_kernels.errors import BackendUnavailableError, ConfigError
from lora_kernels.kernels.chip import CHIPS, Chip
from lora_kernels.layers import LoRALinear
from lora_kernels.models.fast_paths import KEPT, is_off
from lora_kernels.models.targets import is_conv1d
from lora_kernels.planning.choose import (
    TRITON_DTYPES,
    candidates,
    chip_for,
    choose,
    requested_backend,
    resolve_backend,
    split_name,
)
from lora_kernels.planning.cost import CallShape, Plan

REMEMBERED_AS = "lora_injection"
Columns = tuple[str, str, str, str]  # shape, r, scaling, what runs

# Called first for the columns of a module; each returns None for modules it does not handle. Integrations append to it.
DESCRIBERS: list[Callable[[nn.Module], Columns | None]] = []


@dataclass(frozen=True)
class LayerPlan:
    """A linear layer of the model: adapted with r and lora_alpha where why_not is None."""

    path: str
    why_not: str | None
    r: int = 0
    lora_alpha: float = 0.0


@dataclass(frozen=True)
class TrainedTokens:
    """The trained rows of the weight at `path`, and the tied modules, whose weights have the same trained rows."""

    path: str
    rows: tuple[int, ...]
    tied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Injection:
    """What apply_lora does to a model: the configuration with its defaults filled in, the plan of every linear layer,
    and the paths of the modules that are trained whole. Kept on the model; survives deepcopy and pickle."""

    config: LoRAConfig
    layers: tuple[LayerPlan, ...]
    saved: tuple[str, ...]
    tokens: tuple[TrainedTokens, ...] = ()
    replaced: tuple[str, ...] = ()  # weights of embeddings that load_adapter replaced, as PEFT does

    @property
    def adapted(self) -> dict[str, LayerPlan]:
        """The adapted layers by path."""
        return {layer.path: layer for layer in self.layers if layer.why_not is None}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and (Distributed)DataParallel's wrappers."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while (inner := model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)) is not None:
        model = inner
    return model


def injection_of(model: nn.Module) -> Injection | None:
    """Return the injection that apply_lora or load_adapter recorded on this model, or None."""
    return getattr(unwrap(model), REMEMBERED_AS, None)


def explain(model: nn.Module, tokens: int = 2048, layer: str | None = None, chip: str | None = None) -> str:
    """A table of the model's linear layers: adapted or not and why, rank, scaling, and what runs them at `tokens` rows.
    A LoRA layer of PEFT has one line: fused by lora_kernels.accelerate, or the reason why PEFT's own forward runs.

    Layers that differ in nothing but numbers in their paths share a line. The last line counts parameters. For a lone
    LoRALinear, or the one whose path is `layer`, every plan follows, forward and backward: predicted and measured
    time, bytes, launches, or the reason it is refused; and which one runs and why. `chip` ("sm_90") selects the
    GPU architecture; the default is the GPU of the model.

    Raises ConfigError for a `layer` that is not a LoRALinear of this model and for an unknown `chip`.
    """
    model = unwrap(model)
    if chip is not None and chip not in CHIPS:
        raise ConfigError(f"chip {chip!r} is unknown; known are {', '.join(CHIPS)}")
    asked = None if chip is None else CHIPS[chip]
    if layer is not None:
        one = dict(model.named_modules()).get(layer)
        if not isinstance(one, LoRALinear):
            paths = [path for path, module in model.named_modules() if isinstance(module, LoRALinear)]
            raise ConfigError(f"{layer!r} is no LoRALinear of this model; such are {', '.join(paths[:8]) or 'none'}")
        return f"{layer}\n{_plans(one, tokens, asked)}"
    injection = injection_of(model)
    reasons = {layer.path: layer.why_not for layer in injection.layers} if injection else {}
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    foreign = {path: columns for path, module in model.named_modules() if (columns := _foreign(module)) is not None}
    inside = tuple(path and f"{path}." for path in foreign)  # where such a layer keeps its base and its adapters
    untouched = "PEFT has no adapter for it" if foreign else "apply_lora was not called"
    for path, module in model.named_modules():
        if path in foreign:
            groups[re.sub(_NUMBER, "*", path), *foreign[path]].append(path)
        elif not path.startswith(inside) and (isinstance(module, nn.Linear | LoRALinear) or is_conv1d(module)):
            why_not = reasons.get(path) or untouched
            groups[re.sub(_NUMBER, "*", path), *_columns(module, why_not, tokens, asked)].append(path)
    rows = [["layer", "count", "shape", "r", "scaling", "what runs"]]
    for (_, *cells), paths in groups.items():
        rows.append([_together(paths) or type(model).__name__, str(len(paths)), *cells])
    lines = _aligned(rows)
    lines += _fast_paths(model, tuple(foreign))
    lines += [f"{path}: trained whole and saved with the adapter" for path in (injection.saved if injection else ())]
    for one in injection.tokens if injection else ():
        lines.append(f"{', '.join((one.path, *one.tied))}: {len(one.rows)} rows trained and saved with the adapter")
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    lines.append(f"trainable {trained:,} of {total:,} parameters ({100 * trained / max(total, 1):.3f} %)")
    if isinstance(model, LoRALinear):
        lines.append(_plans(model, tokens, asked))
    return "\n".join(lines)


def _fast_paths(model: nn.Module, adapted: tuple[str, ...]) -> list[str]:
    """A line for the modules whose inference path ignores their adapters, and one for those where it is off."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        alike = re.sub(_NUMBER, "*", path)
        inside = tuple(name for name in adapted if not path or name.startswith(f"{path}."))
        if KEPT in vars(module) and isinstance(module, nn.TransformerEncoderLayer):
            found[alike, "its inference path, which reads weights and calls no adapter, is off"].append(path)
        elif inside and is_off(module) is False:
            found[alike, "in eval mode its inference path ignores adapters; accelerate switches it off"].append(path)
    return [f"{_together(paths) or type(model).__name__}: {line}" for (_, line), paths in found.items()]


def _foreign(module: nn.Module) -> Columns | None:
    """The columns of another library's LoRA layer; of one of PEFT's also where no integration is loaded."""
    for describe in DESCRIBERS:
        columns = describe(module)
        if columns is not None:
            return columns
    if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
        return "-", "-", "-", "PEFT's own forward: lora_kernels.accelerate was not called"
    return None


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


_NUMBER = r"(?<![^.])\d+(?![^.])"  # a whole segment of a path


def _together(paths: list[str]) -> str:
    """One name for paths that differ in numbers only: "layer.0-3,5.query"; "*" where more than one number varies."""
    numbers = [
        sorted(set(column)) for column in zip(*(map(int, re.findall(_NUMBER, path)) for path in paths), strict=True)
    ]
    one_varies = sum(len(column) > 1 for column in numbers) <= 1
    columns = iter(numbers)

    def spell(_: re.Match[str]) -> str:
        column = next(columns)
        if len(column) > 1 and not one_varies:
            return "*"
        starts = [n for n in column if n - 1 not in column]
        ends = [n for n in column if n + 1 not in column]
        return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))

    return re.sub(_NUMBER, spell, paths[0])


def _columns(module: nn.Module, why_not: str, tokens: int, chip: Chip | None) -> tuple[str, str, str, str]:
    if not isinstance(module, LoRALinear):
        weight = getattr(module, "weight", None)
        return "x".join(map(str, getattr(weight, "shape", "?"))), "-", "-", f"not replaced: {why_not}"
    shape = f"{module.out_features}x{module.in_features}"
    try:
        runs = "merged: one GEMM" if module.merged else _phrase(module, tokens, chip)
    except BackendUnavailableError as error:
        runs = f"cannot run: {error}"
    return shape, str(module.r), f"{module.scaling:g}", f"DoRA: {runs}" if module.use_dora else runs


def _kind(module: LoRALinear, chip: Chip | None) -> tuple[str, str | None]:
    """The backend that runs the layer here, or would on ``chip``, and the plan named for it."""
    dtype = module.weight.dtype
    if chip is None:
        return split_name(resolve_backend(module.backend, module.weight.device.type, dtype))
    kind, forced = split_name(requested_backend(module.backend))
    return ("triton" if kind == "auto" and dtype in TRITON_DTYPES else kind), forced


def _problem(module: LoRALinear, op: str, tokens: int) -> CallShape:
    """A training call of the layer; the mask is kept as bits, the layer's default."""
    N, K, dropout = module.out_features, module.in_features, module.lora_dropout > 0
    return CallShape(op, tokens, N, K, module.r, module.weight.dtype, dropout, op == "fwd" and module.bias is not None)


def _phrase(module: LoRALinear, tokens: int, chip: Chip | None) -> str:
    """Describe a layer in one phrase: its backend, and on Triton the forward and backward plan at ``tokens`` rows."""
    kind, forced = _kind(module, chip)
    if kind != "triton":
        return "reference"
    on = chip or chip_for(module.weight.device)
    fwd, bwd = (choose(_problem(module, op, tokens), on, forced).name for op in ("fwd", "bwd"))
    return f"triton ({fwd} / {bwd} at {tokens} tokens)"


def _plans(module: LoRALinear, tokens: int, chip: Chip | None) -> str:
    """List every plan of the layer for forward and backward: its cost or the reason for refusal, and which one runs."""
    kind, forced = _kind(module, chip)
    if module.merged:
        return "merged: one GEMM runs, no plan"
    if kind != "triton":
        return "reference: PyTorch operations run, no plan is chosen; chip='sm_90' tells what a GPU would run"
    on, lines = chip or chip_for(module.weight.device), list[str]()
    for op, title in (("fwd", "forward"), ("bwd", "backward")):
        q = _problem(module, op, tokens)
        where = f"{on.arch} ({on.name})" if on.name else on.arch
        extras = ", bias" * q.bias + ", dropout" * q.dropout
        lines.append(f"\n{title}: M={q.M} N={q.N} K={q.K} r={q.r} {str(q.dtype)[6:]}{extras} on {where}")
        try:
            chosen = choose(q, on, forced)
        except BackendUnavailableError as error:
            lines.append(f"cannot run: {error}")
            chosen = None
        rows = [["", "plan", "predicted us", "measured us", "MB", "launches", "why"]]
        rows += [_plan_row(plan, chosen) for plan in candidates(q, on)]
        lines += _aligned(rows)
    return "\n".join(lines)


def _plan_row(plan: Plan, chosen: Plan | None) -> list[str]:
    if plan.refused:
        return ["", plan.name, "-", "-", "-", "-", f"refused: {plan.refused}"]
    note = "only if named: not measured on this GPU" if plan.opt_in and plan.measured is None else ""
    runs = chosen is not None and plan.name == chosen.name
    if chosen is not None and runs:
        note = f"runs: {chosen.why}"
    if plan.tiles is not None:
        note += f"; tiles {plan.tiles}"
    measured = "-" if plan.measured is None else f"{plan.measured * 1e6:.1f}"
    kernels = " + ".join(launch.kernel for launch in plan.launches)
    cost = [f"{plan.seconds * 1e6:.1f}", measured, f"{plan.bytes / 1e6:.1f}"]
    return [">" if runs else "", plan.name, *cost, kernels, note.removeprefix("; ")]
