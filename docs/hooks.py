"""Hooks of mkdocs: pages that are generated from the sources, and links that leave the docs/ folder.

Generated: cli.md from the argparse parsers, changelog.md and contributing.md from the files of the root. The rows of
benchmarks/results are copied into the site, so that a link to ../benchmarks/results/... works on both sides.
"""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
COPIED = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
COMMANDS = (
    "doctor", "demo", "train", "sweep", "explain", "advise", "tune", "merge", "serve_bench", "check", "compat",
)  # fmt: skip
OUT_OF_DOCS = re.compile(r"\]\(\.\./(benchmarks/results/)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages and the measured rows to the files of the site."""
    for page, source in COPIED.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "cli.md", content=cli_page()))
    for path in sorted((ROOT / "benchmarks" / "results").rglob("*.csv")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Points links to the measured rows at their copies in the site."""
    return OUT_OF_DOCS.sub(r"](\1", markdown)


def cli_page() -> str:
    """Returns a page with every command and option, read from the parsers of lora_kernels.cli."""
    from lora_kernels.finetune.tasks import TASKS

    parser = argparse.ArgumentParser(prog="lora-kernels")
    subparsers = parser.add_subparsers()
    lines = [
        "# Command line: commands and options",
        "",
        "Generated from the parsers of `lora_kernels.cli`. What every command checks, and its exit codes, are in",
        "[command_line](command_line.md).",
    ]
    for name in COMMANDS:
        module = importlib.import_module(f"lora_kernels.cli.{name}")
        task = (next(iter(TASKS.values())),) if name in ("train", "sweep") else ()
        module.add_parser(subparsers, *task)
    summaries = {action.dest: action.help or "" for action in subparsers._choices_actions}
    for command, sub in subparsers.choices.items():
        lines += ["", f"## lora-kernels {command}", "", f"{_sentence(summaries.get(command, ''))}", *_options(sub)]
        if command in ("train", "sweep"):
            lines += [
                "",
                f"Options of a task: here `--task {next(iter(TASKS))}`; [the others](#options-of-the-other-tasks).",
            ]
    lines += ["", "## Options of the other tasks", "", "Of `lora-kernels train` and `lora-kernels sweep`."]
    for task in list(TASKS.values())[1:]:
        parser = argparse.ArgumentParser()
        importlib.import_module("lora_kernels.cli.train").add_arguments(parser, task)
        lines += ["", f"### --task {task.name}", *_options(parser, f"task {task.name}")]
    return "\n".join(lines) + "\n"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _options(parser: argparse.ArgumentParser, only: str = "") -> list[str]:
    """Returns a table a group of options; with ``only`` the group of that title alone."""
    lines = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        if [action.dest for action in actions] in ([], ["help"]) or only not in ("", group.title):
            continue
        lines += ["", f"**{group.title}**", "", "| option | meaning |", "|---|---|"]
        for action in actions:
            if action.dest != "help":
                lines.append(f"| {_name(action)} | {_meaning(parser, action)} |")
    return lines


def _name(action: argparse.Action) -> str:
    names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    if action.option_strings and action.nargs != 0:
        value = action.metavar or (("{" + ",".join(map(str, action.choices)) + "}") if action.choices else "")
        names += f" {value or action.dest.upper()}" + (" ..." if action.nargs in ("+", "*") else "")
    return f"`{names}`".replace("|", "\\|")


def _meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = action.help or ""
    if text:
        text = parser._get_formatter()._expand_help(action)
    if "default" not in text and action.nargs != 0 and action.default not in (None, "", argparse.SUPPRESS):
        text += f" (default: {action.default})"
    required = "required; " if action.option_strings and action.required else ""
    return f"{required}{text.strip()}".replace("|", "\\|").replace("<", "&lt;")
