"""What Triton's own IR (text) says of a kernel: its dots, its loops, and pointer offsets too narrow for large tensors.

ttir of kernels in Triton, ttgir of those in Gluon, which has no loops for a compiler to pipeline.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

_DOT = re.compile(
    r"(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b(?P<attributes>.*?) : "
    r"(?:tensor|!ttg\.memdesc)<(?P<M>\d+)x(?P<K>\d+)x(?P<dtype>\w+)[>,]"
)
_TILE = re.compile(r"tensor<((?:\d+x)+)(?:!tt\.ptr<)?b?[fi](\d+)>")
_VALUE = re.compile(r"%[\w#]+")
_DEFINITION = re.compile(r"\s*(%[\w#:]+)(?::\d+)? = \"?([\w.]+)(.*)")
_WIDENING = ("arith.extsi", "arith.extui")
_SAME_VALUE = (
    "tt.splat", "tt.broadcast", "tt.expand_dims", "arith.addi", "arith.muli", "arith.subi", "ttg.convert_layout",
)  # fmt: skip


@dataclass(frozen=True)
class Dot:
    """A tile product: M and K of its left operand, the operands' dtype, and whether it may use a matrix unit."""

    M: int
    K: int
    dtype: str
    on_matrix_unit: bool


def dots(ttir: str) -> list[Dot]:
    """The tile products; in fp32, only those with TF32 inputs are expected on a matrix unit."""
    return [
        Dot(int(m["M"]), int(m["K"]), m["dtype"], m["dtype"] not in ("f32", "f64") or "tf32" in m["attributes"])
        for m in _DOT.finditer(ttir)
    ]


@dataclass(frozen=True)
class DotLoop:
    """An innermost loop with a dot: its own num_stages, the bytes that one turn loads for dots by each kind of address.

    Loads by pointer count where every stride is known to be a multiple of 16: others cannot be copied asynchronously.
    """

    stages: int | None
    by_pointer: int
    by_descriptor: int


def dot_loops(ttir: str) -> list[DotLoop]:
    """The innermost loops that load tiles (16 bits an element or more) and multiply them."""
    strides = re.findall(r"%stride\w*: i32 (.*?)loc\(", ttir)
    aligned = all("tt.divisibility = 16" in attributes for attributes in strides)
    found = []
    for body, end in _innermost_loops(ttir):
        definitions = {}
        for line in body:
            if match := _DEFINITION.match(line):
                definitions[match[1]] = match[2], _VALUE.findall(match[3].split(" : ")[0]), line
        wanted = [value for op, operands, _ in definitions.values() if op == "tt.dot" for value in operands[:2]]
        loads: dict[str, str] = {}  # by the value it gives
        while wanted:
            value = wanted.pop()
            operation, operands, line = definitions.pop(value, ("", [], ""))
            if operation in ("tt.load", "tt.descriptor_load") and (tile := _TILE.search(line)) and int(tile[2]) >= 16:
                loads[value] = line
            else:
                wanted += operands
        by_pointer = sum(_tile_bytes(line) for line in loads.values() if aligned and "tt.load" in line)
        by_descriptor = sum(_tile_bytes(line) for line in loads.values() if "tt.descriptor_load" in line)
        if by_pointer or by_descriptor:
            stages = re.search(r"tt\.num_stages = (\d+)", end)
            found.append(DotLoop(int(stages[1]) if stages else None, by_pointer, by_descriptor))
    return found


def ring_bytes(ttgir: str) -> int:
    """Bytes of the tile buffers that a compiler's pipelining made, or a Gluon kernel: stages x rows x columns."""
    rings = re.findall(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x(\d+)x(\d+)xb?[fi](\d+),", ttgir)
    return sum(prod(map(int, ring)) // 8 for ring in rings)


def copies_by_descriptor(ir: str) -> bool:
    """Whether a kernel loads by descriptor, which is the TMA unit's work where there is one."""
    return "tt.descriptor_load" in ir or "ttng.async_tma_copy_global_to_local" in ir


def _tile_bytes(line: str) -> int:
    tile = _TILE.search(line)
    assert tile is not None
    return prod(int(size) for size in tile[1].split("x") if size) * int(tile[2]) // 8


def _innermost_loops(ttir: str) -> Iterator[tuple[list[str], str]]:
    """(lines, closing line with the attributes) of every scf.for without another inside; its branches included."""
    opened: list[tuple[bool, list[str]]] = []  # (is a loop, its lines), outermost first
    inner = False  # whether the loop that closes next holds one that has closed
    for raw in ttir.splitlines():
        line = re.sub(r"\s*loc\(.*", "", raw).strip()
        if line.startswith("}") and opened:
            is_loop, lines = opened.pop()
            if is_loop:
                if not inner:
                    yield lines, line
                inner = any(loop for loop, _ in opened)
            elif opened:
                opened[-1][1].extend(lines)
        elif opened:
            opened[-1][1].append(line)
        if line.endswith("{"):
            is_loop = "scf.for" in line
            inner = inner and not is_loop
            opened.append((is_loop, []))


def narrow_offsets(ir: str) -> list[str]:
    """The products behind each tt.addptr whose offset is a 32-bit product with a run-time integer argument.

    Such an offset grows with a size or stride and wraps around, without a sign of it, once a tensor has more than 2**31
    elements. A product of operands that were widened to 64 bits isn't reported; one that is widened afterwards is. What
    a warp-specialised partition of a Gluon kernel captures counts as an argument.
    """
    scopes = re.split(r"(?m)^(?=.*\btt\.func\b|\s*partition\d+\()", ir)  # values are named anew in each
    return list(dict.fromkeys(line for scope in scopes for line in _narrow_offsets(scope)))


def _narrow_offsets(scope: str) -> Iterator[str]:
    definitions: dict[str, tuple[str, list[str], str]] = {}
    lines = scope.splitlines()
    arguments = set(re.findall(r"(%\w+): i32", lines[0])) if lines else set()
    for line in lines[1:]:
        code = re.sub(r"\s*loc\(.*", "", line)
        if match := _DEFINITION.match(code):
            operands = _VALUE.findall(match[3].split(" : ")[0])
            definitions[match[1]] = match[2], operands, code.strip()

    def from_argument(value: str) -> bool:
        if value in arguments:
            return True
        operation, operands, _ = definitions.get(value, ("", [], ""))
        return operation in _SAME_VALUE and any(from_argument(operand) for operand in operands)

    def narrow_product(value: str) -> str | None:
        operation, operands, code = definitions.get(value, ("", [], ""))
        if operation not in (*_SAME_VALUE, *_WIDENING):
            return None
        wide = "i64" in code.rpartition(" : ")[2]
        if operation == "arith.muli" and not wide and any(from_argument(operand) for operand in operands):
            return code
        return next((found for operand in operands if (found := narrow_product(operand))), None)

    for operation, operands, _ in definitions.values():
        if operation == "tt.addptr" and len(operands) > 1 and (found := narrow_product(operands[1])):
            yield found
