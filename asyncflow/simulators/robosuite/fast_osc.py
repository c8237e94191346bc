"""Operational space control of one arm of robosuite 1.5 within an environment step.

robosuite itself takes the first substep and sets the goals; the law computes the torques of the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from robosuite.controllers.parts.arm.osc import OperationalSpaceController

from asyncflow.simulators.robosuite.osc_law import OscLaw, as_slice, is_consecutive


class ArmControl:
    """The substeps of one arm after robosuite has taken the first of an environment step.

    Attributes:
        law: Its torques.
        actuate: Writes the torques of the substep that `mj_step1` has begun.
    """

    def __init__(self, robot: Any, arm: str) -> None:
        """Look up what lasts as long as the robot's controllers, which is an episode.

        Args:
            robot: robosuite's robot, whose `arm` is covered.
            arm: Its part's name.
        """
        part, sim = robot.part_controllers[arm], robot.sim
        indexes = (part.qpos_index, part.qvel_index, robot._ref_actuators_indexes_dict[arm])
        self._part = part
        self.law = OscLaw(sim, sim.model.site_name2id(part.ref_name), *map(as_slice, indexes), order="C")
        self.actuate = self.law.actuate

    def hold_goal(self) -> None:
        """Take the goal and the gains that robosuite set at the first substep."""
        part = self._part
        position, orientation = part.goal_pos, part.goal_ori
        if part.input_ref_frame == "base":
            position = part.origin_pos + np.dot(part.origin_ori, part.goal_pos)
            orientation = np.dot(part.origin_ori, part.goal_ori)
        self.law.set_goal(position, orientation, part.kp, part.kd, part.initial_joint)


def is_covered_arm(robot: Any, arm: str) -> bool:
    """Return whether `ArmControl` computes what the arm's controller would."""
    part = robot.part_controllers[arm]
    return (
        type(part) is OperationalSpaceController
        and part.uncoupling
        and part.interpolator_pos is part.interpolator_ori is None
        and part.num_ref_sites == 1
        and all(map(is_consecutive, (part.qpos_index, part.qvel_index, robot._ref_actuators_indexes_dict[arm])))
        and _is_fixed(robot.sim.model, f"{part.naming_prefix}{part.part_name}_center")
    )


def _is_fixed(model: Any, site: str) -> bool:
    """Return whether a site belongs to a body that is welded to the world, so that its velocity is zero."""
    return bool(model.body_weldid[model.site_bodyid[model.site_name2id(site)]] == 0)
