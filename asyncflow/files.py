"""Files: written whole or not at all, never over what somebody still needs, on whatever file system there is.

Network folders, FUSE folders and containers may know no locks, no symbolic links and no flushing of folders. asyncflow
does without, and says so once.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from asyncflow.errors import ConfigError
from asyncflow.terminal import tell_once

_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_UNSUPPORTED_OF_FOLDERS = _UNSUPPORTED | {errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR}
_MAX_TARGET = 255  # bytes of a name, which is all that a file in a link's place holds


def expand_user(name: str) -> Path:
    """Return a path with `~` replaced; as it is where there is no such user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def check_output(path: Path, overwrite: bool, inputs: Iterable[str | Path | None] = ()) -> None:
    """Find out, before any work is done for it, whether a file may and can be written.

    Args:
        path: The file.
        overwrite: Whether an older file may be replaced.
        inputs: What is read for it, which is never replaced; None and what does not exist are passed over.

    Raises:
        ConfigError: It exists and may not be replaced, or lies where nothing can be written.
    """
    try:
        found = _lstat(path)
        if found is not None:
            _check_replaceable(path, found.st_mode, overwrite, inputs)
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        longest = os.pathconf(folder, "PC_NAME_MAX") if folder.is_dir() else 0
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out {path}: {getattr(error, 'strerror', None) or error}") from None
    if not longest or not os.access(folder, os.W_OK):
        raise ConfigError(f"--out {path}: cannot write in {folder}")
    for part in path.parts:
        if len(os.fsencode(part)) > longest:
            raise ConfigError(f"--out {path}: {os.strerror(errno.ENAMETOOLONG)}; at most {longest} bytes")


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _check_replaceable(path: Path, mode: int, overwrite: bool, inputs: Iterable[str | Path | None]) -> None:
    if stat.S_ISDIR(mode):
        raise ConfigError(f"--out {path}: is a folder; give a file name")
    for name in inputs:
        if name is not None and path.exists() and Path(name).exists() and path.samefile(name):
            raise ConfigError(f"--out {path}: is the same file as {name}, which is read; give another name")
    if not stat.S_ISREG(mode):
        kind = f"a symbolic link to {path.readlink()}" if stat.S_ISLNK(mode) else "no regular file"
        raise ConfigError(f"--out {path}: is {kind}, which is not replaced; give another name")
    if not overwrite:
        raise ConfigError(f"--out {path}: the file exists; choose another name or pass --overwrite")


def make_new_folder(folder: Path) -> Path:
    """Create a folder that nobody has, of this name or with `_2`, `_3` and so on behind it; return it.

    Raises:
        OSError: It cannot be created.
    """
    for number in itertools.count(1):
        name = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        try:
            name.mkdir(parents=True)
        except FileExistsError:
            continue
        return name
    raise AssertionError


def temporary_name(path: Path) -> Path:
    """Return the name beside a file under which it is written; no longer than the file system takes."""
    return path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old content or the new one, never a part; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
        publish_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish_file(temporary: Path, path: Path) -> None:
    """Give a finished file or folder of the same folder its final name, once its bytes are on the disk."""
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)  # the name itself is data of the folder


def _flush(path: Path) -> None:
    unsupported = _UNSUPPORTED_OF_FOLDERS if path.is_dir() else _UNSUPPORTED
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in unsupported:
            raise
        text = f"{path}: this file system cannot flush it ({error.strerror}); a power failure may lose the newest files"
        tell_once("fsync", text)


def point_at(link: Path, name: str) -> None:
    """Let `link` mean the file or folder `name` beside it; a reader sees the old meaning or the new one.

    Where there are no symbolic links, `link` is a file that holds the name; `follow` reads both.
    """
    temporary = temporary_name(link)
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(name)
    except OSError as error:
        if error.errno not in _UNSUPPORTED_OF_FOLDERS:
            raise
        write_atomically(link, f"{name}\n".encode())
        text = f"{link}: this file system has no symbolic links ({error.strerror}); a text file names {name} instead"
        tell_once("symlink", text)
        return
    os.replace(temporary, link)


def follow(link: Path) -> Path:
    """Return what a link of `point_at` means, or the path itself where it is no such link."""
    try:
        if link.is_symlink() or not link.is_file() or link.stat().st_size > _MAX_TARGET + 1:
            return link
        name = link.read_bytes().decode().strip()
    except (OSError, ValueError):
        return link
    is_name = name not in ("", ".", "..") and Path(name).name == name and "\0" not in name
    return link.with_name(name) if is_name and link.with_name(name).exists() else link


def lock_file(path: Path) -> int | None:
    """Create a file and lock it until this process ends or closes the descriptor that is returned.

    Returns:
        The descriptor; None if another process holds the lock.

    Raises:
        OSError: The file cannot be written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        text = f"{path}: this file system has no locks ({error.strerror}); see to it that no other process trains there"
        tell_once("flock", text)
    return descriptor
