"""stable-baselines3's side: train one seed, play the evaluation's episodes, write what came out.

    python -m tools.bench.gym.sb3 pendulum 0 out.json

Runs in the environment of the peers. Its own defaults stay where `setting` says nothing: tanh networks, orthogonal
weights, advantages normalised in each minibatch.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from tools.bench.gym.setting import (
    BATCH_SIZE,
    CLIP,
    HIDDEN,
    LAMBDA,
    MAX_GRAD_NORM,
    NUM_ENVS,
    NUM_EPOCHS,
    NUM_STEPS,
    TASKS,
    VF_COEF,
    play,
)


def main() -> None:
    """Train, play, write."""
    task, seed, path = TASKS[sys.argv[1]], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    env = make_vec_env(task.env_id, NUM_ENVS, seed=seed)
    rollout = {"n_steps": NUM_STEPS, "gamma": task.gamma, "gae_lambda": LAMBDA}
    steps = {"n_epochs": NUM_EPOCHS, "batch_size": BATCH_SIZE, "learning_rate": task.learning_rate}
    loss = {"clip_range": CLIP, "vf_coef": VF_COEF, "max_grad_norm": MAX_GRAD_NORM}
    network = {"net_arch": {"pi": HIDDEN, "vf": HIDDEN}}
    model = PPO("MlpPolicy", env, seed=seed, device="cpu", policy_kwargs=network, **rollout, **steps, **loss)
    start = time.perf_counter()
    model.learn(task.env_steps)
    wall_s = time.perf_counter() - start

    returns = play(task, lambda obs: model.predict(obs, deterministic=True)[0])
    result: dict[str, Any] = {"returns": returns, "env_steps": model.num_timesteps, "wall_s": wall_s}
    result["peers"] = {name: importlib.metadata.version(name) for name in ("stable-baselines3", "gymnasium", "mujoco")}
    path.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
