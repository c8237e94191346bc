"""Flags of commands: their meaning and type, declared once and turned into what typer reads.

A value that is no number is refused here, in one line.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any

import typer

Preset = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="NAME|FILE",
        parser=expanduser,
        help="Preset or YAML file; the task's own by default.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Any key of `asyncflow config`, such as algorithm.clip_coef=0.02."),
]
Checkpoint = Annotated[
    str,
    typer.Argument(
        parser=expanduser,
        help="A run folder, a checkpoint folder, a .safetensors file, or the shipped weights lift_flow.",
    ),
]


def flag(meaning: str, kind: Any = str, default: Any = None, metavar: str | None = None) -> inspect.Parameter:
    """Return a flag, which is None unless it is given or has a default; of kind `Path` it is a text all the same."""
    is_number = kind in (int, float)
    parser = _number_parser(kind) if is_number else expanduser if kind is Path else None
    option = typer.Option(help=meaning, metavar=metavar or ("NUMBER" if is_number else None), parser=parser)
    kind = str if kind is Path else kind
    annotation = Annotated[kind if default is not None else kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter("flag", inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _number_parser(kind: type[int] | type[float]) -> Callable[[Any], float]:
    """Return a parser whose complaint, unlike every typer's, names the value."""

    def parse(value: Any) -> float:
        try:
            number = kind(value)
        except ValueError:
            raise typer.BadParameter(f"{value!r} is not {'a whole' if kind is int else 'a'} number") from None
        if kind is float and not math.isfinite(number):
            raise typer.BadParameter(f"{value!r} is not a finite number")
        return number

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


def split(text: str | None) -> list[Any]:
    """Return the parts of a comma-separated flag, numbers as numbers."""
    parts = (part.strip() for part in (text or "").split(","))
    return [int(part) if part.isdecimal() else part for part in parts if part]
