"""What Triton's own IR (ttir, text) says of a kernel: its dots, and pointer offsets too narrow for large tensors."""

import re
from dataclasses import dataclass

_DOT = re.compile(r"tt\.dot\b(?P<attributes>.*?) : tensor<(?P<M>\d+)x(?P<K>\d+)x(?P<dtype>\w+)>")
_VALUE = re.compile(r"%[\w#]+")
_DEFINITION = re.compile(r"\s*(%[\w#:]+)(?::\d+)? = \"?([\w.]+)(.*)")
_WIDENING = ("arith.extsi", "arith.extui")
_SAME_VALUE = ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.addi", "arith.muli", "arith.subi")


@dataclass(frozen=True)
class Dot:
    """A tile product: M and K of its left operand, the operands' dtype, and whether it may use a matrix unit."""

    M: int
    K: int
    dtype: str
    on_matrix_unit: bool


def dots(ttir: str) -> list[Dot]:
    """The tt.dot operations; in fp32, only those with TF32 inputs are expected on a matrix unit."""
    return [
        Dot(int(m["M"]), int(m["K"]), m["dtype"], m["dtype"] not in ("f32", "f64") or "tf32" in m["attributes"])
        for m in _DOT.finditer(ttir)
    ]


def narrow_offsets(ttir: str) -> list[str]:
    """The products behind each tt.addptr whose offset is a 32-bit product with a run-time integer argument.

    Such an offset grows with a size or stride and wraps around, without a sign of it, once a tensor has more than 2**31
    elements. A product of operands that were widened to 64 bits isn't reported; one that is widened afterwards is.
    """
    definitions: dict[str, tuple[str, list[str], str]] = {}
    arguments: set[str] = set()
    for line in ttir.splitlines():
        code = re.sub(r"\s*loc\(.*", "", line)
        if "tt.func" in code:
            arguments |= set(re.findall(r"(%\w+): i32", line))
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

    offsets = (operands[1] for op, operands, _ in definitions.values() if op == "tt.addptr" and len(operands) > 1)
    return list(dict.fromkeys(found for offset in offsets if (found := narrow_product(offset))))
