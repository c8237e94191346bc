"""Asynchronous PPO fine-tuning of flow-matching robot policies in robosuite and robomimic.

    import asyncflow as af

    policy = af.load_policy("lift_flow")
    env = af.make_env("Lift", num_envs=16, policy=policy)
    with af.Trainer(policy, env, af.PPO(policy, clip_coef=0.02)) as trainer:
        trainer.train(total_updates=16)
        print(af.evaluate(policy, "Lift"))
        trainer.save("lift_trained")

`docs/library.md` describes every name. Each is imported when it is first used, so `import asyncflow` takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from asyncflow.config.sections import BufferType
    from asyncflow.envs.base import ChunkResult, VecEnv
    from asyncflow.envs.journal import EpisodeJournal
    from asyncflow.envs.simulators import GymVecEnv, SimulatorVecEnv
    from asyncflow.envs.worker import Recipe
    from asyncflow.errors import (
        AsyncflowError,
        CheckpointError,
        CollectorError,
        ConfigError,
        ContractError,
        EnvError,
        TrainingError,
    )
    from asyncflow.library import evaluate, load_policy, make_env, make_policy
    from asyncflow.metrics.console import ConsoleReporter
    from asyncflow.policies.base import Policy
    from asyncflow.ppo.advantages import AdvantageEstimator
    from asyncflow.ppo.auxiliary import AuxiliaryLoss, BehaviorCloning, ReferenceKL
    from asyncflow.ppo.gae import Transitions
    from asyncflow.ppo.ppo import PPO
    from asyncflow.rollout.buffer import RolloutBuffer
    from asyncflow.run.evaluate import EvalResult
    from asyncflow.run.reporter import Reporter
    from asyncflow.run.trainer import StopTraining, Trainer
    from asyncflow.simulators.base import Simulator, StepResult
    from asyncflow.simulators.spec import EnvSpec

_HOMES = {
    "config.sections": ("BufferType",),
    "envs.base": ("ChunkResult", "VecEnv"),
    "envs.journal": ("EpisodeJournal",),
    "envs.simulators": ("GymVecEnv", "SimulatorVecEnv"),
    "envs.worker": ("Recipe",),
    "errors": (
        "AsyncflowError",
        "CheckpointError",
        "CollectorError",
        "ConfigError",
        "ContractError",
        "EnvError",
        "TrainingError",
    ),
    "library": ("evaluate", "load_policy", "make_env", "make_policy"),
    "metrics.console": ("ConsoleReporter",),
    "policies.base": ("Policy",),
    "ppo.advantages": ("AdvantageEstimator",),
    "ppo.auxiliary": ("AuxiliaryLoss", "BehaviorCloning", "ReferenceKL"),
    "ppo.gae": ("Transitions",),
    "ppo.ppo": ("PPO",),
    "rollout.buffer": ("RolloutBuffer",),
    "run.evaluate": ("EvalResult",),
    "run.reporter": ("Reporter",),
    "run.trainer": ("StopTraining", "Trainer"),
    "simulators.base": ("Simulator", "StepResult"),
    "simulators.spec": ("EnvSpec",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "PPO",
    "AdvantageEstimator",
    "AsyncflowError",
    "AuxiliaryLoss",
    "BehaviorCloning",
    "BufferType",
    "CheckpointError",
    "ChunkResult",
    "CollectorError",
    "ConfigError",
    "ConsoleReporter",
    "ContractError",
    "EnvError",
    "EnvSpec",
    "EpisodeJournal",
    "EvalResult",
    "GymVecEnv",
    "Policy",
    "Recipe",
    "ReferenceKL",
    "Reporter",
    "RolloutBuffer",
    "Simulator",
    "SimulatorVecEnv",
    "StepResult",
    "StopTraining",
    "Trainer",
    "TrainingError",
    "Transitions",
    "VecEnv",
    "__version__",
    "evaluate",
    "load_policy",
    "make_env",
    "make_policy",
]

if not TYPE_CHECKING:  # or a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first asked for."""
        if name not in _HOME_OF:
            raise AttributeError(
                f"module 'asyncflow' has no attribute {name!r}; docs/library.md lists the public names"
            )
        value = getattr(importlib.import_module(f"asyncflow.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
