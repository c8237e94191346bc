"""Tasks of a run: suites, names that stand for several tasks (`env.task`, `env.tasks`), and the facts about a task.

An entry of `SUITES` is all that a new one needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from asyncflow.config.libero import LIBERO_SUITES
from asyncflow.config.task_table import own_name

TOY_GOALS = {"ToyGreen": "go green", "ToyBlue": "go blue"}  # toys, and what they are told

SUITES: dict[str, tuple[str, ...]] = {
    "ToyLanguage": tuple(TOY_GOALS),
    **{name: tuple(f"{name}/{index}" for index in range(suite.num_tasks)) for name, suite in LIBERO_SUITES.items()},
}
MAX_NAMED = 3  # tasks in a label


@dataclass(frozen=True)
class TaskSpec:
    """One of the tasks that environments are spread over.

    Attributes:
        name: As `env.tasks` has it.
        instruction: What the robot is told to do, in words; empty if nothing is.
        horizon: Env steps until an episode is truncated.
        num_start_states: Start states that the benchmark keeps of it; 0: every episode draws its own.
    """

    name: str
    instruction: str
    horizon: int
    num_start_states: int = 0


def expand(names: Iterable[str]) -> list[str]:
    """Return names of tasks, those of a suite in its place."""
    return [task for name in names for task in SUITES.get(name, (name,))]


def settle_tasks(env: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of `env` with suites expanded, and with `tasks` of several or none: one alone is `task`."""
    named = env.get("tasks") or [env.get("task", "Lift")]
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        return env  # the validation will say what is wrong with them
    tasks = expand(map(own_name, named))
    return {**env, **({"task": tasks[0], "tasks": []} if len(tasks) == 1 else {"tasks": tasks})}


def label(tasks: list[str]) -> str:
    """Return what several tasks are called together: their suite, or their own names."""
    for name, members in SUITES.items():
        if tuple(tasks) == members:
            return name
    rest = len(tasks) - MAX_NAMED
    return "+".join(tasks[:MAX_NAMED]) + (f"+{rest}" if rest > 0 else "")
