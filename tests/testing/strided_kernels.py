"""Run by test_compile_matrix.py in a process of its own: every plan on tensors of any strides, compiled and linted.

The shipped cases are contiguous, so their innermost strides are constants; here each stride is a run-time argument and
a product with it that isn't widened to 64 bits first shows.
"""

import json
import sys

import torch

from lora_kernels.check.compile.dry_gpu import DryGPU
from lora_kernels.check.compile.ttir_lint import narrow_offsets
from lora_kernels.kernels.chip import CHIPS
from lora_kernels.kernels.linear import launchers
from lora_kernels.reference import packed_width
from lora_kernels.testing import make_problem

if __name__ == "__main__":
    found: dict[str, list[str]] = {}
    for p in (0.0, 0.1):
        problem = make_problem(17, 37, 41, 17, torch.bfloat16, dropout_p=p, adapter_dtype=torch.float32, strided=True)
        X, W, A, B, dY = problem.X, problem.W, problem.A, problem.B, problem.dY
        bits = torch.empty(17, packed_width(41), dtype=torch.uint8)
        with DryGPU(CHIPS["sm_80"]) as gpu:
            for plan in ("eager", "shrink_extend", "one_pass", *(() if p else ("ptr_one_launch",))):
                for kept in (None, bits) if p else (None,):
                    drop = launchers.Dropout(p, problem.seed, kept) if p else None
                    _, XA = launchers.lora_linear_fwd(X, W, A, B, problem.bias, 2.0, drop, plan, gpu.chip)
                    if plan in ("eager", "shrink_extend"):
                        launchers.lora_linear_bwd(dY, X, W, A, B, XA, 2.0, drop, (True,) * 4, plan, gpu.chip)
        for kernel in gpu.kernels:
            found.setdefault(kernel.name, []).extend(narrow_offsets(kernel.ir))
    json.dump(found, sys.stdout)
