"""Sizes that a file of `torch.save` claims, checked against the file's own before anything is allocated.

The pickle is run dry: tensors and arrays are counted and not built. Every size that a pickle names (of a storage, a
view, an array, a number) is checked, every call that copies something is counted, and what is hashed is plain: nested
tuples take a time that grows exponentially, and a deep one overflows the stack.
"""

from __future__ import annotations

import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import IO, Any, ClassVar, NamedTuple

from asyncflow.errors import CheckpointError

ELEMENT_BYTES = {
    "Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
}  # fmt: skip
NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")  # of numpy 1 and 2
MAX_KEY = 1 << 61  # larger integers can be chosen to collide in a dictionary
_Unpickler: Any = pickle._Unpickler  # the one in Python: of C's, neither stack nor opcodes can be seen
_PLAIN = (str, bytes, int, float, type(None))
_ENCODINGS = ("latin1", "latin-1")  # with which pickles of old protocols hold bytes


def check_dtype(name: str, num_bytes: int) -> None:
    """Refuse a type of numpy's that is no number or text, or of which one is larger than `num_bytes`.

    Raises:
        CheckpointError: See above.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[biufcSU][1-9]\d{0,8}", name):
        raise CheckpointError(f"refused a numpy array of dtype {str(name)[:80]!a}: only numbers and text")
    if _dtype_bytes(name) > num_bytes:
        raise _too_large(f"a numpy dtype {name}")


def _dtype_bytes(name: str) -> int:
    return int(name[1:]) * (4 if name[0] == "U" else 1)


def _too_large(what: str) -> CheckpointError:
    return CheckpointError(f"refused: {what}, larger than what the file holds of it")


class SizeCheck(_Unpickler):  # type: ignore[misc]
    """Reads one pickle without building anything of a size that the file only claims."""

    dispatch: ClassVar[dict[int, Any]] = dict(_Unpickler.dispatch)

    def __init__(self, file: IO[bytes], num_bytes: int, record_bytes: Callable[[str], int] | None) -> None:
        """Prepare to `load`.

        Args:
            file: Where the pickle begins.
            num_bytes: What all tensors, arrays and copies together may take: the whole file's size.
            record_bytes: Key of a storage -> bytes of its record; None where storages follow the pickles.
        """
        super().__init__(file)
        self._left = num_bytes
        self._record_bytes = record_bytes
        self._seen: set[str] = set()
        self._builders: dict[str, Any] = {
            "collections.OrderedDict": self._build_dict,
            "torch.Size": self._build_size,
            "torch._utils._rebuild_tensor_v2": self._build_tensor,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "_codecs.encode": self._encode,
            "__builtin__.set": self._build_set,
            "__builtin__.bytes": lambda *_: b"",
            "numpy.ndarray": None,
            "numpy.dtype": lambda name, *_: _DType(name, num_bytes),
            **{f"torch.{kind}Storage": size for kind, size in ELEMENT_BYTES.items()},
            **{f"{module}._reconstruct": lambda *_: _Array(self._spend) for module in NUMPY_MODULES},
            **{f"{module}.scalar": self._build_scalar for module in NUMPY_MODULES},
        }

    def find_class(self, module: str, name: str) -> Any:
        """Return what counts in place of a class or function."""
        return self._builders[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        """Check a storage's size against its record, or count it; one that was seen before is the same one."""
        kind, element_bytes, key, _, num_elements, *_ = pid
        if kind != "storage" or not isinstance(element_bytes, int) or not isinstance(key, str):
            raise TypeError(kind)
        needed = _count(num_elements) * element_bytes
        if self._record_bytes is not None:
            if needed > self._record_bytes(key):
                raise _too_large(f"a storage of {num_elements} numbers")
        elif key not in self._seen:
            self._spend(needed, f"a storage of {num_elements} numbers")
        self._seen.add(key)
        return _Storage(num_elements)

    def _spend(self, num_bytes: int, what: str) -> None:
        self._left -= num_bytes
        if self._left < 0:
            raise _too_large(what)

    def _build_dict(self, items: Iterable[Any] = ()) -> OrderedDict[Any, Any]:
        pairs = list(items.items() if isinstance(items, dict) else items)
        self._spend(len(pairs), "copies of a mapping")
        _require_plain(key for key, _ in pairs)
        return _Dict(pairs)

    def _build_size(self, sizes: Iterable[Any] = ()) -> tuple[Any, ...]:
        size = tuple(sizes)
        self._spend(len(size), "copies of a shape")
        return size

    def _build_set(self, items: Iterable[Any] = ()) -> set[Any]:
        members = list(items)
        self._spend(len(members), "copies of a set")
        _require_plain(members)
        return set(members)

    def _encode(self, text: str, encoding: str) -> bytes:
        if encoding not in _ENCODINGS:
            raise CheckpointError(f"refused: bytes encoded as {str(encoding)[:20]!a}")
        self._spend(len(text), "copies of bytes")
        return text.encode("latin1")

    def _build_tensor(self, storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> None:
        """Check that a view lies within its storage and is not larger: an expanded one would be when it is copied."""
        last = _count(offset) + sum((_count(n) - 1) * _count(step) for n, step in zip(size, stride, strict=True))
        num_elements = math.prod(size)
        if num_elements > storage.num_elements or (num_elements and last >= storage.num_elements):
            raise _too_large(f"a tensor of shape {list(size)}")

    def _build_scalar(self, dtype: _DType, data: bytes) -> None:
        if dtype.num_bytes != len(data):
            raise _too_large("a number of numpy's")

    def load_setitem(self) -> None:
        """Check a key before it is hashed."""
        _require_plain(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        """Check keys before they are hashed."""
        _require_plain(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        """Check keys before they are hashed."""
        _require_plain(self.stack[::2])
        super().load_dict()

    def refuse(self) -> None:
        """Refuse what torch's unpickler refuses as well."""
        raise pickle.UnpicklingError

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    for _code in (pickle.ADDITEMS, pickle.FROZENSET, pickle.INST, pickle.OBJ, pickle.STACK_GLOBAL):
        dispatch[_code[0]] = refuse


class _Dict(OrderedDict[Any, Any]):
    """Takes the attributes that a pickle gives to an `OrderedDict`, such as a state dict's `_metadata`."""


class _Storage(NamedTuple):
    """A storage's length; nothing in a pickle can change it afterwards."""

    num_elements: int


class _DType:
    def __init__(self, name: str, num_bytes: int) -> None:
        check_dtype(name, num_bytes)
        self.num_bytes = _dtype_bytes(name)

    def __setstate__(self, state: Any) -> None:
        pass  # the byte order


class _Array:
    def __init__(self, spend: Callable[[int, str], None]) -> None:
        self._spend = spend

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, _, data = state
        num_bytes = math.prod(_count(n) for n in shape) * dtype.num_bytes
        # An empty array may have any of its other dimensions, each of which becomes a list when it is made plain.
        at_least = math.prod(max(n, 1) for n in shape)
        self._spend(max(num_bytes, at_least, len(data)), f"an array of shape {list(shape)}")
        if num_bytes != len(data):
            raise _too_large(f"an array of shape {list(shape)}")


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise TypeError(value)
    return value


def _require_plain(keys: Iterable[Any]) -> None:
    for key in keys:
        if not isinstance(key, _PLAIN) or (isinstance(key, int) and abs(key) > MAX_KEY):
            raise CheckpointError("refused: a key that is neither text nor a number")
