"""A checkpoint that robomimic saved (`.pth`): which algorithm made it, and in which environment.

Torch's pickled files are read in the zip format and in the one before it. A pickle is a program, a stranger's is a
hostile one: here it may build tensors, numpy arrays and plain containers, and call nothing else.
`torch.load(weights_only=True)` executes it under that rule, `ALLOWED` narrows the rule further, and numpy's functions
are replaced by ones that know numbers and text only. Before that, a dry run checks every size that the pickle claims.
"""

from __future__ import annotations

import io
import json
import pickletools
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from asyncflow.config.pickle_sizes import ELEMENT_BYTES, NUMPY_MODULES, SizeCheck, check_dtype
from asyncflow.config.plain_values import is_deep
from asyncflow.errors import CheckpointError

SUFFIXES = (".pth", ".pt")
MAX_NAMED = 8
MAX_META_CHARACTERS = 1 << 22  # a few thousand in practice; containers that repeat each other grow without limit
NUM_LEGACY_PICKLES = 5  # of the format before zip: magic number, version, system, content, keys of storages
ZIP_START = b"PK\x03\x04"
MAX_DTYPE_BYTES = 1 << 20  # of one number or text; a file's own size was checked before
# Every name that the pickle of a checkpoint may hold. Python 2 called its builtins `__builtin__`, as torch still does.
ALLOWED = {
    "collections.OrderedDict", "torch.Size", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter",
    "_codecs.encode", "__builtin__.set", "__builtin__.bytes", "numpy.ndarray", "numpy.dtype",
    *(f"torch.{number}Storage" for number in ELEMENT_BYTES),
    *(f"{module}.{name}" for module in NUMPY_MODULES for name in ("_reconstruct", "scalar")),
}  # fmt: skip


@dataclass(frozen=True)
class RobomimicFile:
    """The parts of a robomimic checkpoint that asyncflow uses.

    Attributes:
        algo_name: robomimic's name of the algorithm, such as `bc`.
        env_meta: robomimic's description of the environment.
    """

    algo_name: str
    env_meta: dict[str, Any]


def load_robomimic_file(path: Path) -> RobomimicFile:
    """Read a checkpoint that robomimic saved.

    Raises:
        CheckpointError: As `load_restricted`, or the content is not robomimic's; one line.
    """
    content = load_restricted(path)
    missing = [key for key in ("algo_name", "env_metadata") if not isinstance(content, dict) or key not in content]
    if missing:
        raise CheckpointError(f"{path}: not a robomimic checkpoint: it has no {' and no '.join(missing)}")
    env_meta = _to_plain(content["env_metadata"], path)
    if not isinstance(content["algo_name"], str) or not isinstance(env_meta, dict):
        raise CheckpointError(f"{path}: not a robomimic checkpoint: algo_name must be text, env_metadata a mapping")
    return RobomimicFile(content["algo_name"], env_meta)


def _to_plain(value: Any, path: Path) -> Any:
    """Return a value as JSON would give it back."""
    pieces, num_characters = [], 0
    try:
        for piece in json.JSONEncoder(default=_list_of).iterencode(value):
            num_characters += len(piece)
            if num_characters > MAX_META_CHARACTERS:
                raise ValueError
            pieces.append(piece)
        plain = json.loads("".join(pieces))
    except (TypeError, ValueError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: env_metadata is no mapping of plain values, or a huge one") from None
    if is_deep(plain):
        raise CheckpointError(f"{path}: env_metadata is deeply nested")
    return plain


def _list_of(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError


def load_restricted(path: Path) -> Any:
    """Read what `torch.save` wrote, on the CPU; nothing that the file names is executed.

    Raises:
        CheckpointError: The file cannot be read, is damaged, is no file of `torch.save`, or holds anything but
            tensors, arrays of numbers or text, and plain containers; one line that names what was refused.
    """
    try:
        refused = sorted(set(_find_globals(path)) - ALLOWED)
        if refused:
            raise CheckpointError(f"refused, as it holds more than tensors, arrays and containers: {_say(refused)}")
        _check_sizes(path)
        return _load(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it: {error.strerror or 'damaged'}") from None
    except Exception:  # a damaged or hostile file can make a parser raise anything, MemoryError included
        raise CheckpointError(f"{path}: damaged, truncated, or not written by torch.save") from None


def _say(names: list[str]) -> str:
    """Return names that a stranger chose, without control characters and not too many of them."""
    rest = len(names) - MAX_NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return ", ".join(ascii(name[:80])[1:-1] for name in names[:MAX_NAMED]) + more


def _load(path: Path) -> Any:
    builders: list[Any] = [(_Array, "numpy.ndarray"), (_DType, "numpy.dtype"), (_build_bytes, "builtins.bytes")]
    builders += [(_Array, f"{module}._reconstruct") for module in NUMPY_MODULES]
    builders += [(_build_scalar, f"{module}.scalar") for module in NUMPY_MODULES]
    with warnings.catch_warnings(), torch.serialization.safe_globals(builders):
        warnings.simplefilter("ignore")  # about pickle protocols that it then refuses
        return torch.load(path, map_location="cpu", weights_only=True)


def _find_globals(path: Path) -> Iterator[str]:
    """Yield every name of a function or class that a file's pickles hold; none of them is executed."""
    with path.open("rb") as file:
        if file.read(len(ZIP_START)) == ZIP_START:
            yield from _find_in_pickle(io.BytesIO(_read_zipped_pickle(path)))
            return
        file.seek(0)
        try:
            for _ in range(NUM_LEGACY_PICKLES):
                yield from _find_in_pickle(file)
        except ValueError:  # no pickle, or its end: torch says what is wrong, by the same rules
            return


def _check_sizes(path: Path) -> None:
    """Refuse a file that claims to hold more than it does, before torch allocates what is claimed."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(ZIP_START)) == ZIP_START:
            sizes = _record_sizes(path)
            SizeCheck(io.BytesIO(_read_zipped_pickle(path)), num_bytes, lambda key: sizes[f"data/{key}"]).load()
            return
        file.seek(0)
        for _ in range(NUM_LEGACY_PICKLES):
            SizeCheck(file, num_bytes, None).load()


def _record_sizes(path: Path) -> dict[str, int]:
    """Return the sizes of a zip file's records, by their names below the folder that holds them all."""
    with zipfile.ZipFile(path) as archive:
        return {record.filename.partition("/")[2]: record.file_size for record in archive.infolist()}


def _read_zipped_pickle(path: Path) -> bytes:
    """Return the one pickle of a zip file that unpacks to no more than its own size."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        is_stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
        if not is_stored or sum(record.file_size for record in records) > path.stat().st_size:
            raise CheckpointError("refused: compressed or overlapping records, which torch.save never writes")
        (name,) = (record.filename for record in records if record.filename.endswith("/data.pkl"))
        return archive.read(name)


def _find_in_pickle(file: IO[bytes]) -> Iterator[str]:
    texts = ["", ""]
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":  # of newer protocols, which torch refuses: module and name, as a rule
            yield ".".join(texts[-2:])
        elif isinstance(argument, str):
            texts.append(argument)


class _DType:
    """Stands in for `numpy.dtype`, whose own unpickling trusts the file: numbers and text, no objects or records."""

    def __init__(self, name: str, *_: object) -> None:
        check_dtype(name, MAX_DTYPE_BYTES)
        self.value: np.dtype[Any] = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.value = self.value.newbyteorder(state[1])


class _Array(np.ndarray[Any, np.dtype[Any]]):
    """An array whose bytes come from a file; stands in for `numpy.ndarray` and for the function that makes one."""

    def __new__(cls, *_: object) -> _Array:
        return super().__new__(cls, (0,))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, is_fortran, data = state
        super().__setstate__((version, shape, _value_of(dtype), is_fortran, data))


def _value_of(dtype: _DType) -> np.dtype[Any]:
    if not isinstance(dtype, _DType):
        raise TypeError
    return dtype.value


def _build_scalar(dtype: _DType, data: bytes) -> Any:
    return np.frombuffer(data, _value_of(dtype), count=1)[0]


def _build_bytes(*_: object) -> bytes:
    """Return no bytes: only those of empty arrays are written in this way."""
    return b""
