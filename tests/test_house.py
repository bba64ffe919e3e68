"""The rules of the house that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_kernels"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What a part may import of the package; the parts below it, never the ones above.
LEAVES = {"config", "dtypes", "errors", "fast_paths", "formats", "fork", "override", "patterns", "slots"}
ALLOWED = {
    "dtypes": set(),
    "errors": set(),
    "patterns": {"errors"},
    "peft_fields": set(),
    "config": {"errors", "patterns", "peft_fields"},
    "fork": set(),
    "fast_paths": set(),
    "override": {"errors", "fork"},
    "formats": {"errors"},
    "slots": {"errors"},
    "reference": LEAVES,
    "kernels": LEAVES,
    "testing": {"dtypes", "errors", "formats", "reference", "slots"},
    "cost": LEAVES | {"kernels"},
    "variants": LEAVES | {"cost", "kernels"},
    "tuned": LEAVES | {"cost", "kernels"},
    "plan": LEAVES | {"cost", "kernels", "reference", "tuned", "variants"},
    "ops": LEAVES | {"kernels", "plan", "cost", "reference"},
    "autograd": LEAVES | {"ops", "plan", "reference"},
    "layers": LEAVES | {"autograd", "plan"},
}
ALLOWED["csrc"] = LEAVES
ALLOWED["multi_cost"] = LEAVES | {"cost", "kernels"}
ALLOWED["plan"] |= {"testing"}  # the interpreter's bfloat16, exact before kernels are interpreted
ALLOWED["multi_plan"] = ALLOWED["plan"] | {"plan", "csrc", "multi_cost"}
ALLOWED["ops"] |= {"multi_plan", "multi_cost"}
ALLOWED["autograd"] |= {"multi_plan"}
ALLOWED["stacked_cost"] = ALLOWED["cost"] | {"cost"}
ALLOWED["ops"] |= {"stacked_cost"}
ALLOWED["targets"] = LEAVES | {"layers"}
ALLOWED["report"] = ALLOWED["layers"] | {"layers", "targets", "kernels", "cost", "variants"}
ALLOWED["embeddings"] = {"config", "errors", "report"}
ALLOWED["inject"] = ALLOWED["adapters"] = ALLOWED["layers"] | {
    "layers",
    "targets",
    "report",
    "inject",
    "adapters",
    "embeddings",
}
ALLOWED["inject"] = ALLOWED["inject"] | {"embeddings"}
ALLOWED["adapters"] = ALLOWED["adapters"] | {"embeddings", "multi_plan"}  # whether the pool's backend runs here
ALLOWED["trial"] = ALLOWED["ops"] | {"ops", "testing", "variants"}
ALLOWED["tune"] = ALLOWED["trial"] | {"trial", "tuned", "adapters"}
ALLOWED["integrations"] = ALLOWED["finetune"] = ALLOWED["inject"] | {"integrations", "finetune"}
ALLOWED["integrations"] = ALLOWED["integrations"] | {"reference", "testing"}  # the compatibility table judges
ALLOWED["serving"] = ALLOWED["trial"] | {"autograd", "finetune", "multi_cost", "multi_plan", "serving", "trial"}
ALLOWED["cli"] = ALLOWED["finetune"] | {
    "cli",
    "testing",
    "kernels",
    "cost",
    "multi_cost",
    "serving",
    "stacked_cost",
    "tune",
    "tuned",
    "variants",
}
ALLOWED["cli"] |= {"csrc", "reference"}
# The optional dependencies and the files that may name them at import time or inside a function.
OPTIONAL = {"triton", "transformers", "peft", "matplotlib", "sklearn", "tqdm", "accelerate", "datasets", "optuna"}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether at the top of the file) for every import statement outside TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "lora_kernels":
                names = [f"lora_kernels.{alias.name}" for alias in node.names]
        found += [(name, node in tree.body) for name in names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    part = part_of(path)
    if part == "__init__":
        return
    assert part in ALLOWED, f"{part} is not a part of the house: say in ALLOWED what it may import"
    for name, _ in imports(path):
        if name.startswith("lora_kernels.") and name != "lora_kernels.__version__":
            other = name.split(".")[1]
            assert other == part or other in ALLOWED[part], f"{path.name} ({part}) imports {name}"


def test_kernels_and_reference_know_nothing_of_each_other():
    for path in MODULES:
        others = {name.split(".")[1] for name, _ in imports(path) if name.startswith("lora_kernels.")}
        if part_of(path) == "kernels":
            assert "reference" not in others, path
        if part_of(path) == "reference":
            assert "kernels" not in others, path


def test_triton_is_imported_at_the_top_only_by_kernels_and_their_tools():
    for path in MODULES:
        named = {name.split(".")[0] for name, top in imports(path) if top}
        if "triton" in named:
            assert part_of(path) in {"kernels", "testing"}, path
        assert not named & (OPTIONAL - {"triton"}) or part_of(path) == "integrations", (
            f"{path} needs {named & OPTIONAL}"
        )


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file_length(path):
    assert len(path.read_text().splitlines()) <= 400


def test_an_equation_opens_every_kernel_file_and_every_kernel():
    for path in sorted((PACKAGE / "kernels").glob("*.py")):
        tree = ast.parse(path.read_text())
        jitted = [
            node for node in tree.body
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
        ]  # fmt: skip
        if any(node.name.endswith("_kernel") for node in jitted):
            assert " = " in (ast.get_docstring(tree) or ""), path
        for node in jitted:
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_every_public_thing_has_a_docstring():
    for path in MODULES:
        tree = ast.parse(path.read_text())
        if path.name != "__main__.py":
            assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.relative_to(ROOT)}: {node.name}"


TESTED_ELSEWHERE = {
    "kernels/common.py": "kernels/test_lora_linear.py",
    "kernels/linear/expand.py": "kernels/test_lora_linear.py",
    "kernels/linear/lora_linear_bwd.py": "kernels/test_lora_linear.py",
    "kernels/reduce.py": "kernels/test_lora_linear.py",
    "kernels/linear/shrink.py": "kernels/test_lora_linear.py",
    "kernels/linear/launchers.py": "kernels/test_lora_linear.py",
    "kernels/stacked/launchers.py": "kernels/test_lora_linear_stacked.py",
    "check/compile/cases/__init__.py": "test_compile_matrix.py",
    "check/compile/cases/case.py": "test_compile_matrix.py",
    "check/compile/cases/sm90.py": "test_compile_matrix.py",
    "check/compile/cases/stacked.py": "test_compile_matrix.py",
    "check/compile/cases/gluon.py": "test_compile_matrix.py",
    "check/compile/cases/decode.py": "test_compile_matrix.py",
    "check/compile/cases/multi.py": "test_compile_matrix.py",
    "testing/emulator/engines.py": "testing/test_gluon_emulator.py",
    "testing/emulator/language.py": "testing/test_gluon_emulator.py",
    "testing/emulator/machine.py": "testing/test_gluon_emulator.py",
    "testing/emulator/memory.py": "testing/test_gluon_emulator.py",
    "finetune/train/fake_step.py": "finetune/test_advise.py",
    "errors.py": "autograd/test_lora_linear.py",
}


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if p.name not in ("__init__.py", "__main__.py")],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_every_module_has_a_test_file(path):
    inside = path.relative_to(PACKAGE)
    mirror = inside.with_name(f"test_{inside.name}")
    test = ROOT / "tests" / TESTED_ELSEWHERE.get(str(inside), str(mirror))
    assert test.is_file(), f"{inside} has no {test.relative_to(ROOT)}"


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, lora_kernels; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in (*OPTIONAL, "torch"):
        assert f"'{name}'" not in loaded, name


def test_the_names_it_offers_are_there():
    import lora_kernels

    assert set(lora_kernels.__all__) == set(lora_kernels._HOME)
    for name in lora_kernels.__all__:
        assert getattr(lora_kernels, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lora_kernels.nothing


def test_only_ops_names_the_operators():
    for path in MODULES:
        if "lora_kernels::" in path.read_text():
            assert part_of(path) == "ops", path
