"""The house: rooms in one order, imports that point down, and a command line that imports nothing slow."""

from __future__ import annotations

import ast
import graphlib
import sys
from pathlib import Path

import pytest

from tools.rooms import PACKAGE, PAGE, ROOMS, SOURCES, draw, imported_modules, internal_imports, room_of

TOOLS = PACKAGE.parent / "tools"
SLOW = {"torch", "tensordict", "pydantic", "yaml", "rich", "numpy", "robosuite", "robomimic", "h5py"}


def at_import(path: Path) -> set[str]:
    """Return the dotted names that a file imports when it is imported itself."""
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name for node in nodes for name in imported_modules(node)}


def loaded_with(name: str) -> set[str]:
    """Return the packages that importing a module loads, the package's own modules included."""
    loaded, waiting = set(), {name}
    while waiting:
        module = waiting.pop()
        loaded.add(module)
        if module in SOURCES:
            folders = {module.rpartition(".")[0]} & set(SOURCES)  # whose own file runs first
            waiting |= ({each.removeprefix("asyncflow.") for each in at_import(SOURCES[module])} | folders) - loaded
    return {each.split(".")[0] for each in loaded}


def test_the_drawing_in_the_architecture_is_that_of_the_code() -> None:
    assert draw() in PAGE.read_text(), "run `make docs`"


def test_every_folder_is_a_room() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(ROOMS) - {"doors", "ground"}


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_down(name: str) -> None:
    rank = ROOMS.index(room_of(name))
    above = [other for other in internal_imports(name) if ROOMS.index(room_of(other)) < rank]
    assert not above, f"{name} must not import {above}"


def test_there_is_no_import_cycle() -> None:
    # A folder's `__init__` may import its modules, and they may import each other: files are the nodes here.
    graph = {name: internal_imports(name) for name in SOURCES}
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= set(SOURCES)  # a cycle raises


@pytest.mark.parametrize("name", ["simulators.server", "simulators.robosuite.simulator", "simulators.gym"])
def test_a_simulators_process_loads_numpy_and_the_standard_library_alone(name: str) -> None:
    """It may run under an interpreter that has nothing else, and starts the sooner."""
    own = {each.partition(".")[0] for each in SOURCES}
    assert loaded_with(name) - own - set(sys.stdlib_module_names) == {"numpy"}


def test_there_is_no_module_called_utils() -> None:
    assert not [name for name in SOURCES if name.rsplit(".", maxsplit=1)[-1] in ("utils", "helpers", "common")]


def test_a_tool_of_several_files_is_a_folder_that_is_started_by_its_name() -> None:
    """`python -m tools.stress`; what several of them share is `tools/bench/common`, which nobody starts."""
    folders = {path.parent.relative_to(TOOLS) for path in TOOLS.rglob("*.py")} - {Path()}
    started = {folder for folder in folders if (TOOLS / folder / "__main__.py").exists()}
    assert {str(folder) for folder in folders - started} == {"bench", "bench/common", "handbook"}
    assert all((TOOLS / folder / "__init__.py").exists() for folder in folders)


def test_files_are_short() -> None:
    tools = {f"tools {path.relative_to(TOOLS)}": path for path in TOOLS.rglob("*.py")}
    lengths = {name: len(path.read_text().splitlines()) for name, path in (SOURCES | tools).items()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_the_command_line_imports_nothing_slow() -> None:
    assert {name.split(".")[0] for name in at_import(PACKAGE / "cli.py")} & SLOW == set()


@pytest.mark.parametrize(
    "name",
    [
        "errors", "config.sections", "config.policy", "config.plugins", "config.presets", "config.tasks",
        "metrics.console", "metrics.files", "metrics.glossary", "envs",
    ],
)  # fmt: skip
def test_what_answers_at_once_does_not_import_torch(name: str) -> None:
    assert loaded_with(name) & {"torch", "tensordict", "robosuite", "robomimic"} == set()
