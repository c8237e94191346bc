"""stable-baselines3's side: train seeds, play the evaluation's episodes, write what came out.

    python -m tools.bench.gym.sb3 pendulum 0 1 2 --out runs/gym

Runs in the environment of the peers. Its own defaults stay where `setting` says nothing: tanh networks, orthogonal
weights, advantages normalised in each minibatch.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from pathlib import Path
from typing import Any

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from tools.bench.gym.setting import (
    CLIP,
    HIDDEN,
    LAMBDA,
    MAX_GRAD_NORM,
    NUM_ENVS,
    NUM_EPOCHS,
    NUM_STEPS,
    TASKS,
    VF_COEF,
    TaskSetting,
    play,
    write_result,
)


def train(task: TaskSetting, seed: int) -> dict[str, Any]:
    """Train and judge one seed."""
    env = make_vec_env(task.env_id, NUM_ENVS, seed=seed)
    rollout = {"n_steps": NUM_STEPS, "gamma": task.gamma, "gae_lambda": LAMBDA}
    steps = {"n_epochs": NUM_EPOCHS, "batch_size": task.batch_size, "learning_rate": task.learning_rate}
    loss = {"clip_range": CLIP, "vf_coef": VF_COEF, "max_grad_norm": MAX_GRAD_NORM}
    network = {"net_arch": {"pi": HIDDEN, "vf": HIDDEN}}
    model = PPO("MlpPolicy", env, seed=seed, device="cpu", policy_kwargs=network, **rollout, **steps, **loss)
    start = time.perf_counter()
    model.learn(task.env_steps)
    wall_s = time.perf_counter() - start
    returns = play(task, lambda obs: model.predict(obs, deterministic=True)[0])
    versions = {name: importlib.metadata.version(name) for name in ("stable-baselines3", "gymnasium", "mujoco")}
    return {"returns": returns, "env_steps": model.num_timesteps, "wall_s": wall_s, "peers": versions}


def main() -> None:
    """Train, play, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("seeds", nargs="+", type=int)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        write_result(options.out / f"{seed}.json", train(TASKS[options.task], seed))


if __name__ == "__main__":
    main()
