"""The C++ of a mixed batch's update on a CPU, by itself under ASan, and bugs planted in it that must be seen."""

import functools
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
INSTRUCTIONS = {
    "update_avx2": ("-mavx2", "-mfma"),
    "update_avx512": (*AVX512, "-mfma"),
    "update_avx512bf16": (*AVX512, "-mavx512bf16", "-mfma"),
}
SOURCES = ["multi_lora_update", "update_plain"]
if platform.machine() in ("x86_64", "AMD64"):
    SOURCES += list(INSTRUCTIONS)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(csrc, *options): the test program of the sources in ``csrc``. What no bug changes is compiled once."""

    @functools.cache
    def compiled(source: Path, options: tuple[str, ...]) -> Path:
        made = tmp_path_factory.mktemp("object") / f"{source.stem}.o"
        command = ["g++", "-std=c++20", "-ffp-contract=fast", *options, *INSTRUCTIONS.get(source.stem, ())]
        subprocess.run(
            [*command, f"-I{source.parents[0]}/include", f"-I{CSRC}/include", "-c", source, "-o", made], check=True
        )
        return made

    def program(csrc: Path, *options: str) -> Path:
        files = {path.relative_to(csrc) for path in csrc.rglob("*") if path.is_file()}
        changed = {file for file in files if (csrc / file).read_bytes() != (CSRC / file).read_bytes()}
        headers = any(file.suffix != ".cpp" for file in changed)
        names = [Path(f"{name}.cpp") for name in SOURCES]
        sources = [(csrc if headers or name in changed else CSRC) / name for name in names]
        objects = [compiled(source, options) for source in (*sources, HERE / "update_test.cpp")]
        linked = tmp_path_factory.mktemp("program") / "update_test"
        subprocess.run(["g++", *options, *objects, "-o", linked], check=True)
        return linked

    return program


def run(program: Path, seed: int, cases: int) -> subprocess.CompletedProcess:
    return subprocess.run([program, str(seed), str(cases)], capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_drawn_batches_are_right(build):
    done = run(build(CSRC, "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover"), 1, 60)
    assert done.returncode == 0, done.stderr
    assert "batches are right" in done.stdout


@pytest.mark.slow
def test_many_drawn_batches_are_right(build):
    done = run(build(CSRC, "-O3"), 2, 1000)
    assert done.returncode == 0, done.stderr


BUGS = {
    "scaling forgotten": ("update.h", "= scaling * total", "= total"),
    "columns past K left out": (
        "update.h",
        "for (int64_t t = k; t < K; ++t) total",
        "for (int64_t t = K; t < K; ++t) total",
    ),
    "Y overwritten": ("update.h", "T::store(to, T::load(to) + sums[i][v])", "T::store(to, sums[i][v])"),
    "Y overwritten at the edge": ("update.h", "T::rounded(T::one(to[e]) + sums", "T::rounded(sums"),
    "columns past N": ("update.h", "if (left >= W) {", "if (true) {"),
    "more columns packed": ("update.h", "const int columns = end - begin;", "const int columns = COLUMNS;"),
    "truncated": ("update.h", "(u + 0x7fff + (u >> 16 & 1)) >> 16, quiet", "u >> 16, quiet"),
    "first rank twice": ("update.h", "A + j * args.stride_ar, args.stride_ar", "A, args.stride_ar"),
    "B by rank as if by column": ("update.h", "if (args.stride_bn == 1) {", "if (true) {"),
    "Y of the neighbour": ("update.h", "y[each] += VECTORS * W;", "y[each] += W;"),
    "start before A": ("multi_lora_update.cpp", "return first < 0 ? 0 :", "return first < -9 ? 0 :"),
    "rank past the end of A": ("multi_lora_update.cpp", "args.max_rank, args.R - first}", "args.max_rank}"),
    "id past the last slot": ("multi_lora_update.cpp", "args.ids[m] >= 0 && args.ids[m] < args.L", "args.ids[m] >= 0"),
    "no adapter is the last one": ("multi_lora_update.cpp", "args.ids[m] >= 0 &&", "args.ids[m] >= -1 &&"),
    "rows of one chunk alone": ("multi_lora_update.cpp", "done += CHUNK)", "done += rows)"),
    "XA of chunks overlaps": ("multi_lora_update.cpp", "plan.xa += part * r;", "plan.xa += part;"),
    "the last ranks left out": ("multi_lora_update.cpp", "j + RANK_PART))});", "j + RANK_PART - 1))});"),
    "sums of other rows": ("update.h", "Vec sums[ROWS][RANKS] = {};", "static Vec sums[ROWS][RANKS];"),
    "the narrowest scratch": ("multi_lora_update.cpp", "widest = std::max(widest,", "widest = std::min(RANK_PART,"),
}
QUICK = ("scaling forgotten",)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in BUGS])
def test_a_planted_bug_is_seen(name, build, tmp_path):
    file, right, wrong = BUGS[name]
    shutil.copytree(CSRC, tmp_path / "csrc")
    (path,) = (tmp_path / "csrc").rglob(file)
    text = path.read_text()
    assert text.count(right) == 1, f"{right!r} stands {text.count(right)} times in {file}"
    path.write_text(text.replace(right, wrong))
    done = run(build(tmp_path / "csrc", "-O1", "-fsanitize=address"), 1, 60)
    assert done.returncode != 0, "nobody saw it"
    assert "fault" in done.stderr or "AddressSanitizer" in done.stderr, done.stderr
