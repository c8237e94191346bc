"""The `asyncflow` command line with faults built in: `python -m tools.stress.child PLAN ARGUMENTS`.

PLAN is JSON of `FaultPlan`.

Simulators are replaced where `build` asks for them, and the trainer looks at every rollout before it trains on it.
Everything else is the package as it is.
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import asdict
from functools import partial
from unittest import mock

from asyncflow import cli
from asyncflow.config.sections import EnvConfig
from asyncflow.envs.base import ChunkResult, VecEnv
from asyncflow.envs.worker import Recipe
from asyncflow.envs.workers import WorkerVecEnv
from asyncflow.errors import AsyncflowError
from asyncflow.profile.slow import Emulation
from asyncflow.rollout.ring import Rollout
from asyncflow.run import build, parts
from asyncflow.run.trainer import Trainer
from asyncflow.signals import interrupt_on_signals
from tools.emulated import put_on_every_run
from tools.stress.simulator import FaultPlan


class DisturbedVecEnv(WorkerVecEnv):
    """Workers that are waited for late, and a wait that raises."""

    plan: FaultPlan

    def step_wait(self, env_ids: range) -> ChunkResult:
        """Pause, raise if it is time to, then wait."""
        if not hasattr(self, "_delays"):
            self._delays, self._num_waits = random.Random(self.plan.seed), 0
        self._num_waits += 1
        if self._delays.random() < 0.1:
            time.sleep(self._delays.random() * self.plan.delay_s)
        if self._num_waits == self.plan.crash_at:
            self.plan.note("crashed")
            raise ArithmeticError("injected by the stress suite")
        return super().step_wait(env_ids)


class WatchingTrainer(Trainer):
    """A trainer that is late and trains on no rollout that holds a number that is not finite."""

    plan: FaultPlan

    def _train_on(self, rollout: Rollout) -> None:
        if not hasattr(self, "_delays"):
            self._delays = random.Random(self.plan.seed + 1)
        time.sleep(self._delays.random() * self.plan.update_delay_s)
        for name, part in (("data", rollout.data), ("obs", rollout.obs), ("final_obs", rollout.final_obs)):
            bad = [key for key, x in part.items() if x.is_floating_point() and not bool(x.isfinite().all())]
            if bad:
                raise AsyncflowError(f"rollout {rollout.index}: {name} {bad} not finite")
        self.plan.note(f"invalid {int((~rollout.data['valid']).sum())}")
        super()._train_on(rollout)


def _make_vec_env(plan: FaultPlan, config: EnvConfig, chunk_length: int, num_envs: int, seed: int) -> VecEnv:
    recipe = Recipe("tools.stress.simulator:build", {"plan": asdict(plan)})
    return DisturbedVecEnv(recipe, config, num_envs, chunk_length, seed)


def main() -> int:
    """Install the faults and run the command line; return its exit code."""
    plan = FaultPlan(**json.loads(sys.argv[1]))
    DisturbedVecEnv.plan = WatchingTrainer.plan = plan
    mock.patch.object(parts, "make_vec_env", partial(_make_vec_env, plan)).start()  # for as long as the process lives
    mock.patch.object(build, "Trainer", WatchingTrainer).start()
    if plan.inference_s:
        put_on_every_run(Emulation(inference_s=plan.inference_s))
    interrupt_on_signals()
    return cli.run(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
