"""Operational space control of one arm, without what stays the same within an environment step.

Computes the torques of robosuite's `OperationalSpaceController` at every substep but the first, in robosuite's
arithmetic and order, so that they are equal bit for bit. What is left out yields nothing: looking up names, Jacobians
computed four times, the velocity of a base that cannot move, goals transformed again, limits read again. robosuite
itself takes the first substep and sets the goals.

How a matrix product rounds can depend on where its operands lie: OpenBLAS's kernels for processors with SSE3 alone,
which numpy 1.26 also runs on newer ones that it does not know, sum in another order when a matrix does not begin at a
multiple of 16 bytes. robosuite's matrices are arrays of their own, which the allocator aligns to 16 bytes and no more.
So here, too, every matrix begins there, in robosuite's memory order: equal on every processor on which robosuite
itself is repeatable.

The law is that of Khatib, "A unified approach for motion and force control of robot manipulators" (1987).

Shapes: J joints of the arm.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray
from robosuite.controllers.parts.arm.osc import OperationalSpaceController
from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error
from robosuite.utils.numba import jit_decorator

Array = NDArray[np.float64]


# Where the parts of `wrench` begin: force, torque, transposed inertias. Even numbers of float64 keep matrices aligned.
_FORCE, _TORQUE, _INERTIA_POS, _INERTIA_ORI, _WRENCH_SIZE = 0, 4, 8, 18, 28


def _operational_space_law(
    task: Array, joints: Array, mass: Array, jacobians: tuple[Array, Array, Array], wrench: Array
) -> None:
    """Compute the operational-space wrench and the null-space torques, but for the products that need numpy.

    Compiled products go through SciPy's BLAS, numpy's through its own, and the two may round differently: here are
    only those that robosuite compiles as well.

    Args:
        task: [14, 3] goal position (1 row), goal orientation (3); position (1), orientation (3), velocity (1) and
            angular velocity (1) of the gripper's site, in the world; stiffness (2) and damping (2).
        joints: [4, J] initial position, position, velocity; its last row receives the null-space torques.
        mass: [J, J] inertia of the joints.
        jacobians: [6, J] of the site, then its position's and its orientation's, [3, J], which are to be aligned, too.
        wrench: [28] receives force, torque and the transposed inertias that they belong to.
    """
    wrench[_FORCE : _FORCE + 3] = (task[0] - task[4]) * task[10] + (-task[8]) * task[12]
    wrench[_TORQUE : _TORQUE + 3] = orientation_error(task[1:4], task[5:8]) * task[11] + (-task[9]) * task[13]
    _, inertia_pos, inertia_ori, nullspace = opspace_matrices(mass, jacobians[0], jacobians[1], jacobians[2])
    wrench[_INERTIA_POS : _INERTIA_POS + 9].reshape(3, 3)[:] = inertia_pos.T
    wrench[_INERTIA_ORI : _INERTIA_ORI + 9].reshape(3, 3)[:] = inertia_ori.T
    joints[3] = nullspace_torques(mass, nullspace, joints[0], joints[1], joints[2])


_compiled_law = jit_decorator(_operational_space_law)


class ArmControl:
    """The substeps of one arm after robosuite has taken the first of an environment step."""

    def __init__(self, robot: Any, arm: str) -> None:
        """Look up what lasts as long as the robot's controllers, which is an episode.

        Args:
            robot: robosuite's robot, whose `arm` is covered.
            arm: Its part's name.
        """
        part, sim = robot.part_controllers[arm], robot.sim
        self._part, self._model, self._data = part, sim.model._model, sim.data._data
        self._site = sim.model.site_name2id(part.ref_name)
        dofs, actuators = _as_slice(part.qvel_index), _as_slice(robot._ref_actuators_indexes_dict[arm])
        self._low, self._high = sim.model.actuator_ctrlrange[actuators].T.copy()
        self._ctrl, self._bias = self._data.ctrl[actuators], self._data.qfrc_bias[dofs]
        self._allocate_law(part.joint_dim)
        self._view_state(_as_slice(part.qpos_index), dofs)

    def _allocate_law(self, num_joints: int) -> None:
        """Allocate the law's arguments and what its results are multiplied to, each matrix aligned to 16 bytes."""
        self._task, self._joints, wrench = np.zeros((14, 3)), np.zeros((4, num_joints)), np.zeros(_WRENCH_SIZE)
        # Columns first, as robosuite's indexing leaves it: BLAS is told the order, and rounds by it.
        self._mass = np.zeros((num_joints, num_joints), order="F")
        self._jacobian, self._decoupled = np.zeros((6, num_joints)), np.zeros(6)
        self._halves = (np.zeros((3, num_joints)), np.zeros((3, num_joints)))
        self._law = (self._task, self._joints, self._mass, (self._jacobian, *self._halves), wrench)
        inertia_pos, inertia_ori = (wrench[start : start + 9].reshape(3, 3).T for start in (_INERTIA_POS, _INERTIA_ORI))
        self._decoupling = (
            (inertia_pos, wrench[_FORCE : _FORCE + 3], self._decoupled[:3]),
            (inertia_ori, wrench[_TORQUE : _TORQUE + 3], self._decoupled[3:]),
        )

    def _view_state(self, qpos: slice, dofs: slice) -> None:
        """Pair what MuJoCo computes, whose arrays stay where they are, with the rows that it is copied to."""
        data, task, joints, num_dofs = self._data, self._task, self._joints, self._model.nv
        self._full_mass = np.zeros((num_dofs, num_dofs))
        self._full_jacobians = position, orientation = np.zeros((3, num_dofs)), np.zeros((3, num_dofs))
        self._velocities = ((position, data.qvel, task[8]), (orientation, data.qvel, task[9]))
        self._copies: tuple[tuple[Array, Any], ...] = (
            (task[4], data.site_xpos[self._site]),
            (task[5:8], data.site_xmat[self._site].reshape(3, 3)),
            (joints[1], data.qpos[qpos]),
            (joints[2], data.qvel[dofs]),
            (self._halves[0], position[:, dofs]),
            (self._halves[1], orientation[:, dofs]),
            (self._jacobian[:3], position[:, dofs]),
            (self._jacobian[3:], orientation[:, dofs]),
            (self._mass, self._full_mass[dofs, dofs]),
        )

    def hold_goal(self) -> None:
        """Take the goal and the gains that robosuite set at the first substep."""
        part, task = self._part, self._task
        if part.input_ref_frame == "base":
            task[0] = part.origin_pos + np.dot(part.origin_ori, part.goal_pos)
            task[1:4] = np.dot(part.origin_ori, part.goal_ori)
        else:
            task[0], task[1:4] = part.goal_pos, part.goal_ori
        task[10:12], task[12:14] = np.reshape(part.kp, (2, 3)), np.reshape(part.kd, (2, 3))
        self._joints[0] = part.initial_joint

    def actuate(self) -> None:
        """Write the torques of the substep that `mj_step1` has begun."""
        self._observe()
        _compiled_law(*self._law)
        for product in self._decoupling:
            np.dot(*product)
        torques = np.dot(self._jacobian.T, self._decoupled)
        torques += self._bias
        torques += self._joints[3]
        np.minimum(np.maximum(torques, self._low), self._high, out=self._ctrl)

    def _observe(self) -> None:
        """Read pose, velocity, Jacobian and inertia of the arm as they are now."""
        mujoco.mj_jacSite(self._model, self._data, *self._full_jacobians, self._site)
        mujoco.mj_fullM(self._model, self._full_mass, self._data.qM)
        for product in self._velocities:
            np.dot(*product)
        for row, source in self._copies:
            row[...] = source


def is_covered_arm(robot: Any, arm: str) -> bool:
    """Return whether `ArmControl` computes what the arm's controller would."""
    part = robot.part_controllers[arm]
    return (
        type(part) is OperationalSpaceController
        and part.uncoupling
        and part.interpolator_pos is part.interpolator_ori is None
        and part.num_ref_sites == 1
        and all(map(_is_consecutive, (part.qpos_index, part.qvel_index, robot._ref_actuators_indexes_dict[arm])))
        and _is_fixed(robot.sim.model, f"{part.naming_prefix}{part.part_name}_center")
    )


def _is_fixed(model: Any, site: str) -> bool:
    """Return whether a site belongs to a body that is welded to the world, so that its velocity is zero."""
    return bool(model.body_weldid[model.site_bodyid[model.site_name2id(site)]] == 0)


def _is_consecutive(indexes: list[int]) -> bool:
    return list(indexes) == list(range(indexes[0], indexes[0] + len(indexes)))


def _as_slice(indexes: list[int]) -> slice:
    return slice(indexes[0], indexes[-1] + 1)
