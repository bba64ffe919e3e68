"""The exceptions. Every message says what was given, what is accepted, and what to do."""


class LoRAKernelsError(Exception):
    """Base class of everything this package raises on purpose."""


class BackendUnavailableError(LoRAKernelsError, RuntimeError):
    """A backend or plan was named and cannot run on this machine; the message gives the reason."""


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


class AdapterPoolError(LoRAKernelsError, RuntimeError):
    """Something that an AdapterPool cannot do; it is as it was before."""


class PoolFullError(AdapterPoolError):
    """The pool has no room for another adapter, and no adapter may be evicted."""


class AdapterBusyError(AdapterPoolError):
    """An adapter that a running batch uses, and that therefore cannot be replaced or removed now."""


class UnknownAdapterError(AdapterPoolError, LookupError):
    """A name that the pool has no adapter for."""


class UnservableAdapterError(AdapterPoolError, ValueError):
    """A valid adapter that this pool cannot serve: another kind, other modules, too large a rank."""


class UnknownRowsError(AdapterPoolError, ShapeError):
    """No probe has shown to which request of a batch the rows of a layer's input belong."""
