"""Bugs planted into a copy of the stacked kernels; each must turn the checks red. The copy without a bug stays green."""
# ruff: noqa: E501  (a bug is a line of source)

import pytest
import torch

from lora_kernels.kernels.chip import CHIPS
from lora_kernels.reference import packed_width, philox_keep_mask
from lora_kernels.testing import assert_close, poison
from lora_kernels.testing.stacked import make_mlp, make_stacked, plain_mlp, plain_stacked, truth_mlp, truth_stacked

MODULES = ("stacked.launchers", "mlp.lora_mlp", "mlp.swiglu")

# (what, file, text, replacement)
BUGS = [
    ("every tile takes the first projection's B", "stacked/lora_linear_stacked.py", "_pick(B_ptrs, which)", "B_ptrs[0]"),
    ("XA's columns are the first projection's", "stacked/lora_linear_stacked.py", "XA_ptr + _pick(rank_starts, which)", "XA_ptr + rank_starts[0] * which"),
    ("a tile counts from the first projection", "stacked/lora_linear_stacked.py", "(tile - first) * BLOCK_N", "(tile - first + (which == 2).to(tl.int32)) * BLOCK_N"),
    ("a bias is read where there is none", "stacked/lora_linear_stacked.py", "offs_n < _pick(bias_Ns, which)", "mask_n"),
    ("the wrong width masks a tile", "stacked/lora_linear_stacked.py", "N = _pick(Ns, which)", "N = Ns[0]"),
    ("dX forgets a projection", "stacked/lora_linear_stacked.py", "for p in tl.static_range(len(Ns)):", "for p in tl.static_range(len(Ns) - 1):"),
    ("dX forgets the mask", "stacked/lora_linear_stacked.py", "acc = tl.where(keep, acc * factor, 0.0)", "acc = acc * factor"),
    ("the mask covers the frozen weights too", "stacked/lora_linear_stacked.py", "    dx_ptrs = dX_ptr +", "    acc = tl.where(keep, acc, 0.0) if DROPOUT else acc\n    dx_ptrs = dX_ptr +"),
    ("dA misses the last rank", "stacked/lora_linear_stacked.py", "mask_r = offs_r < R", "mask_r = offs_r < R - 1"),
    ("all ranks take the first scaling", "linear/shrink.py", "later_factors[p], factors)", "factor, factors)"),
    ("a scaling begins one rank late", "linear/shrink.py", "offs_r >= later_ranks[p]", "offs_r > later_ranks[p]"),
    ("dYB takes one scaling", "stacked/launchers.py", "dyb_db(dy, b, xa, s, split,", "dyb_db(dy, b, xa, scaling[0], split,"),
    ("eager forgets a projection's product", "stacked/launchers.py", "zip(dY[1:], W[1:], strict=True)", "zip(dY[2:], W[2:], strict=True)"),
    ("parts of one product are misplaced", "stacked/launchers.py", "starts = [sum(Ns[:p]) for p in", "starts = [sum(Ns[:p]) // 2 for p in"),
    ("sig' is forgotten", "mlp/swiglu.py", "(1 + g * (1 - s))", "1.0"),
    ("dG and dU change places", "mlp/swiglu.py", "dG, dU, dH if make_h else None", "dU, dG, dH if make_h else None"),
    ("H comes without U", "mlp/swiglu.py", "(g * s * u).to(dtype)", "(g * s).to(dtype)"),
    ("down's dA takes X's mask", "mlp/lora_mlp.py", "da_of(dYB, H, drop_h,", "da_of(dYB, H, drop_x,"),
    ("dH forgets the low-rank term", "mlp/lora_mlp.py", "dx_of([dY], W[2:], dYB,", "dx_of([dY], W[2:], dYB * 0,"),
]  # fmt: skip


def operands(problems):
    return [list(values) for values in zip(*((q.W, q.A, q.B, q.bias, q.scaling) for q in problems), strict=True)]


def bits_of(launchers, seed, p, M, K):
    return launchers.Dropout(p, seed, torch.empty(M, packed_width(K), dtype=torch.uint8, device=seed.device))


def judge_stacked(modules, device):
    """Three projections by both plans, with dropout, ranks, widths and scalings of their own."""
    launchers, chip, p = modules[0], CHIPS["sm_90"], 0.25
    problems = make_stacked(
        33, 40, (70, 20, 41), (4, 5, 3), torch.float32, device, dropout_p=p, adjacent=True, scalings=(1.7, 0.4, 2.9)
    )
    X, seed, (W, A, B, bias, scaling) = problems[0].X, problems[0].seed, operands(problems)
    keep = philox_keep_mask(seed, p, 33, 40)
    expected, true = plain_stacked(problems, keep), truth_stacked(problems, keep)
    for plan in ("eager", "shrink_extend"):
        drop = bits_of(launchers, seed, p, 33, 40)
        W_all = W[0].as_strided((131, 40), (40, 1))
        with poison():
            Y, XA = launchers.lora_linear_stacked_fwd(X, W, A, B, bias, scaling, drop, plan, chip, W_all)
            needs = True, True, [True] * 3, [b is not None for b in bias]
            args = X, W, A, B, XA.split([4, 5, 3], 1), scaling, drop, *needs, plan, chip
            dX, dA, dB, dbias = launchers.lora_linear_stacked_bwd([q.dY for q in problems], *args)
        got = {"dX": dX}
        for i, values in enumerate(zip(Y, dA.split([4, 5, 3]), dB, dbias, strict=True)):
            got |= {f"{name}{i}": value for name, value in zip(("Y", "dA", "dB", "dbias"), values, strict=True)}
        for name, value in true.items():
            assert_close(got[name], expected[name], value, what=f"{plan} {name}")


def judge_mlp(modules, device):
    """A block by one plan, with dropout, ranks and scalings of their own."""
    (launchers, mlp, activation), chip, p = modules, CHIPS["sm_90"], 0.25
    problems = make_mlp(17, 24, 36, 20, (4, 5, 3), torch.float32, device, dropout_p=p)
    X, seed, (W, A, B, bias, scaling) = problems[0].X, problems[0].seed, operands(problems)
    keep, keep_h = philox_keep_mask(seed, p, 17, 24), philox_keep_mask(seed + 1, p, 17, 36)
    drop, drop_h = bits_of(launchers, seed, p, 17, 24), bits_of(launchers, seed + 1, p, 17, 36)
    plan = "shrink_extend"
    with poison():
        first = [values[:2] for values in (W, A, B, bias, scaling)]
        last = [values[2:] for values in (W, A, B, bias, scaling)]
        (G, U), XA = launchers.lora_linear_stacked_fwd(X, *first, drop, plan, chip)
        (Y,), HA = launchers.lora_linear_stacked_fwd(activation.swiglu(G, U), *last, drop_h, plan, chip)
        needs = True, [True] * 3, [True] * 3, [b is not None for b in bias]
        args = X, G, U, W, A, B, XA.split([4, 5], 1), HA, scaling, drop, drop_h, *needs, (plan, plan), chip
        dX, dA, dA_down, dB, dbias = mlp.lora_mlp_bwd(problems[2].dY, *args)
    got = {"Y": Y, "dX": dX}
    for i, values in enumerate(zip((*dA.split([4, 5]), dA_down), dB, dbias, strict=True)):
        got |= {f"{name}{i}": value for name, value in zip(("dA", "dB", "dbias"), values, strict=True)}
    expected, true = plain_mlp(problems, keep, keep_h), truth_mlp(problems, keep, keep_h)
    for name, value in true.items():
        assert_close(got[name], expected[name], value, what=f"block {name}")


def test_the_copy_itself_is_right(kernels_with, device):
    modules = kernels_with(MODULES)
    judge_stacked(modules, device)
    judge_mlp(modules, device)


@pytest.mark.sampled(8)
@pytest.mark.parametrize(("what", "file", "text", "replacement"), BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_caught(what, file, text, replacement, kernels_with, device):
    modules = kernels_with(MODULES, file, text, replacement)
    with pytest.raises(Exception, match=r"plain PyTorch's|out of bounds|out-of-bounds|not finite|setStorage"):
        (judge_mlp if file in ("mlp/swiglu.py", "mlp/lora_mlp.py") else judge_stacked)(modules, device)
