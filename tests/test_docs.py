"""Checks the documentation against the files and names that it mentions."""

import itertools
import re
from pathlib import Path

import pytest

import lora_kernels

ROOT = Path(__file__).parent.parent
DOCS, PACKAGE = ROOT / "docs", ROOT / "lora_kernels"
GENERATED = {"cli.md", "changelog.md", "contributing.md"}  # by docs/hooks.py, while the site is built
NAV = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def test_every_page_is_in_the_navigation_once():
    pages = re.findall(r": ([\w/]+\.md)$", NAV, re.MULTILINE)
    assert sorted(pages) == sorted({path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | GENERATED)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize(
    "path",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))],
    ids=lambda path: path.name,
)
def test_links_lead_to_files(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for link in LINK.findall(text):
        if not link.startswith(("http:", "https:")) and link not in GENERATED:
            assert (path.parent / link).exists(), link


def test_every_public_name_is_on_the_api_page():
    shown = re.findall(r"^::: lora_kernels\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(lora_kernels.__all__)


def test_every_environment_variable_is_on_its_page():
    sources = [ROOT / "setup.py", *PACKAGE.rglob("*.py")]
    names = {name for path in sources for name in re.findall(r"\bLORA_KERNELS_[A-Z_]*[A-Z]\b", path.read_text())}
    page = (DOCS / "environment.md").read_text()
    assert {name for name in names if f"`{name}`" not in page} <= {"LORA_KERNELS_CUDA"}  # a macro of the C++ sources


def test_the_files_that_the_architecture_page_names_exist():
    page = (DOCS / "architecture.md").read_text()
    for name in re.findall(r"`([\w/]+(?:\.py|\.cpp|/))`", page):
        inside = [parent for parent in (ROOT, PACKAGE, PACKAGE / "kernels", PACKAGE / "planning",
                                        PACKAGE / "integrations/peft") if (parent / name).exists()]  # fmt: skip
        assert inside or any(PACKAGE.rglob(f"kernels/*/{name}")) or name == "cases/", name


def test_the_architecture_page_shows_every_part():
    picture = (DOCS / "architecture.md").read_text().partition("```mermaid")[2].partition("```")[0]
    parts = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    for part in parts - {"__init__", "__pycache__"}:
        assert re.search(rf"\b{part}\b", picture), part


def test_the_arrows_of_the_architecture_page_are_imports():
    picture = (DOCS / "architecture.md").read_text().partition("```mermaid")[2].partition("```")[0]
    for line in picture.splitlines():
        chain = line.split(" --> ")
        for imported, importer in itertools.pairwise(chain):
            names = "errors|atomic_write|locks|patterns" if imported.strip() == "base" else imported.strip()
            path = PACKAGE / importer
            files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
            pattern = re.compile(
                rf"^ *(from|import) (lora_kernels\.({names})\b|lora_kernels import .*\b({names})\b)", re.M
            )
            assert any(pattern.search(file.read_text()) for file in files), f"{importer} does not import {imported}"


def test_the_workflow_calls_targets_of_the_makefile():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    targets = re.search(r"target: \[(.*)\]", workflow)[1].split(", ")
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["lint", "test", "docs", "dist"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
