"""One value on the command line: how `key=value` is read, and how a value is written so that it reads back the same.

The schema says what a key holds. A text is taken as it was typed; only lists and mappings are YAML. Where a key may
also be null, the text `null` stands in quotes.
"""

from __future__ import annotations

import shlex
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from asyncflow.config.plain_values import load_yaml
from asyncflow.config.sections import Config, Section

_NULL = ("", "~", "null", "none")
_BOOLEANS = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)


def read_value(key: str, text: str) -> Any:
    """Return what a command line means by the text behind `key=`.

    What cannot be read as the key's type is returned as it stands, for the validation to refuse.

    Raises:
        yaml.YAMLError: A list or a mapping is not YAML; its constructors let other exceptions through.
    """
    kinds = [_without_limits(kind) for kind in _alternatives(_find_type(key))]
    if NoneType in kinds and text.strip().lower() in _NULL:
        return None
    kind = next((kind for kind in kinds if kind is not NoneType), Any)
    if kind is str or get_origin(kind) is Literal:
        return text[1:-1] if NoneType in kinds and _is_quoted_null(text) else text
    if kind is bool:
        return _BOOLEANS.get(text.strip().lower(), text)
    return _read_number(kind, text) if kind in (int, float) else _read_yaml(kind, text)


def _is_quoted_null(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text[1:-1].strip().lower() in _NULL


def _read_yaml(kind: Any, text: str) -> Any:
    inner = [_without_limits(each) for each in get_args(kind)]
    if get_origin(kind) in (list, dict) and set(inner) == {str}:
        return load_yaml(text, are_all_texts=True)
    value = load_yaml(text)
    if isinstance(value, list) and inner[:1] in ([int], [float]):
        return [_read_number(float, each) if isinstance(each, str) else each for each in value]
    return _read_number(float, value) if isinstance(value, str) else value  # YAML 1.1 reads 1e-4 as a text


def _find_type(key: str) -> Any:
    """Return the annotation of a dotted key, or Any for what the schema does not know."""
    found: Any = Config
    for name in key.split("."):
        found = _step_into(found, name)
    return found


def _step_into(kind: Any, name: str) -> Any:
    for each in map(_without_limits, _alternatives(kind)):
        if isinstance(each, type) and issubclass(each, Section):
            fields = each.model_fields.items()
            return next((info.annotation for field, info in fields if name in (field, info.alias)), Any)
        if get_origin(each) is dict:
            return get_args(each)[1]
    return Any


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _without_limits(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _read_number(kind: type[int] | type[float], text: str) -> Any:
    try:
        return kind(text)
    except ValueError:  # 1.5 for a whole number is refused by the validation, as a number
        return text if kind is float else _read_number(float, text)


def write_value(value: Any) -> str:
    """Return a value as it stands behind `key=`; what a shell needs on top of that is `write_override`'s."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | dict):
        line = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"), sort_keys=False)
        return line.strip()
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def write_override(key: str, value: Any) -> str:
    """Return `key=value`, quoted as a shell needs it."""
    text = write_value(value)
    if isinstance(value, str) and read_value(key, text) is None:
        text = f"'{text}'"
    return shlex.quote(f"{key}={text}")
