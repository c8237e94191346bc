"""Folders in which libraries keep what they compile: numba beside the code itself, matplotlib in the home folder.

Neither can be written in a container whose environment belongs to root, or by a user without a home.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from asyncflow.terminal import tell_once

_COMPILED = (("robosuite", "utils"), ("asyncflow", "simulators"))  # packages, and their folders of functions for numba


def prepare_caches() -> None:
    """Choose a folder for caches where the libraries' own cannot be written; processes started later inherit it.

    It is `$ASYNCFLOW_HOME` if that is set, else `asyncflow` among the user's caches, else a temporary one.
    """
    home = os.environ.get("ASYNCFLOW_HOME")
    own = {"NUMBA_CACHE_DIR": _numba_folders(), "MPLCONFIGDIR": [_matplotlib_folder()]}
    wanted = []
    for variable, folders in own.items():
        chosen = os.environ.get(variable)
        is_usable = all(map(_can_write, folders)) and not home
        if not (_can_write(Path(chosen)) if chosen else is_usable):
            wanted.append(variable)
    if not wanted:
        return
    folder = cache_folder()
    os.environ.update({variable: str(folder / variable.lower()) for variable in wanted})
    if folder != Path(home or "").expanduser():
        tell_once("caches", f"the packages' folders or the home folder cannot be written; caches are kept in {folder}")


def cache_folder(name: str = "") -> Path:
    """Return a folder for caches that can be written: `$ASYNCFLOW_HOME` if that is set, else one of the user's.

    Args:
        name: Of a folder within it.
    """
    return next(folder for folder in _candidates() if _can_write(folder)) / name


def _numba_folders() -> Iterator[Path]:
    for package, inner in _COMPILED:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            yield Path(spec.origin).parent / inner / "__pycache__"


def _matplotlib_folder() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")) / "matplotlib"


def _candidates() -> Iterator[Path]:
    if home := os.environ.get("ASYNCFLOW_HOME"):
        yield Path(home).expanduser()
    yield Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "asyncflow"
    shared = Path(tempfile.gettempdir()) / f"asyncflow-{os.getuid()}"
    if _is_own(shared):
        yield shared
    yield Path(tempfile.mkdtemp(prefix="asyncflow-"))


def _is_own(folder: Path) -> bool:
    """Tell whether nobody else can write in a folder, which is made: what numba reads there is code."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    return not folder.is_symlink() and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _can_write(folder: Path) -> bool:
    """Tell whether files can be written in a folder, or in the nearest above it, where it would be made."""
    try:
        nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        with tempfile.TemporaryFile(dir=nearest):
            return True
    except OSError:
        return False
