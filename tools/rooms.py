"""The rooms of the package: their order, who imports whom, and the drawing of it in `ARCHITECTURE.md`.

python -m tools.rooms    # writes the drawing; `make docs` calls it, `tests/test_layers.py` holds the order
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "asyncflow"
PAGE = REPOSITORY / "ARCHITECTURE.md"
BEGIN, END = "<!-- rooms: written by tools/rooms.py -->\n", "<!-- end of rooms -->\n"

# A module imports from its own room and from those below it. What lies in no folder is a door or the ground.
ROOMS = [
    "doors", "profile", "run", "demos", "ppo", "rollout", "policies", "envs", "simulators", "metrics", "config",
    "ground",
]  # fmt: skip
CAPTIONS = {"doors": "What a program imports; commands, flags and exit codes", "ground": "What every room may use"}
DOORS = {"__main__", "cli", "cli_envs", "flags", "library"}


def module_name(path: Path) -> str:
    """Return a file's dotted name without the package's, such as `envs.toy`; a folder's own is the folder's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if module_name(path)}


def room_of(name: str) -> str:
    """Return the room in which a module lies."""
    top = name.split(".", maxsplit=1)[0]
    if (PACKAGE / top).is_dir():
        return top
    return "doors" if top in DOORS else "ground"


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a piece of code imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def internal_imports(name: str) -> set[str]:
    """Return the modules of the package that a module imports, `import` inside functions included."""
    found = imported_modules(ast.parse(SOURCES[name].read_text()))
    inside = {module.removeprefix("asyncflow.") for module in found if module.startswith("asyncflow.")}
    return inside & set(SOURCES) - {name}


def draw() -> str:
    """Return the rooms, top down: what each is for, its files, which rooms it imports from; then all in figures.

    Raises:
        graphlib.CycleError: There is an import cycle.
    """
    graphlib.TopologicalSorter({name: internal_imports(name) for name in SOURCES}).prepare()
    lines = ["| room | what it is for | files | imports from |", "|---|---|---|---|"]
    num_arrows = 0
    for room in ROOMS:
        names = [name for name in SOURCES if room_of(name) == room and name != room]
        below = {room_of(other) for name in names for other in internal_imports(name)} - {room}
        num_arrows += len(below)
        arrows = ", ".join(each for each in ROOMS if each in below) or "-"
        lines.append(f"| {_title(room)} | {_caption(room)} | {_list_files(room, names)} | {arrows} |")
    num_modules = sum(path.name != "__init__.py" for path in SOURCES.values())
    return "\n".join(lines) + (
        f"\n\n{num_modules} modules lie in {len(ROOMS) - 2} rooms, the doors and the ground: {len(ROOMS)} floors. "
        f"{num_arrows} arrows lead\nfrom one floor to another. There are 0 import cycles.\n"
    )


def _title(room: str) -> str:
    return f"`{room}/`" if (PACKAGE / room).is_dir() else room


def _caption(room: str) -> str:
    """Return the first line of a folder's docstring."""
    if room in CAPTIONS:
        return CAPTIONS[room]
    return (ast.get_docstring(ast.parse(SOURCES[room].read_text())) or "").partition("\n")[0].rstrip(".")


def _list_files(room: str, names: list[str]) -> str:
    """Return a room's files; those of a folder within it stand in brackets behind its name."""
    inside = [name.removeprefix(f"{room}.") for name in names]
    folders = {name.partition(".")[0] for name in inside if "." in name}
    shown = [name for name in inside if "." not in name and name not in folders]
    for folder in sorted(folders):
        files = ", ".join(name.partition(".")[2] for name in inside if name.startswith(f"{folder}."))
        shown.append(f"{folder}/ ({files})")
    return ", ".join(shown)


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + draw() + END + rest.partition(END)[2])
