"""How many blocks of a kernel fit a multiprocessor at once, and which resource ends it."""

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor (compute unit) has: bytes of shared memory, resident warps and blocks, registers.

    ``registers``: of one scheduler, divided by the lanes of a warp, handed out in multiples of ``step``. ``reserved``:
    bytes of shared memory that every block costs besides its own. ``tensor``: columns of tensor memory.
    """

    shared: int
    warps: int
    blocks: int
    registers: int = 512
    step: int = 8
    schedulers: int = 4
    reserved: int = KIB
    tensor: int = 512


# CUDA programming guide, technical specifications per compute capability; LLVM's AMDGPU backend for gfx942
LIMITS = {
    "sm_80": Limits(164 * KIB, 64, 32),
    "sm_86": Limits(100 * KIB, 48, 16),
    "sm_89": Limits(100 * KIB, 48, 24),
    "sm_90": Limits(228 * KIB, 64, 32),
    "sm_100": Limits(228 * KIB, 64, 32),
    "sm_120": Limits(100 * KIB, 48, 24),
    "gfx942": Limits(64 * KIB, 32, 16, reserved=0),
}


@dataclass(frozen=True)
class Occupancy:
    """Blocks and warps resident on one multiprocessor; ``limit``: the resource that admits no block more."""

    blocks: int
    warps: int
    limit: str


def occupancy(arch: str, registers: int, shared: int, warps: int, tensor: int = 0) -> Occupancy:
    """Of a kernel with ``registers`` a thread and ``shared`` bytes, ``warps`` and ``tensor`` columns a block.

    Of resources exhausted at once the first is named: registers, shared memory, tensor memory, warps, blocks. 0 blocks:
    one alone does not fit.
    """
    has = LIMITS[arch]
    each = -(-max(registers, 1) // has.step) * has.step
    admits = {
        "registers": has.registers // each * has.schedulers // warps,
        "shared": has.shared // (shared + has.reserved) if shared + has.reserved else has.blocks,
        **({"tensor": has.tensor // tensor} if tensor else {}),
        "warps": has.warps // warps,
        "blocks": has.blocks,
    }
    limit = min(admits, key=lambda name: admits[name])
    return Occupancy(admits[limit], admits[limit] * warps, limit)
