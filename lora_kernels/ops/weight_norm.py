"""lora_kernels::weight_norm: the row norms of W + s B A, and a cache that detects changes of W, A and B."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lora_kernels.reference import composition
from lora_kernels.reference import weight_norm as norms
from lora_kernels.reference.transforms import derived

_SCHEMA = "weight_norm(Tensor W, Tensor A, Tensor B, float scaling) -> Tensor"


def weight_norm(W: Tensor, A: Tensor, B: Tensor, scaling: float, W_sq: Tensor | None = None) -> Tensor:
    """Norms (N,), float32 or float64, of the rows of W (N, K) + scaling * B (N, r) A (r, K). No gradient passes.

    On a CPU from factored terms (``W_sq``: the squared norms of W's rows, if known). On other devices by blocks of
    rows, since the check for cancellation would synchronize with the device.
    """
    if derived():
        return composition.weight_norm(W, A, B, scaling)
    if torch.compiler.is_compiling():
        return torch.ops.lora_kernels.weight_norm(W.detach(), A.detach(), B.detach(), scaling)
    device_type = W.device.type
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    with torch.no_grad(), torch.autocast(device_type, enabled=False) if autocast else nullcontext():
        if device_type == "cpu":
            return norms.weight_norm(W, A, B, scaling, W_sq)
        return norms.weight_norm_direct(W, A, B, scaling)


class NormCache:
    """Cache of the norms of one adapter over one weight, valid while W, A, B and scaling do not change.

    A version counter does not detect writes through ``.data`` or a pointer (merging in PEFT, hotswapping, optimizers
    of bitsandbytes, sharded training). So on a CPU all of A and B is compared with copies, and of W its storage, its
    version and one element of each row. On other devices a comparison would synchronize with the device: nothing is
    kept unless the caller passes ``trust``.

    Copies and pickles of a cache are empty.
    """

    __slots__ = ("_adapter", "_base")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop the cached norms."""
        self._base: tuple[Any, ...] | None = None  # replaced as a whole: threads may share a layer
        self._adapter: tuple[Any, ...] | None = None

    def norm(self, W: Tensor, A: Tensor, B: Tensor, scaling: float, trust: bool = False) -> Tensor:
        """weight_norm(W, A, B, scaling); treat it as read-only.

        ``trust``: between calls W, A and B change only by PyTorch's own operators on these same tensor objects.
        """
        if torch.compiler.is_compiling() or derived():  # tensors of a transform must not outlive it
            return weight_norm(W, A, B, scaling)
        if W.device.type == "cpu":
            return self._compared(W, A, B, scaling)
        if not trust or _has_no_version(W, A, B) or _capturing(W):
            self.clear()
            return weight_norm(W, A, B, scaling)
        key = (_identity(W), _identity(A), _identity(B), scaling)
        held = self._adapter
        if held is not None and held[0] == key:
            norm: Tensor = held[2]
            return norm
        norm = _lasting(W, A, B, scaling)
        self._adapter = key, tuple(map(_pin, (W, A, B))), norm
        return norm

    def _compared(self, W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        base, identity, probe = self._base, _identity(W), _probe(W)
        if base is None or base[0] != identity or not torch.equal(base[2], probe):
            with torch.inference_mode(False), torch.no_grad():
                base = identity, _pin(W), probe, norms.base_norm_sq(W)
            self._base = base
        held = self._adapter
        if held is not None and held[0] is base and held[1] == scaling and _equal(A, held[2]) and _equal(B, held[3]):
            norm: Tensor = held[4]
            return norm
        norm = _lasting(W, A, B, scaling, base[3])
        with torch.inference_mode(False):
            self._adapter = base, scaling, A.detach().clone(), B.detach().clone(), norm
        return norm

    def __reduce__(self) -> tuple[Any, ...]:
        return NormCache, ()


def _lasting(W: Tensor, A: Tensor, B: Tensor, scaling: float, W_sq: Tensor | None = None) -> Tensor:
    """weight_norm as a tensor that a backward may save, even if it is first computed in inference mode."""
    with torch.inference_mode(False):
        return weight_norm(W, A, B, scaling, W_sq)


def _has_no_version(*tensors: Tensor) -> bool:
    return any(t.is_inference() for t in tensors)


def _capturing(T: Tensor) -> bool:
    """Whether a CUDA graph is being captured: its replays would use cached norms after a change."""
    return T.is_cuda and torch.cuda.is_current_stream_capturing()


def _identity(T: Tensor) -> tuple[Any, ...]:
    """Key that identifies T while _pin(T) exists: storage, address, version counter, shape, strides, dtype."""
    version = 0 if T.is_inference() else T._version
    return T.untyped_storage()._cdata, T.data_ptr(), version, T.shape, T.stride(), T.dtype


def _pin(T: Tensor) -> StorageWeakRef:
    """A weak reference by which the identity of T's storage is not reused; it does not keep the memory."""
    return StorageWeakRef(T.untyped_storage())


def _probe(W: Tensor) -> Tensor:
    """One element of every row of W (N, K), (N, 1): row i gives column i mod K."""
    N, K = W.shape
    return W.gather(1, torch.arange(N, device=W.device).remainder_(K)[:, None])


def _equal(T: Tensor, kept: Tensor) -> bool:
    return T.dtype == kept.dtype and T.device == kept.device and torch.equal(T, kept)


def _impl(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return weight_norm(W, A, B, scaling)


def _fake(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return W.new_empty(W.shape[0], dtype=norms.wide(W, A, B))


_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define(_SCHEMA)
_library.impl("weight_norm", _impl, "CompositeExplicitAutograd")
torch.library.register_fake("lora_kernels::weight_norm", _fake, lib=_library)
