"""One environment step of robosuite, faster, with the same physics and the same observations bit for bit.

This file says which environments are covered, and loops over the substeps. robosuite itself takes the first substep, in
which it sets goals and grippers, and computes reward and observations; the others run in a compiled function
(`compiled`), or in Python where there is none, and leave out what changes nothing. What is not covered takes
robosuite's own `step`. Nothing of robosuite is patched.

robosuite is imported with this module, which takes seconds: import it where a simulator is built.
"""

from __future__ import annotations

from typing import Any, Dict, Tuple

import mujoco
from numpy.typing import NDArray
from robosuite.controllers.composite.composite_controller import CompositeController
from robosuite.controllers.parts.gripper.simple_grip import SimpleGripController
from robosuite.environments.base import MujocoEnv
from robosuite.environments.robot_env import RobotEnv
from robosuite.robots.fixed_base_robot import FixedBaseRobot

from asyncflow.simulators.robosuite.compiled import Substeps, make_substeps
from asyncflow.simulators.robosuite.fast_observables import ObservableClock, has_covered_observables
from asyncflow.simulators.robosuite.fast_osc import ArmControl, is_covered_arm

Step = Tuple[Dict[str, Any], float, bool, Dict[str, Any]]


class FastStep:
    """Steps one robosuite environment, which may be stepped and reset by itself as well.

    Attributes:
        obstacle: Why steps are not fast at present, but the environment's own; None if they are fast.
    """

    def __init__(self, env: Any) -> None:
        self._env = env
        self._clock = ObservableClock(env)
        self._parts: list[Any] = []
        self._arms: list[ArmControl] = []
        self._compiled: Substeps | None = None
        self.obstacle: str | None = None
        self._adopt(_list_parts(env))

    def step(self, action: NDArray[Any]) -> Step:
        """Execute one action, [A], as `robosuite.environments.base.MujocoEnv.step` does."""
        parts = _list_parts(self._env)
        if parts != self._parts:  # a reset has built new controllers
            self._adopt(parts)
        if self.obstacle or self._env.done:
            result: Step = self._env.step(action)
            return result
        return self._step(action)

    def _adopt(self, parts: list[Any]) -> None:
        self._parts = parts
        self.obstacle = find_obstacle(self._env)
        arms = [] if self.obstacle else [(robot, arm) for robot in self._env.robots for arm in robot.arms]
        self._arms = [ArmControl(robot, arm) for robot, arm in arms]
        sim = self._env.sim
        self._compiled = (
            make_substeps(sim.model._model, sim.data._data, [arm.law for arm in self._arms]) if arms else None
        )

    def _step(self, action: NDArray[Any]) -> Step:
        env = self._env
        env.timestep += 1
        self._clock.start()
        self._run_substeps(action, int(env.control_timestep / env.model_timestep))
        self._clock.stop()
        env.cur_time += env.control_timestep
        reward, done, info = env._post_action(action)
        return env._get_observations(), reward, done, info

    def _run_substeps(self, action: NDArray[Any], num_substeps: int) -> None:
        model, data = self._env.sim.model._model, self._env.sim.data._data
        self._run_first_substep(action, model, data)
        remaining = num_substeps - 1
        while remaining:
            count = self._clock.pass_until_due(remaining) if self._compiled else 1
            self._pass_substeps(count, model, data)
            remaining -= count

    def _pass_substeps(self, count: int, model: Any, data: Any) -> None:
        """Let substeps pass, of which observables may be due after the last one only.

        Without lite physics robosuite calls mj_forward twice, then mj_step. Nothing of that reads more than mj_step1
        computes, and no call of mj_forward leaves a trace in the next.
        """
        if self._compiled:
            self._compiled.run(count)
        else:
            mujoco.mj_step1(model, data)
            for arm in self._arms:
                arm.actuate()
            mujoco.mj_step2(model, data)
        self._clock.tick()

    def _run_first_substep(self, action: NDArray[Any], model: Any, data: Any) -> None:
        """Let robosuite set goals and grippers, whose commands last until the next action."""
        begin, end = (
            (mujoco.mj_step1, mujoco.mj_step2) if self._env.lite_physics else (mujoco.mj_forward, mujoco.mj_step)
        )
        begin(model, data)
        self._env._pre_action(action, True)
        for arm in self._arms:
            arm.hold_goal()
        end(model, data)
        self._clock.tick()


def find_obstacle(env: Any) -> str | None:
    """Return why `FastStep` would not do what the environment's own `step` does; None if it would."""
    kind = type(env)
    if not isinstance(env, RobotEnv):
        return f"{kind.__name__} is no environment of robots"
    own = (MujocoEnv.step, RobotEnv._pre_action, MujocoEnv._update_observables)
    if (kind.step, kind._pre_action, kind._update_observables) != own:
        return f"{kind.__name__} has a way to step of its own"
    if env.has_renderer or env.viewer is not None:
        return "a window shows it"
    if not env.lite_physics and env.sim.model._model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4:
        return "it integrates by RK4 with lite_physics = false"
    if not has_covered_observables(env):
        return "an observable keeps time in a way of its own"
    return next(filter(None, map(_find_robots_obstacle, env.robots)), None)


def _find_robots_obstacle(robot: Any) -> str | None:
    name, parts = robot.robot_model.naming_prefix + robot.name, robot.part_controllers
    if type(robot) is not FixedBaseRobot:
        return f"{name} does not stand on a fixed base"
    if type(robot.composite_controller) is not CompositeController:
        return f"{name} has a {type(robot.composite_controller).__name__}"
    grippers = {robot.get_gripper_name(arm) for arm in robot.arms if robot.has_gripper[arm]}
    if set(parts) != {*robot.arms, *grippers} or not all(robot._enabled_parts.get(part, False) for part in parts):
        return f"{name} has other parts than arms and grippers, or one that is switched off"
    if not all(type(parts[part]) is SimpleGripController and parts[part].interpolator is None for part in grippers):
        return f"{name} has another gripper's controller than GRIP, or an interpolated one"
    for arm in robot.arms:
        if not is_covered_arm(robot, arm):
            return (
                f"{name}'s {arm} arm has a controller ({parts[arm].name}) or a mount that the fast step does not know"
            )
    return None


def _list_parts(env: Any) -> list[Any]:
    """Return what a reset or a user may replace: the simulation, the controllers, and which of them are enabled."""
    robots = [part for robot in env.robots for part in (robot.composite_controller, dict(robot._enabled_parts))]
    return [env.sim, env.viewer, *robots]
