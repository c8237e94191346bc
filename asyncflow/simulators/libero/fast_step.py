"""One env step of LIBERO, faster, with the same physics, success and observations bit for bit.

robosuite 1.4 calls MuJoCo three times in each of a step's 25 substeps: twice `mj_forward`, then `mj_step`, which begins
with what `mj_forward` does. Positions and velocities stay the same until the third call ends, and so does all that
follows from them: contacts, inertias, Jacobians. Only the solver starts each time from what it found before, and has to
run three times. Here the rest is computed once, and observations are put together only where somebody asks.

There is one exception: `mj_forward` normalises quaternions in place, and to do it again may change a last bit. Then
everything is computed anew, as MuJoCo would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mujoco
import numpy as np
from libero.libero.envs.bddl_base_domain import BDDLBaseDomain
from robosuite.environments.base import MujocoEnv

from asyncflow.simulators.robosuite.fast_observables import ObservableClock, has_covered_observables

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

    def step(self, action: NDArray[Any]) -> tuple[float, bool]:
        """Execute one action, [A]; return its reward and whether the task is solved now."""
        env = self._env
        env.timestep += 1
        self._clock.start()
        env.sim.forward = self._forward_again  # for the controller, which calls it before it reads
        for substep in range(self._num_substeps):
            self._forward()
            env._pre_action(action, substep == 0)
            self._integrate()
            self._clock.tick()
        del env.sim.forward
        self._clock.stop()
        env.cur_time += env.control_timestep
        reward, _, _ = env._post_action(action)
        return reward, bool(reward)  # it is sparse

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
    return None
