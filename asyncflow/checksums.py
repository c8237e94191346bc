"""SHA-256 of the files of a checkpoint, in `checksums.json` beside them.

This file writes the checksums and compares them, whatever the files hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from pydantic import TypeAdapter, ValidationError

from asyncflow.errors import CheckpointError

NAME = "checksums.json"
_SUMS = TypeAdapter(dict[str, str])
_PIECE_BYTES = 1 << 20


def describe_folder(folder: Path) -> bytes:
    """Return what `checksums.json` is to hold: the checksum of every file in and below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return json.dumps({path.relative_to(folder).as_posix(): _checksum(path) for path in files}, indent=2).encode()


def check_folder(folder: Path, required: Collection[str]) -> None:
    """Compare every file of a checkpoint.

    Raises:
        CheckpointError: A file differs or cannot be read, the checksums cannot, or they lack one that is required.
    """
    sums = _read_sums(folder / NAME)
    if missing := sorted(set(required) - sums.keys()):
        raise CheckpointError(f"{folder / NAME}: damaged: no checksum of {', '.join(missing)}")
    for name, expected in sums.items():
        _compare(folder, name, expected)


def check_file(path: Path) -> None:
    """Compare one file of a checkpoint, and what lies in folders beside it; a file from elsewhere has no checksum.

    Raises:
        CheckpointError: A file differs or cannot be read, or the checksums cannot.
    """
    path = path.resolve()  # a link to a file of a checkpoint, too
    if not (path.parent / NAME).exists():
        return
    for name, expected in _read_sums(path.parent / NAME).items():
        if name == path.name or "/" in name:
            _compare(path.parent, name, expected)


def _read_sums(path: Path) -> dict[str, str]:
    try:
        sums = _SUMS.validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it: {error.strerror}") from None
    except ValidationError:
        raise CheckpointError(f"{path}: damaged: it must hold a checksum for each file name") from None
    for name in sums:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{path}: damaged: it names a file outside its folder: {name!r}")
    return sums


def _compare(folder: Path, name: str, expected: str) -> None:
    path = folder / name
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, or no file")
        checksum = _checksum(path)
    except (OSError, ValueError) as error:  # a name with a null character is a ValueError
        raise CheckpointError(f"{path}: cannot read it: {error}") from None
    if checksum != expected:
        raise CheckpointError(f"{path}: damaged: its checksum differs")


def _checksum(path: Path) -> str:
    sum_so_far = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            sum_so_far.update(piece)
    return sum_so_far.hexdigest()
