"""Make `docs/always_holds.md` of `promises.yaml`: every promise, with the tests that hold it.

python -m tools.handbook.always_holds    # writes the page; `make docs` calls it

The names of tests are read from the syntax trees of the test files, so a test that was renamed or removed is found
without running anything.
"""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("promises.yaml")
PAGE = REPOSITORY / "docs" / "always_holds.md"
TESTS = REPOSITORY / "tests"

INTRODUCTION = """\
# What always holds

These are asyncflow's promises. Each one stands beside the tests that would fail if it were broken, named by
their files below `tests/`. `make docs` writes this page from `tools/handbook/promises.yaml` and fails if a test that is
named there does not exist. The stress suite, which injects faults into whole runs, has a [page](reliability.md) of its
own.
"""


def find_tests(folder: Path = TESTS) -> dict[str, list[str]]:
    """Return every test file below a folder with the names of its test functions, those in classes included."""
    found = {}
    for path in sorted(folder.rglob("test_*.py")):
        nodes = ast.walk(ast.parse(path.read_text()))
        names = [node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        found[path.relative_to(folder).as_posix()] = names
    return found


def locate(named: str, tests: dict[str, list[str]]) -> tuple[str, str]:
    """Return the file and the function that a name in `promises.yaml` means; the function is empty for a whole file.

    Raises:
        ValueError: no test has this name, or several files have a test of this name.
    """
    if named in tests:
        return named, ""
    file, _, function = named.rpartition("::")
    files = [each for each, names in tests.items() if function in names and file in ("", each)]
    if not files:
        raise ValueError(f"{SOURCE.name} names the test {named!r}, which does not exist")
    if len(files) > 1:
        raise ValueError(f"{SOURCE.name} names the test {named!r}, which is in {', '.join(files)}: write FILE::{named}")
    return files[0], function


def write_page(sections: list[dict[str, Any]], tests: dict[str, list[str]]) -> str:
    """Return the page: a list per heading, an item per promise, with a line per file of tests below it."""
    lines = [INTRODUCTION]
    for section in sections:
        lines += [f"## {section['heading']}", ""]
        for promise in section["promises"]:
            lines.append(_wrap(promise["says"], "- "))
            functions: dict[str, list[str]] = {}
            for named in promise["tests"]:
                file, function = locate(named, tests)
                functions.setdefault(file, []).extend([f"`{function}`"] if function else [])
            for file, names in functions.items():
                lines.append(_wrap(f"`{file}`" + (": " if names else "") + ", ".join(names), "    - "))
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def _wrap(text: str, bullet: str) -> str:
    blank = " " * len(bullet)
    return textwrap.fill(text, 120, initial_indent=bullet, subsequent_indent=blank, break_on_hyphens=False)


def page() -> str:
    """Return the page as it should be now."""
    return write_page(yaml.safe_load(SOURCE.read_text()), find_tests())


if __name__ == "__main__":
    PAGE.write_text(page())
