"""The law of operational space control of one arm, without what stays the same within an environment step.

Computes the torques of robosuite's `OperationalSpaceController`, that of 1.5 and that of 1.4, in robosuite's arithmetic
and order, so that they are equal bit for bit. What is left out yields nothing: looking up names, Jacobians computed
four times, the velocity of a base that cannot move, limits read again.

How a matrix product rounds can depend on where its operands lie: OpenBLAS's kernels for processors with SSE3 alone,
which numpy 1.26 also runs on newer ones that it does not know, sum in another order when a matrix does not begin at a
multiple of 16 bytes. robosuite's matrices are arrays of their own, which the allocator aligns to 16 bytes and no more.
So here, too, every matrix begins there, in robosuite's memory order: equal on every processor on which robosuite
itself is repeatable.

The law is that of Khatib, "A unified approach for motion and force control of robot manipulators" (1987).

Shapes: J joints of the arm.
"""

from __future__ import annotations

from typing import Any, Literal

import mujoco
import numpy as np
from numpy.typing import NDArray
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


compiled_law = jit_decorator(_operational_space_law)


class OscLaw:
    """The torques of one arm, from MuJoCo's state and a goal."""

    def __init__(  # noqa: PLR0913
        self, sim: Any, site: int, qpos: slice, dofs: slice, actuators: slice, *, order: Literal["C", "F"]
    ) -> None:
        """Look up what lasts as long as a robot's controllers, which is an episode.

        Args:
            sim: robosuite's `MjSim`.
            site: The gripper's.
            qpos: The arm's joints in `qpos`.
            dofs: The same in `qvel`.
            actuators: The same in `ctrl`.
            order: Of the Jacobians in robosuite's memory, by which BLAS rounds: rows first in 1.5, columns in 1.4.
        """
        self._model, self._data, self._site = sim.model._model, sim.data._data, site
        self._low, self._high = sim.model.actuator_ctrlrange[actuators].T.copy()
        self._ctrl, self._bias = self._data.ctrl[actuators], self._data.qfrc_bias[dofs]
        self._qpos, self._qvel, self._first_dof = self._data.qpos[qpos], self._data.qvel[dofs], dofs.start
        self._allocate_law(dofs.stop - dofs.start, order)
        self._view_state(qpos, dofs)

    def _allocate_law(self, num_joints: int, order: Literal["C", "F"]) -> None:
        """Allocate the law's arguments and what its results are multiplied to, each matrix aligned to 16 bytes."""
        self._task, self._joints, wrench = np.zeros((14, 3)), np.zeros((4, num_joints)), np.zeros(_WRENCH_SIZE)
        # Columns first, as robosuite's indexing leaves it: BLAS is told the order, and rounds by it.
        self._mass = np.zeros((num_joints, num_joints), order="F")
        self._jacobian, self._decoupled = np.zeros((6, num_joints), order=order), np.zeros(6)
        self._torques = np.zeros(num_joints)
        self._halves = (np.zeros((3, num_joints), order=order), np.zeros((3, num_joints), order=order))
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

    def set_goal(self, position: Array, orientation: Array, kp: Array, kd: Array, initial_joints: Array) -> None:
        """Take a goal in the world, gains [6] and the joints' initial positions [J]."""
        task = self._task
        task[0], task[1:4] = position, orientation
        task[10:12], task[12:14] = np.reshape(kp, (2, 3)), np.reshape(kd, (2, 3))
        self._joints[0] = initial_joints

    def compiled_arguments(self) -> tuple[Any, ...]:
        """Return what `compiled` computes with: numbers, MuJoCo's memory and this object's own."""
        data = self._data
        task, joints, mass, (jacobian, half_position, half_orientation), wrench = self._law
        full = (*self._full_jacobians, self._full_mass, data.qM, data.qvel)
        state = (data.site_xpos[self._site], data.site_xmat[self._site], self._qpos, self._qvel, self._bias, self._ctrl)
        law = (task, joints, mass, jacobian, half_position, half_orientation, wrench, self._decoupled, self._torques)
        return self._site, self._first_dof, full, state, law, (self._low, self._high)

    def actuate(self) -> None:
        """Write the torques of the substep that `mj_step1` has begun."""
        self._observe()
        compiled_law(*self._law)
        for product in self._decoupling:
            np.dot(*product)
        torques = np.dot(self._jacobian.T, self._decoupled, self._torques)
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


def is_consecutive(indexes: list[int]) -> bool:
    """Return whether indexes follow one upon the other."""
    return list(indexes) == list(range(indexes[0], indexes[0] + len(indexes)))


def as_slice(indexes: list[int]) -> slice:
    """Return consecutive indexes as a slice."""
    return slice(indexes[0], indexes[-1] + 1)
