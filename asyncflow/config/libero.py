"""LIBERO's suites and tasks by name, and the settings from which one of its simulators is built.

Needs the standard library alone: `asyncflow tasks` and the check of a configuration answer at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from asyncflow.errors import ConfigError

PREFIX = "libero_"  # of every suite's name
ARM_KEYS = ("robot0_eef_pos", "robot0_eef_axis_angle", "robot0_gripper_qpos")  # the 8 numbers of published policies
CAMERAS = ("agentview", "robot0_eye_in_hand")  # those of published policies
DEFAULTS: dict[str, Any] = {"num_steps_wait": 10, "rotate_images": True}  # of what a policy file keeps otherwise


@dataclass(frozen=True)
class Suite:
    """Tasks that are trained and evaluated together.

    Attributes:
        num_tasks: How many.
        horizon: Env steps until an episode is truncated, those of the published evaluations.
        summary: What sets its tasks apart.
    """

    num_tasks: int
    horizon: int
    summary: str


LIBERO_SUITES = {
    "libero_spatial": Suite(10, 220, "put a bowl onto a plate: ten places of the bowl"),
    "libero_object": Suite(10, 280, "put a thing into a basket: ten things"),
    "libero_goal": Suite(10, 300, "ten goals in one scene"),
    "libero_10": Suite(10, 520, "ten long tasks of two parts each"),
    "libero_90": Suite(90, 400, "ninety short tasks in twenty scenes"),
}


class LiberoTask(NamedTuple):
    """One task: its suite, and its place there, counted from 0 in the benchmark's own order."""

    suite: str
    number: int

    @property
    def name(self) -> str:
        """What `env.task` calls it."""
        return f"{self.suite}/{self.number}"

    @property
    def horizon(self) -> int:
        """Env steps until an episode is truncated."""
        return LIBERO_SUITES[self.suite].horizon


def is_libero(name: str) -> bool:
    """Tell whether `env.task` means one of LIBERO's tasks or suites, perhaps with a mistake in it."""
    return name.startswith(PREFIX)


def list_tasks(name: str) -> list[LiberoTask]:
    """Return the tasks that a name means: `libero_goal` all of a suite, `libero_goal/3` one of them.

    Raises:
        ConfigError: There is no such suite or task; one line.
    """
    suite, slash, text = name.partition("/")
    if suite not in LIBERO_SUITES:
        raise ConfigError(f"env.task = {name}: LIBERO has no suite {suite!r}; suites: {', '.join(LIBERO_SUITES)}")
    last = LIBERO_SUITES[suite].num_tasks - 1
    if not slash:
        return [LiberoTask(suite, number) for number in range(last + 1)]
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) > last:
        raise ConfigError(f"env.task = {name}: {suite} has the tasks {suite}/0 to {suite}/{last}")
    return [LiberoTask(suite, int(text))]


def find_benchmark() -> Path | None:
    """Return the folder of the benchmark's package, `libero.libero`, in this interpreter; None where it is missing."""
    spec = find_spec("libero")
    folders = [] if spec is None else [Path(place) / "libero" for place in spec.submodule_search_locations or []]
    return next((folder for folder in folders if (folder / "__init__.py").is_file()), None)
