"""The settings of both libraries: tasks, budgets, hyperparameters, and the episodes that judge the result.

It imports neither of them, so that each runs in an environment of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

HIDDEN = [64, 64]
NUM_ENVS, NUM_STEPS = 32, 64  # 2,048 decisions a rollout
NUM_EPOCHS = 10
CLIP, LAMBDA, MAX_GRAD_NORM, VF_COEF = 0.2, 0.95, 0.5, 0.5
STD = 1.0  # of exploration at first, in the environment's units; what stable-baselines3 begins with
FIRST_EVALUATION_SEED = 1_000_000


@dataclass(frozen=True)
class TaskSetting:
    """One task.

    Attributes:
        env_id: gymnasium's name of it.
        env_steps: What is trained on, a multiple of a rollout.
        gamma: Discount per env step.
        learning_rate: Adam's, of actor and critic.
        batch_size: Decisions of a minibatch.
        num_episodes: Of the evaluation at the end.
        half_range: Half the range of an action, in the environment's units: what asyncflow normalises actions by.
    """

    env_id: str
    env_steps: int
    gamma: float
    learning_rate: float
    batch_size: int
    num_episodes: int
    half_range: float


TASKS = {
    "pendulum": TaskSetting("Pendulum-v1", 32_768, 0.9, 1e-3, 128, 30, half_range=2.0),
    "inverted_pendulum": TaskSetting("InvertedPendulum-v5", 32_768, 0.99, 3e-4, 64, 10, half_range=3.0),
}

Decide = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write what a seed came to, in one step: a file that is there is whole."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(result))
    draft.replace(path)


def play(task: TaskSetting, decide: Decide) -> list[float]:
    """Return the returns of a task's evaluation episodes, the same start states for everyone.

    Args:
        task: The task.
        decide: Observation [D] -> action [A] without noise.
    """
    env, returns = gymnasium.make(task.env_id), []
    for episode in range(task.num_episodes):
        obs, _ = env.reset(seed=FIRST_EVALUATION_SEED + episode)
        total, is_over = 0.0, False
        while not is_over:
            space: Any = env.action_space
            action = np.clip(decide(np.asarray(obs, np.float32)), space.low, space.high)
            obs, reward, terminated, truncated, _ = env.step(action)
            total, is_over = total + float(reward), terminated or truncated
        returns.append(total)
    return returns
