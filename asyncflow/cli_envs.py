"""`asyncflow envs`: which interpreter simulates what, and the commands that make, check and remember one."""
# ruff: noqa: PLC0415  see cli.py

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncflow.config.interpreters import KINDS, has_kind, remembered
from asyncflow.errors import ConfigError
from asyncflow.flags import flag as _flag
from asyncflow.flags import flags as _flags
from asyncflow.terminal import complain

if TYPE_CHECKING:
    from asyncflow.envs.interpreters import Built

app = typer.Typer(
    help="List kinds of simulators and their interpreters; check them, or install one.",
    epilog="Start with: asyncflow envs check",
    add_completion=False,
)
_Kind = Annotated[str, typer.Argument(metavar="KIND", help=f"One of {', '.join(KINDS)}.")]
_Kinds = Annotated[
    list[str] | None, typer.Argument(metavar="KIND", help="Some of them; all that are there by default.")
]
_Python = Annotated[str, typer.Argument(metavar="PYTHON", help="An interpreter, or the folder of its environment.")]


@app.callback(invoke_without_command=True)
def envs(context: typer.Context) -> None:
    """List kinds of simulators, and which interpreter each would use."""
    if context.invoked_subcommand is not None:
        return
    from asyncflow.metrics.console import ConsoleReporter

    rows = [[kind, _name_interpreter(kind), each.summary] for kind, each in KINDS.items()]
    ConsoleReporter().table(["kind", "interpreter", "what it simulates"], rows)


def _name_interpreter(kind: str) -> str:
    try:
        return remembered(kind) or ("this one" if has_kind(kind) else f"none; asyncflow envs install {kind}")
    except ConfigError as error:
        return str(error)


@app.command("check")
@_flags(python=_flag("Interpreter to check instead of the one that a run would use.", Path, metavar="PATH"))
def check_kinds(kinds: _Kinds = None, **flags: Any) -> int:
    """Build one simulator of each kind, as a run does, and say which versions simulate."""
    for kind in kinds or []:
        _check_name(kind)
    from asyncflow.envs.interpreters import check

    code = 0
    for kind in kinds or [kind for kind in KINDS if has_kind(kind) or remembered(kind)]:
        try:
            print(_describe(kind, check(kind, flags["python"])), flush=True)
        except ConfigError as error:  # noqa: PERF203  the other kinds are checked, too
            code = complain(f"{kind}: {error}")
    return code


@app.command("install")
@_flags(python=_flag("Interpreter to make the environment from; one that fits by default.", Path, metavar="PATH"))
def install_kind(kind: _Kind, **flags: Any) -> int:
    """Make an environment with the packages of a kind, check it, and remember it."""
    _check_name(kind)
    from asyncflow.envs.interpreters import install

    print(_describe(kind, install(kind, flags["python"], lambda line: print(line, flush=True))))
    return 0


@app.command("use")
def use_interpreter(kind: _Kind, python: _Python) -> int:
    """Check an interpreter that is there already, and remember it for a kind."""
    _check_name(kind)
    from asyncflow.envs.interpreters import use

    print(_describe(kind, use(kind, python)))
    return 0


def _check_name(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"{kind}: no kind of simulators; kinds: {', '.join(KINDS)}")


def _describe(kind: str, built: Built) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in built.versions.items())
    return f"{kind}: {built.task} built in {built.wall_s:.1f} s by {built.python} ({versions})"
