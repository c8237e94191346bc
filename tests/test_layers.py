"""The house: imports point one way, and the command line imports nothing slow."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "asyncflow"

# A module may import from its own layer and from those below it. A folder stands for its modules.
LAYERS = [
    {"caches", "contracts", "errors", "exits", "files", "notices", "plugins", "shell", "signals", "terminal"},
    {"checksums", "config", "policy_config"},
    {
        "buffer", "camera_data", "console", "dataset", "demo_choice", "device", "env_source", "envs",
        "episodes", "examples", "experts", "finite", "flags", "footprint", "gae", "inference", "latency",
        "lerobot_folder", "losses", "metric_files", "metrics", "optimizer", "overrides", "pickle_sizes",
        "plain_values", "policies", "policy_file", "policy_header", "presets", "profile_legs", "profile_model",
        "profile_plot", "rates", "resources", "robomimic_file", "seeding", "staging", "streams",
        "success_value", "timing", "tracing", "weights",
    },
    {"checkpoint", "collector", "ppo", "rollout_writer", "run_folder", "stored_state"},
    {"build", "progress"},
    {"demos", "evaluate", "evaluate_checkpoint", "pretrain", "trainer"},
    {"launch"},
    {"profile_report", "profile_run", "profiling"},
    {"cli"},
    {"__main__"},
]  # fmt: skip
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SLOW = {"torch", "tensordict", "pydantic", "yaml", "rich", "numpy", "robosuite", "robomimic", "h5py"}


def module_name(path: Path) -> str:
    """Return a file's dotted name without the package's, such as `envs.toy`; a folder's own is the folder's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a piece of code imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_level_imports(path: Path) -> set[str]:
    """Return the packages that a file imports when it is imported itself."""
    tree = ast.parse(path.read_text())
    nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name.split(".")[0] for node in nodes for name in imported_modules(node)}


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if module_name(path)}


def internal_imports(name: str) -> set[str]:
    """Return the modules of the package that a module imports, `import` inside functions included."""
    found = imported_modules(ast.parse(SOURCES[name].read_text()))
    inside = {module.removeprefix("asyncflow.") for module in found if module.startswith("asyncflow.")}
    return inside & set(SOURCES) - {name}


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_down(name: str) -> None:
    top = name.split(".", maxsplit=1)[0]
    assert top in RANK, f"give {top} its layer in {__file__}"
    above = [other for other in internal_imports(name) if RANK[other.split(".")[0]] > RANK[top]]
    assert not above, f"{name} must not import {above}"


def test_there_is_no_import_cycle() -> None:
    # A folder's `__init__` may import its modules, and they may import each other: files are the nodes here.
    graph = {name: internal_imports(name) for name in SOURCES}
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= set(SOURCES)  # a cycle raises


def loaded_with(name: str) -> set[str]:
    """Return the packages that importing a module loads, the package's own modules included."""
    loaded, waiting = set(), {name}
    while waiting:
        module = waiting.pop()
        loaded.add(module)
        if module in SOURCES:
            tree = ast.parse(SOURCES[module].read_text())
            nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            found = {each for node in nodes for each in imported_modules(node)}
            waiting |= {each.removeprefix("asyncflow.") for each in found} - loaded
    return {each.split(".")[0] for each in loaded}


@pytest.mark.parametrize("name", ["envs.worker", "envs.robomimic"])
def test_a_worker_process_does_not_load_tensordict(name: str) -> None:
    """It takes as long as torch, and whoever waits for workers or their replacement would wait for it."""
    assert "torch" in loaded_with(name)
    assert "tensordict" not in loaded_with(name)


def test_there_is_no_module_called_utils() -> None:
    assert not [name for name in SOURCES if name.rsplit(".", maxsplit=1)[-1] in ("utils", "helpers", "common")]


def test_files_are_short() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in SOURCES.items()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_the_command_line_imports_nothing_slow() -> None:
    assert top_level_imports(PACKAGE / "cli.py") & SLOW == set()


@pytest.mark.parametrize(
    "name", ["errors", "config", "policy_config", "plugins", "console", "metric_files", "metrics", "envs", "envs.tasks"]
)
def test_what_answers_at_once_does_not_import_torch(name: str) -> None:
    assert top_level_imports(SOURCES[name]) & {"torch", "tensordict", "robosuite", "robomimic"} == set()
