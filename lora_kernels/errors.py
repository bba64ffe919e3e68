"""The exception family. Every message says what was given, what is accepted, and what to do."""


class LoRAKernelsError(Exception):
    """Base class of everything this package raises on purpose."""


class BackendUnavailableError(LoRAKernelsError, RuntimeError):
    """A backend or plan was asked for by name and cannot run here; the message gives the reason."""


class ShapeError(LoRAKernelsError, ValueError):
    """Tensors whose shapes, dtypes or devices do not fit together."""


class FrozenWeightError(LoRAKernelsError, ValueError):
    """A base weight that requires a gradient: these layers train the adapter, not W."""


class ConfigError(LoRAKernelsError, ValueError):
    """A configuration that cannot be carried out as written."""


class AdapterFormatError(LoRAKernelsError, ValueError):
    """An adapter file that was refused; the model is as it was before."""


class MergeError(LoRAKernelsError, RuntimeError):
    """A merge or unmerge that would lose information."""
