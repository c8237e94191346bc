"""What other packages add: policies and environments, by entry points, and classes by their import path.

Owns how they are found. It must not know what they are for.
"""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from asyncflow.errors import ConfigError

POLICIES, ENVS = "asyncflow.policies", "asyncflow.envs"


def plugin_names(group: str) -> list[str]:
    """Return the names that installed packages registered in a group of entry points."""
    return sorted({point.name for point in entry_points(group=group)})


def load_plugin(group: str, name: str) -> Any:
    """Import what a package registered under a name.

    Raises:
        ConfigError: It cannot be imported.
    """
    point: EntryPoint = next(iter(entry_points(group=group, name=name)))
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"entry point {name} of {group} ({point.value}): {_one_line(error)}") from error


def import_object(path: str, key: str) -> Any:
    """Import `package.module.Name`.

    Args:
        path: Where it is.
        key: The key of the configuration that holds `path`.

    Raises:
        ConfigError: It cannot be imported.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{key} = {path}: {_one_line(error)}; expected package.module.Class, importable from PYTHONPATH"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
