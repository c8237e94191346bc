"""asyncflow's side: train seeds, play the evaluation's episodes, write what came out.

python -m tools.bench.gym.own pendulum 0 1 2 --mode standard --out runs/gym
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict

from asyncflow.config.presets import load_config
from asyncflow.config.sections import Config
from asyncflow.metrics.console import ConsoleReporter
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import load_into, load_policy_file, resolve_checkpoint
from asyncflow.run.launch import train
from tools.bench.gym.setting import (
    CLIP,
    HIDDEN,
    LAMBDA,
    MAX_GRAD_NORM,
    NUM_ENVS,
    NUM_EPOCHS,
    NUM_STEPS,
    STD,
    TASKS,
    VF_COEF,
    Decide,
    TaskSetting,
    play,
    write_result,
)


def configure(task: TaskSetting, mode: str, seed: int, folder: Path) -> Config:
    """Return the settings of the comparison as a configuration."""
    size = NUM_ENVS * NUM_STEPS
    keys = {
        "env.task": f"gym:{task.env_id}",
        "env.num_envs": NUM_ENVS,
        "env.num_workers": 1,
        "policy.hidden_sizes": HIDDEN,
        "policy.critic_hidden_sizes": HIDDEN,
        "policy.initial_std": STD / task.half_range,
        "algorithm.gamma": task.gamma,
        "algorithm.gae_lambda": LAMBDA,
        "algorithm.learning_rate": task.learning_rate,
        "algorithm.critic_learning_rate": task.learning_rate,
        "algorithm.update_epochs": NUM_EPOCHS,
        "algorithm.num_minibatches": size // task.batch_size,
        "algorithm.clip_coef": CLIP,
        "algorithm.dual_clip": None,
        "algorithm.vf_coef": VF_COEF,
        "algorithm.max_grad_norm": MAX_GRAD_NORM,
        "buffer.buffer_size": size,
        "trainer.buffer_type": mode,
        "trainer.seed": seed,
        "trainer.device": "cpu",
        "trainer.total_updates": task.env_steps // size,
        "trainer.total_env_steps": None,
        "trainer.eval_interval": 0,
        "trainer.save_interval": 1000,
        "logging.logger": "none",
        "logging.out": str(folder),
    }
    return load_config("gym", keys)


def decide_with(folder: Path) -> Decide:
    """Return what the last checkpoint of a run decides without noise."""
    file = load_policy_file(resolve_checkpoint(str(folder)))
    spec = file.env_spec
    policy = make_policy(file.policy_config, spec, 0)
    load_into(policy, file)
    noise = torch.zeros(1, policy.noise_size)

    def decide(obs: NDArray[np.float32]) -> NDArray[np.float32]:
        seen = TensorDict({"state": torch.from_numpy(obs)[None]}, [1])
        with torch.no_grad():
            actions: Any = policy.sample_actions(seen, "eval", noise)["actions"]
        return np.asarray(actions[0, 0].numpy())

    return decide


def train_seed(task: TaskSetting, mode: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train and judge one seed."""
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted call left
    train(configure(task, mode, seed, folder), ConsoleReporter())
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {"returns": play(task, decide_with(folder)), "env_steps": row["env_steps"], "wall_s": row["wall_s"]}


def main() -> None:
    """Train, play, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("seeds", nargs="+", type=int)
    parser.add_argument("--mode", choices=("standard", "vla"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for seed in options.seeds:
        result = train_seed(TASKS[options.task], options.mode, seed, options.out / f"run_{seed}")
        write_result(options.out / f"{seed}.json", result)


if __name__ == "__main__":
    main()
