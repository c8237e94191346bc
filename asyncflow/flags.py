"""Flags of commands: their meaning and type, declared once and turned into what typer reads.

Owns how a flag is declared and what is said about a value that is no number. It must not know which commands there
are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer


def flag(meaning: str, kind: Any = str, default: Any = None, metavar: str | None = None) -> inspect.Parameter:
    """Return a flag, which is None unless it is given or has a default."""
    parser = _number_parser(kind) if kind in (int, float) else None
    option = typer.Option(help=meaning, metavar=metavar or ("NUMBER" if parser else None), parser=parser)
    annotation = Annotated[kind if default is not None else kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter("flag", inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _number_parser(kind: type[int] | type[float]) -> Callable[[Any], float]:
    """Return a parser whose complaint, unlike every typer's, names the value."""

    def parse(value: Any) -> float:
        try:
            return kind(value)
        except ValueError:
            raise typer.BadParameter(f"{value!r} is not {'a whole' if kind is int else 'a'} number") from None

    return parse


def flags(**declared: inspect.Parameter) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Turn the `**flags` of a command into those declared; typer reads a command's signature."""

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        added = [each.replace(name=name) for name, each in declared.items()]
        command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in [*own, *added]}
        return command

    return decorate
