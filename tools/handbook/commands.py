"""The commands that README and the pages of `docs/` show: found in code blocks and in inline code, and checked.

python -m tools.handbook.commands    # lists them, with what is wrong

A command of `asyncflow` is parsed by the command line's own parser, and its overrides by the configuration. A `make`
command must name a target, and a tool's module and flags must exist. Nothing is executed here.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import BaseModel

from asyncflow.cli import app
from asyncflow.config.overrides import read_value
from asyncflow.config.presets import load_config, parse_overrides, preset_names
from asyncflow.config.sections import Config
from asyncflow.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
GROUP: Any = typer.main.get_command(app)
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # click's, which some versions of typer carry inside
INLINE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
SETTING = re.compile(r"[A-Z_]+=\S*$")
PROGRAMS = ("asyncflow", "make", "python", "pip")


@dataclass(frozen=True)
class Command:
    """One command that a page shows.

    Attributes:
        page: The page, from the repository's root.
        line: Number of its first line there.
        words: The program and its arguments, as a shell splits them.
    """

    page: str
    line: int
    words: tuple[str, ...]


def pages() -> list[Path]:
    """Return the pages that people read, without the changelog, which is history, and the pages of benchmarks."""
    return [
        path
        for path in (*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md")))
        if path.name != "CHANGELOG.md"
    ]


def find_commands(text: str, page: str) -> Iterator[Command]:
    """Yield the commands of a page: lines of code blocks and inline code that begin with one of `PROGRAMS`."""
    is_fenced = False
    held, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    ") or held:
            first = first if held else number
            held += line.strip()
            if held.endswith("\\"):
                held = held[:-1]
                continue
            yield from _read(held, page, first)
            held = ""
    without_blocks = re.sub(r"^ *```.*?^ *```", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)
    for found in INLINE.finditer(without_blocks):
        yield from _read(" ".join(found[1].split()), page, without_blocks.count("\n", 0, found.start()) + 1)


def _read(line: str, page: str, number: int) -> Iterator[Command]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return  # output of a program, or another language
    while words and SETTING.match(words[0]):
        words = words[1:]
    if words and words[0] in PROGRAMS and len(words) > 1 and re.match(r"[-a-z./]+$", words[1]):
        yield Command(page, number, tuple(words))


def find_fault(command: Command) -> str | None:
    """Return what is wrong with a command, or None."""
    program, *arguments = command.words
    if program == "asyncflow":
        return _check_asyncflow(arguments)
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
        if arguments[0] not in targets:
            return f"make has no target {arguments[0]!r}"
        flags = "".join(word.removeprefix("ARGS=") for word in arguments[1:] if word.startswith("ARGS="))
        return _check_asyncflow(["train", *shlex.split(flags)]) if arguments[0] == "train" else None
    if program == "python":
        return _check_python(arguments)
    return None if arguments[0] == "install" else f"pip {arguments[0]} is not expected"


def _check_asyncflow(arguments: list[str]) -> str | None:
    name, *rest = arguments
    if name not in GROUP.commands:
        return None if name in ("--help", "--version") else f"asyncflow has no command {name!r}"
    if not rest:
        return None  # the command is mentioned
    try:
        context = GROUP.commands[name].make_context(name, [word for word in rest if word != "--help"])
    except USAGE_ERROR as error:
        return f"asyncflow {name}: {getattr(error, 'message', error)}"
    overrides, preset = context.params.get("overrides") or [], context.params.get("config")
    try:
        for override in overrides:
            key, _, text = override.partition("=")
            if not has_key(key):
                return f"the configuration has no key {key!r}"
            read_value(key, text)
        if overrides and not context.params.get("checkpoint"):  # which decides what kind of policy there is
            load_config(preset if preset in preset_names() else "lift", parse_overrides(overrides))
    except ConfigError as error:
        return str(error)
    return None


def has_key(key: str) -> bool:
    """Return whether the configuration has a dotted key."""
    model: Any = Config
    for part in key.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return True  # within a mapping, whose keys are the user's
        fields = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
        if part not in fields:
            return False
        choices = [each for each in (fields[part], *get_args(fields[part])) if isinstance(each, type)]
        model = next((each for each in choices if issubclass(each, BaseModel)), None)
    return True


def _check_python(arguments: list[str]) -> str | None:
    if arguments[0] != "-m":
        return None if (REPOSITORY / arguments[0]).is_file() else f"there is no file {arguments[0]}"
    module = arguments[1]
    if find_spec(module) is None:
        return f"there is no module {module}"
    if module == "tools.emulated":  # latencies, then a command of asyncflow
        return _check_asyncflow(arguments[3:])
    if not module.startswith("tools."):
        return None
    path = REPOSITORY / Path(*module.split("."))
    sources = "".join(each.read_text() for each in (path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]))
    flags = {"--help", *re.findall(r"--[a-z-]+", sources)}
    unknown = [word for word in arguments[2:] if word.startswith("--") and word not in flags]
    return f"{module} knows no {unknown[0]}" if unknown else None


def all_commands() -> list[Command]:
    """Return the commands of all pages."""
    return [
        command for path in pages() for command in find_commands(path.read_text(), str(path.relative_to(REPOSITORY)))
    ]


if __name__ == "__main__":
    faults = 0
    for each in all_commands():
        fault = find_fault(each)
        faults += fault is not None
        print(f"{each.page}:{each.line}: {shlex.join(each.words)}" + (f"   <- {fault}" if fault else ""))
    sys.exit(faults > 0)
