"""One env step of LIBERO, faster, with the same physics, success and observations bit for bit.

robosuite 1.4 calls MuJoCo three times in each of a step's 25 substeps: twice `mj_forward`, then `mj_step`, which begins
with what `mj_forward` does. Positions and velocities stay the same until the third call ends, and so does all that
follows from them: contacts, inertias, Jacobians. Only the solver starts each time from what it found before, and has to
run three times. Here the rest is computed once, the arm's torques by the law that the fast step of robosuite 1.5 has,
too, and observations are put together only where somebody asks.

There is one exception: `mj_forward` normalises quaternions in place, and to do it again may change a last bit. Then
everything is computed anew, as MuJoCo would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mujoco
import numpy as np
from libero.libero.envs.bddl_base_domain import BDDLBaseDomain
from robosuite.controllers.osc import OperationalSpaceController
from robosuite.environments.base import MujocoEnv
from robosuite.robots.single_arm import SingleArm

from asyncflow.simulators.robosuite.fast_observables import ObservableClock, has_covered_observables
from asyncflow.simulators.robosuite.osc_law import OscLaw, as_slice, is_consecutive

if TYPE_CHECKING:
    from numpy.typing import NDArray

_VELOCITY = mujoco.mjtStage.mjSTAGE_VEL  # what was computed up to here is kept


class FastStep:
    """Steps one of LIBERO's environments, which may be stepped and reset by itself as well."""

    def __init__(self, env: Any) -> None:
        """Take over an environment that has no obstacle (`find_obstacle`)."""
        self._env = env
        self._clock = ObservableClock(env)
        self._model, self._data = env.sim.model._model, env.sim.data._data
        self._qpos, self._is_known = np.zeros(self._model.nq), False
        self._num_substeps = int(env.control_timestep / env.model_timestep)
        (self._robot,) = env.robots
        site = env.sim.model.site_name2id(self._robot.controller.eef_name)
        self._law = OscLaw(env.sim, site, *map(as_slice, _list_indexes(self._robot)), order="F")
        fingers = as_slice(self._robot._ref_joint_gripper_actuator_indexes)
        low, high = env.sim.model.actuator_ctrlrange[fingers].T
        self._fingers, self._middle, self._reach = self._data.ctrl[fingers], 0.5 * (high + low), 0.5 * (high - low)

    def step(self, action: NDArray[Any]) -> tuple[float, bool]:
        """Execute one action, [A]; return its reward and whether the task is solved now."""
        env = self._env
        env.timestep += 1
        self._clock.start()
        self._run_first_substep(action)
        for _ in range(self._num_substeps - 1):
            self._forward()
            self._forward_again()
            self._law.actuate()
            self._grip(action)
            self._integrate()
            self._clock.tick()
        self._clock.stop()
        env.cur_time += env.control_timestep
        reward, _, _ = env._post_action(action)
        return reward, bool(reward)  # it is sparse

    def _run_first_substep(self, action: NDArray[Any]) -> None:
        """Let robosuite set the goal, which lasts until the next action."""
        env, controller = self._env, self._robot.controller
        env.sim.forward = self._forward_again  # the controller calls it before it reads
        self._forward()
        env._pre_action(action, True)
        del env.sim.forward
        self._law.set_goal(
            controller.goal_pos, controller.goal_ori, controller.kp, controller.kd, controller.initial_joint
        )
        self._integrate()
        self._clock.tick()

    def _grip(self, action: NDArray[Any]) -> None:
        """Move the fingers' targets on, as `Manipulator.grip_action` does."""
        commands = self._robot.gripper.format_action(action[self._robot.controller.control_dim :])
        self._fingers[:] = self._middle + self._reach * commands

    def _forward(self) -> None:
        mujoco.mj_forward(self._model, self._data)
        self._qpos[:] = self._data.qpos
        mujoco.mj_normalizeQuat(self._model, self._qpos)
        self._is_known = np.array_equal(self._qpos, self._data.qpos)

    def _forward_again(self) -> None:
        """Do what another `mj_forward` does where only forces may have changed."""
        if self._is_known:
            mujoco.mj_forwardSkip(self._model, self._data, _VELOCITY, 0)
        else:
            self._forward()

    def _integrate(self) -> None:
        """Do what `mj_step` does where only forces may have changed."""
        mujoco.mj_checkPos(self._model, self._data)
        mujoco.mj_checkVel(self._model, self._data)
        self._forward_again()
        mujoco.mj_checkAcc(self._model, self._data)
        mujoco.mj_Euler(self._model, self._data)


def find_obstacle(env: Any) -> str | None:
    """Return why `FastStep` would not do what the environment's own `step` does; None if it would."""
    kind = type(env)
    own = (BDDLBaseDomain.step, BDDLBaseDomain._pre_action, BDDLBaseDomain.reward, MujocoEnv._update_observables)
    if (kind.step, kind._pre_action, kind.reward, kind._update_observables) != own:
        return f"{kind.__name__} has a way to step of its own"
    if env.sim.model._model.opt.integrator != mujoco.mjtIntegrator.mjINT_EULER:
        return "its integrator is not Euler's"
    if not has_covered_observables(env):
        return "an observable keeps time in a way of its own"
    if len(env.robots) != 1 or not _is_covered_robot(env.robots[0]):
        return "it has another robot than one arm with a gripper under OSC_POSE"
    return None


def _is_covered_robot(robot: Any) -> bool:
    controller = robot.controller
    return (
        type(robot) is SingleArm
        and type(controller) is OperationalSpaceController
        and controller.uncoupling
        and controller.interpolator_pos is controller.interpolator_ori is None
        and robot.has_gripper
        and all(map(is_consecutive, (*_list_indexes(robot), robot._ref_joint_gripper_actuator_indexes)))
    )


def _list_indexes(robot: Any) -> tuple[list[int], list[int], list[int]]:
    """Return where the arm's joints are in `qpos`, `qvel` and `ctrl`."""
    return robot.controller.qpos_index, robot.controller.qvel_index, robot._ref_joint_actuator_indexes
