"""Scripted experts: what they do in a task, observation by observation.

An expert knows its task; `record` runs and records its episodes.

Shapes: A action size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Obs = dict[str, NDArray[Any]]


class Expert(Protocol):
    """Decides on one action at a time; one instance an episode."""

    def act(self, obs: Obs) -> Array:
        """Return the next action, [A], before noise and clipping."""


class LiftExpert:
    """Grasps the cube from above and lifts it: hover, descend, close, lift."""

    hover_height = 0.06  # metres above the cube
    tolerance = 0.015  # metres at which hovering and descending are done
    gain = 1.2
    full_action = 0.05  # metres that an action of 1 asks for
    max_action = 0.4  # of the full speed, so that a chunk executed open-loop does not overshoot
    closing_steps = 6

    def __init__(self, grasp_offset: float = 0.0) -> None:
        """Start an episode; the expert misjudges the cube's place by `grasp_offset` metres along x."""
        self._offset = np.array([grasp_offset, 0.0, 0.0])
        self._phase = "hover"
        self._steps_closing = 0

    def act(self, obs: Obs) -> Array:
        """Return a proportional move towards the phase's target, [7]."""
        gripper, cube = obs["robot0_eef_pos"], obs["object"][:3] + self._offset
        self._advance(gripper, cube)
        action = np.zeros(7)
        move = self.gain * (self._target(gripper, cube) - gripper) / self.full_action
        action[:3] = move.clip(-self.max_action, self.max_action)
        action[6] = -1.0 if self._phase in ("hover", "descend") else 1.0
        return action

    def _target(self, gripper: Array, cube: Array) -> Array:
        up = np.array([0.0, 0.0, 1.0])
        targets: dict[str, Array] = {
            "hover": cube + self.hover_height * up,
            "lift": gripper + 2 * self.full_action * up,
        }
        return targets.get(self._phase, cube)

    def _advance(self, gripper: Array, cube: Array) -> None:
        """Enter the next phase once this one's aim is reached."""
        is_there = float(np.linalg.norm(self._target(gripper, cube) - gripper)) < self.tolerance
        if self._phase == "hover" and is_there:
            self._phase = "descend"
        elif self._phase == "descend" and is_there:
            self._phase = "close"
        elif self._phase == "close":
            self._steps_closing += 1
            if self._steps_closing > self.closing_steps:
                self._phase = "lift"


EXPERTS: dict[str, Callable[[float], Expert]] = {"Lift": LiftExpert}
