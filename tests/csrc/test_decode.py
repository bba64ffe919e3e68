"""The text of decode.cuh run on a CPU by emu.h, under ASan, and bugs planted in it that must be seen."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HEADERS = HERE.parent.parent / "csrc" / "include" / "lora_kernels"
ASAN = ("-fsanitize=address",)


def build(folder: Path, headers: Path, *options: str) -> Path:
    program = folder / "decode_emu_test"
    command = ["g++", "-std=c++20", *options, f"-I{headers.parent}", f"-I{HERE}", str(HERE / "decode_emu_test.cpp")]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program


def run(program: Path, *arguments: object, timeout: int = 900) -> subprocess.CompletedProcess:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
def test_edges_and_drawn_batches_are_right(tmp_path):
    program = build(tmp_path, HEADERS, "-O0", *ASAN)
    done = run(program, 1, 0)
    assert done.returncode == 0, done.stderr
    assert "11 batches are right" in done.stdout


@pytest.mark.slow
def test_many_drawn_batches_are_right(tmp_path):
    program = build(tmp_path, HEADERS, "-O1", *ASAN)
    done = run(program, 2, 30, 0)
    assert done.returncode == 0, done.stderr
    assert "30 batches are right" in done.stdout


# name: (file, what stands there, what the bug puts there, whether only ASan can see it)
BUGS = {
    "released before the block has met": (
        "decode.cuh",
        "int count) {\n    sync();\n",
        "int count) {\n",
        (),
    ),
    "wrong parity": ("decode_ring.cuh", "i / args.stages & 1", "~(i / args.stages) & 1", ()),
    "counter not reset": ("decode.cuh", "if (mix.found) gpu::reset(counter);", "", ()),
    "columns past K": ("decode.cuh", "const bool inside = k0 + column < args.K;", "const bool inside = true;", ()),
    "scaling forgotten": ("decode.cuh", "const float scaling = mix.scaling[leader];", "const float scaling = 1;", ()),
    "ranks of the next adapter": ("decode.cuh", "if (r + i >= rank || n0", "if (rank == 0 || n0", ()),
    "another adapter's NaN": ("decode.cuh", "+ token] == leader;", "+ token] >= 0;", ()),
    "XA not waited for": ("decode.cuh", "if (!waited) wait_for_xa();", "", ()),
    "ready not reset": ("decode.cuh", "      gpu::reset(args.counters + READY);\n", "", ()),
    "a copy too few waited for": (
        "decode_ring.cuh",
        "wait_copies(args.stages - 2)",
        "wait_copies(args.stages - 1)",
        (),
    ),
    "stage filled while it is read": (
        "decode_ring.cuh",
        "    gpu::sync_block<THREADS>(1);\n",
        "",
        (),
    ),
    "stage freed before it is read": (
        "decode.cuh",
        "accumulate(d, stage, step * BLOCK_K);\n        ring.release(i);",
        "ring.release(i);\n        accumulate(d, stage, step * BLOCK_K);",
        (),
    ),
    "start before A": ("decode.cuh", "        if (start < 0) start = 0, rank = 0;\n", "", ASAN),
    "rank past the end of A": ("decode.cuh", "        if (rank > args.R - start) rank = args.R - start;\n", "", ASAN),
    "rank beyond the largest": ("decode.cuh", "        if (rank > args.max_rank) rank = args.max_rank;\n", "", ASAN),
    "id past the last slot": ("decode.cuh", "id >= 0 && id < args.L", "id >= 0", ASAN),
    "sums overwritten": ("decode.cuh", "      sync();  // the sums may be overwritten\n", "", ()),
    "published words through L1": (
        "decode.cuh",
        "gpu::load_published(plane(block, tile)",
        "gpu::load_cached(plane(block, tile)",
        (),
    ),
    "an adapter twice in eight tokens": ("decode.cuh", "first = first && mix", "first = first || mix", ()),
    "rows past N": ("decode.cuh", "if (n0 + e < args.N) Y[e]", "Y[e]", ASAN),
    "tokens past M": ("decode.cuh", "      if (m >= args.M) continue;\n      uint16_t* Y", "      uint16_t* Y", ASAN),
    "planes in no fixed place": ("decode.cuh", "deal.tile(block) != tile;", "false;", ()),
}
QUICK = ("wrong parity",)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in BUGS])
def test_a_planted_bug_is_seen(name, tmp_path):
    file, right, wrong, options = BUGS[name]
    headers = tmp_path / "lora_kernels"
    shutil.copytree(HEADERS, headers)
    text = (headers / file).read_text()
    assert text.count(right) == 1, f"{right!r} stands {text.count(right)} times in {file}"
    (headers / file).write_text(text.replace(right, wrong))
    program = build(tmp_path, headers, "-O0", "-DEMU_SMALL", *options)
    done = run(program, 1, 12)
    assert done.returncode != 0, "nobody saw it"
    assert "fault" in done.stderr or "AddressSanitizer" in done.stderr, done.stderr
