"""Words for a broken contract of code from elsewhere: what it was asked, what came, and what is expected."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Mapping
from typing import Any

from asyncflow.errors import ConfigError, ContractError


def check_callable(function: Any, name: str, arguments: tuple[Any, ...]) -> None:
    """Refuse what cannot be called with some arguments, as far as its signature tells.

    Raises:
        ContractError: It cannot.
    """
    if not callable(function):
        raise broken(name, "is", function, f"a function of {len(arguments)} argument(s)")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some that are written in C have none
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ContractError(f"{name}{signature} cannot be called with {len(arguments)} argument(s): {error}") from None


def check_count(function: str, name: str, value: Any) -> int:
    """Return a number that a function's argument counts something with.

    Raises:
        ConfigError: It is not whole, or below 1.
    """
    if not isinstance(value, numbers.Real) or not float(value).is_integer() or value < 1:
        raise ConfigError(f"{function}({name}={value!r}): must be a whole number, at least 1")
    return int(float(value))


def broken(what: str, verb: str, came: Any, expected: str) -> ContractError:
    """Return the error of a broken contract: what was asked, what came, and what is expected."""
    return ContractError(f"{what} {verb} {describe(came)}; expected {expected}")


def name_of(thing: Any) -> str:
    """Return how messages name an object: its class and where that is from."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def describe(value: Any) -> str:
    """Return a few words on a value that was not expected."""
    if getattr(value, "requires_grad", False):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, that requires a gradient"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} of shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {sorted(map(str, value))}"
    if isinstance(value, (tuple, list)):
        parts = ", ".join(describe(part) for part in value[:4])
        return f"a {type(value).__name__} of {len(value)}: {parts}{', ...' if len(value) > 4 else ''}"
    is_plain = value is None or isinstance(value, (str, bool, numbers.Number))
    return _shorten(repr(value)) if is_plain else f"a {name_of(value)}"


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."
