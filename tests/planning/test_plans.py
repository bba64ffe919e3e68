"""The table of plans: launches by composition, refusals with reasons."""

import dataclasses

import pytest
import torch

from lora_kernels.kernels.chip import CHIPS
from lora_kernels.kernels.tiles import GemmConfig
from lora_kernels.planning import plans as variants
from lora_kernels.planning.cost import KERNELS, CallShape

H100 = CHIPS["sm_90"]
FWD = CallShape("fwd", 8192, 4096, 4096, 16, torch.bfloat16)
BWD = dataclasses.replace(FWD, op="bwd")


def kernels(name, problem):
    return [launch.kernel for launch in variants.launches(name, problem)]


def test_every_kernel_of_ours_is_in_some_plan_and_every_plan_is_made_of_them():
    problems = [
        dataclasses.replace(FWD, op=op, dropout=dropout, r=r)
        for op in ("fwd", "bwd")
        for dropout in (False, True)
        for r in (16, 128)
    ]
    used = set()
    for variant in variants.VARIANTS:
        for q in problems:
            if q.op == "fwd" or variant.bwd is not None:
                made = variants.launches(variant.name, q)
                used |= {launch.kernel for launch in made if not launch.library}
                assert all(launch.flop >= 0 and launch.bytes > 0 for launch in made)
    assert used == set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_goes_by_its_name(name):
    launch = KERNELS[name](BWD)
    assert launch.kernel == name
    assert not launch.library


def test_compositions():
    assert kernels("gluon_extend", FWD) == ["shrink", "gluon_extend"]
    assert kernels("gluon_one_launch", FWD) == ["gluon_one_launch"]
    assert kernels("ptr_one_launch", FWD) == ["ptr_one_launch"]
    assert kernels("tma_extend", BWD) == ["dyb_db", "reduce", "tma_dx", "reduce"]
    assert kernels("gluon_extend", BWD) == ["dyb_db", "reduce", "gluon_dx", "reduce"]
    assert kernels("tma_extend", dataclasses.replace(BWD, need_dx=False)) == ["dyb_db", "reduce", "da", "reduce"]
    with pytest.raises(KeyError, match="one_launch has no bwd"):
        variants.launches("one_launch", BWD)


@pytest.mark.parametrize(
    ("problem", "arch", "plan", "why"),
    [
        (FWD, "sm_90", "gluon_extend", None),
        (FWD, "sm_100", "gluon_extend", "sm_90 alone has"),
        (FWD, "sm_80", "ptr_one_launch", None),
        (FWD, "gfx942", "ptr_one_launch", "no cp.async"),
        (dataclasses.replace(FWD, dropout=True), "sm_90", "one_launch", "mask is drawn by the shrink pass"),
        (dataclasses.replace(FWD, dropout=True), "sm_90", "gluon_one_launch", "mask is drawn by the shrink pass"),
        (dataclasses.replace(FWD, dropout=True), "sm_90", "ptr_one_launch", "mask is drawn by the shrink pass"),
        (dataclasses.replace(FWD, dropout=True), "sm_90", "tma_extend", None),
        (dataclasses.replace(FWD, r=128), "sm_90", "ptr_one_launch", "one tile of ranks"),
        (dataclasses.replace(FWD, r=128), "sm_90", "one_pass", "one tile of ranks"),
        (dataclasses.replace(FWD, K=4097), "sm_90", "tma_extend", "K=4097"),
        (dataclasses.replace(FWD, descriptors=False), "sm_90", "tma_extend", "do not lie in memory"),
        (dataclasses.replace(FWD, descriptors=False), "sm_90", "ptr_one_launch", None),
        (dataclasses.replace(BWD, dropout=True), "sm_90", "tma_extend", None),
        (dataclasses.replace(BWD, dropout=True, bits=False), "sm_90", "tma_extend", "reads dropout's mask as bits"),
        (dataclasses.replace(BWD, dropout=True, bits=False), "sm_90", "gluon_extend", "reads dropout's mask as bits"),
        (dataclasses.replace(BWD, dropout=True, bits=False, need_dx=False), "sm_90", "tma_extend", None),
    ],
)
def test_refusals(problem, arch, plan, why):
    variant = variants.BY_NAME[plan]
    direction = variant.fwd if problem.op == "fwd" else variant.bwd
    refused = direction.refused(problem, CHIPS[arch])
    assert (refused is None) if why is None else (refused is not None and why in refused)


def test_tiles_that_do_not_fit_are_refused():
    direction = variants.BY_NAME["shrink_extend"].fwd
    assert direction.refused(FWD, H100) is None
    assert "shared memory" in direction.refused(FWD, H100, GemmConfig(256, 256, 64, num_warps=8, num_stages=4))


def test_bits_cost_a_sixteenth_of_x():
    plain, kept = (dataclasses.replace(BWD, dropout=True, bits=bits) for bits in (False, True))
    more = KERNELS["dx_da"](kept).bytes - KERNELS["dx_da"](plain).bytes
    assert more == BWD.M * BWD.K // 8
    assert dataclasses.replace(kept, K=65).mask_bytes == BWD.M * 16
