"""Load what other packages add: policies, environments and advantages by entry point, classes by import path.

Importing a module runs its code, so a name is imported only on the user's word, never on a file's: entry points are
those of installed packages, and a class is imported only if it is asyncflow's own or was passed to `trust_class`.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from asyncflow.config.contracts import broken, check_callable
from asyncflow.errors import AsyncflowError, ConfigError

Built = TypeVar("Built")

POLICIES, ENVS, ADVANTAGES = "asyncflow.policies", "asyncflow.envs", "asyncflow.advantages"
TRUST_FLAG = "--trust-class"
MAX_SHOWN = 80  # characters of a name that a file may have made up
_OWN = "asyncflow."

_SIMULATOR = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*")
_trusted: set[str] = set()  # of this process: a command trusts what its own command line and --config name


def trust_class(path: str) -> None:
    """Allow `import_class` to import `package.module.Class` from now on, because the user named it.

    Call it with names from a command line, a user's own configuration or a program, never with those from a policy
    file or a run folder.
    """
    _trusted.add(path)


def is_named_simulator(task: Any) -> bool:
    """Tell whether `env.task` names a user's own simulator, as in `my_simulator:Reach`."""
    return isinstance(task, str) and _SIMULATOR.fullmatch(task) is not None and not task.startswith("gym:")


def check_simulator(task: str) -> None:
    """Refuse a simulator that a file names and the user does not; nothing is imported here.

    Raises:
        ConfigError: The user did not name it.
    """
    if task not in _trusted:
        raise ConfigError(
            f"env.task = {task[:MAX_SHOWN]}: named by a file and not by this command, so that it is not imported; if "
            f"you trust that code: {TRUST_FLAG} {task[:MAX_SHOWN]}"
        )


def trusting_words(path: str | None, tasks: Iterable[str] = ()) -> list[str]:
    """Return what a command needs to trust the class and the simulators that a run's files name; None is no class."""
    named = [] if path is None or path.startswith(_OWN) else [path]
    return [word for each in [*named, *filter(is_named_simulator, tasks)] for word in (TRUST_FLAG, each)]


def plugin_names(group: str) -> list[str]:
    """Return the names that installed packages registered in a group of entry points."""
    return sorted({point.name for point in entry_points(group=group)})


def load_plugin(group: str, name: str) -> Any:
    """Import what a package registered under a name.

    Raises:
        ConfigError: It cannot be imported, or several packages registered something under the name.
    """
    points = {point.value: point for point in entry_points(group=group, name=name)}
    if len(points) > 1:
        raise ConfigError(f"entry point {name} of {group}: several are installed ({_list(points)}); keep one of them")
    (point,) = points.values()
    try:
        return point.load()
    except Exception as error:  # whatever a module raises that is imported
        reason = f"{type(error).__name__}: {_one_line(error)}"
        raise ConfigError(f"entry point {name} of {group} ({point.value}): {reason}") from error


def build_plugin(group: str, name: str, arguments: tuple[Any, ...], kind: type[Built]) -> Built:
    """Build what a package registered under a name; the process stays in its folder.

    Args:
        group: Of entry points.
        name: Of the entry point.
        arguments: What it is called with; they are its own from now on.
        kind: What it must return.

    Raises:
        ConfigError: It cannot be imported, or raises an error of its own.
        ContractError: It cannot be called so, or returns something else.
    """
    build, folder = load_plugin(group, name), os.getcwd()
    label = f"entry point {name} of {group} ({next(iter(entry_points(group=group, name=name))).value})"
    check_callable(build, label, arguments)
    try:
        built = build(*arguments)
    except (AsyncflowError, OSError, MemoryError):
        raise
    except Exception as error:  # whatever a package's own code raises
        raise ConfigError(f"{label}: raised {type(error).__name__}: {_one_line(error)}") from error
    finally:
        os.chdir(folder)
    if not isinstance(built, kind):
        raise broken(label, "returned", built, f"{kind.__module__}.{kind.__name__}")
    return built


def refuse_taken_name(group: str, name: str, key: str) -> None:
    """Refuse a name of asyncflow's own under which a package registered something else.

    Raises:
        ConfigError: There is such a package; the message names what it registered.
    """
    points = {point.value: point for point in entry_points(group=group, name=name)}
    if points:
        raise ConfigError(
            f"{key} = {name}: asyncflow's own, and also an installed package's (entry point of {group}: "
            f"{_list(points)}); uninstall it, or let it register another name"
        )


def _list(points: dict[str, EntryPoint]) -> str:
    return ", ".join(f"{value} of {point.dist.name if point.dist else 'unknown'}" for value, point in points.items())


def import_class(path: str, key: str, base: str) -> type[Any]:
    """Import the class `package.module.Class`, if the user named it or it is asyncflow's own.

    Args:
        path: Where it is.
        key: The key of the configuration that holds `path`.
        base: Import path of the class that it must be derived from; anything else is not returned, so never called.

    Raises:
        ConfigError: The user did not name it, in which case nothing was imported; it cannot be imported; or it is not
            derived from `base`.
    """
    if not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(f"{key} = {path[:MAX_SHOWN]!a}: not an import path; expected package.module.Class")
    if path not in _trusted and not path.startswith(_OWN):
        shown = path[:MAX_SHOWN].encode("ascii", "backslashreplace").decode()
        raise ConfigError(
            f"{key} = {shown}: named by a file and not by this command, so that it is not imported; if you "
            f"trust that code: {TRUST_FLAG} {shown}"
        )
    try:
        found = _import_name(path)
    except Exception as error:  # whatever the module's own code raises
        raise ConfigError(
            f"{key} = {path}: {_one_line(error)}; expected package.module.Class, importable from PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, _import_name(base))):
        raise ConfigError(f"{key} = {path}: not a {base}, but {type(found).__name__}; expected such a class")
    if path not in _trusted and not found.__module__.startswith(_OWN):
        raise ConfigError(f"{key} = {path}: {found.__module__}.{found.__name__} is not asyncflow's own")
    return found


def _import_name(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
