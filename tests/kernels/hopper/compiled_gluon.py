"""Compiles the Gluon kernels for sm_90 and prints as JSON what the compiler made of their ring, by kernel and rank.

descriptors: (bytes of swizzle, leading offset, stride offset, offset of the start) of every wgmma operand in shared
memory. events: stores to shared memory, fences, barriers, products and copies, in the order of the code.
"""

import json
import re
from functools import partial
from pathlib import Path

import torch

from lora_kernels.check.compile.dry_gpu import DryGPU
from lora_kernels.kernels.chip import CHIPS
from lora_kernels.kernels.common import Dropout
from lora_kernels.kernels.hopper.gluon import gluon_extend, gluon_one_launch
from lora_kernels.kernels.hopper.gluon_bwd import gluon_dx
from lora_kernels.kernels.hopper.gluon_tiles import gluon_config

M, N, K = 8192, 4096, 4096
SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}
EVENTS = {
    "store": r"\tst\.shared\.v4|stmatrix\.sync",
    "fence": r"fence\.proxy\.async",
    "barrier": r"bar\.sync|bar\.warp\.sync",
    "product": r"wgmma\.mma_async",
    "copy": r"cp\.async\.bulk\.tensor\S*global\.shared",
    "expect": r"mbarrier\.arrive\.expect_tx",
}


def descriptors(llir: str) -> list[tuple[int, int, int, int]]:
    """The constant halves of the operand descriptors; the address is added to them."""
    found = set()
    for constant in re.findall(r"(?:or disjoint|add nuw nsw|add nsw|add) i64 %\d+, (-?\d{15,})", llir):
        bits = int(constant) & (2**64 - 1)
        leading, stride, start = (16 * (bits >> shift & 0x3FFF) for shift in (16, 32, 0))
        found.add((SWIZZLES[bits >> 62], leading, stride, start))
    return sorted(found)


def events(ptx: str) -> list[str]:
    """What happens to shared memory, in the order of the code; repetitions once."""
    pattern = "|".join(f"(?P<{name}>{regex})" for name, regex in EVENTS.items())
    names = [match.lastgroup or "" for match in re.finditer(pattern, ptx)]
    return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


def main() -> None:
    """Prints {"kernel rank": {"descriptors": [...], "events": [...]}}."""
    chip, told = CHIPS["sm_90"], {}
    for r in (16, 32, 64):
        config = gluon_config(M, N, r, torch.bfloat16, chip)
        sizes = ((M, K), (N, K), (M, r), (N, r), (r, K), (M, N))
        X, W, XA, B, A, dY = (torch.empty(size, dtype=torch.bfloat16) for size in sizes)
        bits = torch.empty(M, 16 * -(-K // 128), dtype=torch.uint8)
        drop = Dropout(0.1, torch.empty(2, dtype=torch.int64), bits)
        for name, launch in (
            ("gluon_extend", partial(gluon_extend, X, W, XA, B, None, config, chip.units)),
            ("gluon_one_launch", partial(gluon_one_launch, X, W, A, B, None, 2.0, config, chip.units)),
            ("gluon_dx", partial(gluon_dx, dY, W, XA, A, X, drop, config, chip.units)),
        ):
            with DryGPU(chip) as gpu:
                launch()
                first = next(iter(gpu._launched))
            files: dict[str, Path] = gpu._builds[first].files
            told[f"{name} {r}"] = {
                "descriptors": descriptors(files["llir"].read_text()),
                "events": events(files["ptx"].read_text()),
            }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
