"""Suites: names that stand for several tasks, wherever a task is named (`env.task`, `env.tasks`).

An entry of `SUITES` is all that a new one needs.
"""

from __future__ import annotations

from collections.abc import Iterable

TOY_GOALS = {"ToyGreen": "reach the green goal", "ToyBlue": "reach the blue goal"}  # toys, and what they are told

SUITES: dict[str, tuple[str, ...]] = {"ToyLanguage": tuple(TOY_GOALS)}
MAX_NAMED = 3  # tasks in a label


def expand(names: Iterable[str]) -> list[str]:
    """Return names of tasks, those of a suite in its place."""
    return [task for name in names for task in SUITES.get(name, (name,))]


def label(tasks: list[str]) -> str:
    """Return what several tasks are called together: their suite, or their own names."""
    for name, members in SUITES.items():
        if tuple(tasks) == members:
            return name
    rest = len(tasks) - MAX_NAMED
    return "+".join(tasks[:MAX_NAMED]) + (f"+{rest}" if rest > 0 else "")
