"""Train both libraries on every task and seed, judge them by the same episodes, and write docs/benchmarks/gym.md.

    python -m tools.bench.gym --seeds 5                        # needs a network once: it installs stable-baselines3
    python -m tools.bench.gym --tasks pendulum --page-only     # writes the page from what is there

stable-baselines3 runs in `.venv-peers`, the environment of `tools.bench.peers`, which is installed where it is missing.
Runs that are finished are skipped: each leaves a JSON file. Returns do not depend on how fast the machine is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import load_into, load_policy_file, resolve_checkpoint
from tools.bench.common.report import REPOSITORY, describe_command, describe_machine, describe_software
from tools.bench.gym.page import LEARNERS, SB3, collect, judge, write_page
from tools.bench.gym.setting import (
    BATCH_SIZE,
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
    TaskSetting,
    play,
)
from tools.bench.peers.setup import PYTHON, install

PAGE = REPOSITORY / "docs" / "benchmarks" / "gym.md"
DATA = PAGE.parent / "data" / "gym"


def overrides(task: TaskSetting) -> list[str]:
    """Return the settings of the comparison as keys of asyncflow."""
    size = NUM_ENVS * NUM_STEPS
    keys = {
        "env.num_envs": NUM_ENVS,
        "env.num_workers": 1,
        "policy.hidden_sizes": HIDDEN,
        "policy.critic_hidden_sizes": HIDDEN,
        "policy.initial_std": STD,
        "algorithm.gamma": task.gamma,
        "algorithm.gae_lambda": LAMBDA,
        "algorithm.learning_rate": task.learning_rate,
        "algorithm.critic_learning_rate": task.learning_rate,
        "algorithm.update_epochs": NUM_EPOCHS,
        "algorithm.num_minibatches": size // BATCH_SIZE,
        "algorithm.clip_coef": CLIP,
        "algorithm.dual_clip": "null",
        "algorithm.vf_coef": VF_COEF,
        "algorithm.max_grad_norm": MAX_GRAD_NORM,
        "buffer.buffer_size": size,
        "trainer.total_updates": task.env_steps // size,
        "trainer.total_env_steps": "null",
        "trainer.eval_interval": 0,
        "trainer.save_interval": 1000,
        "logging.logger": "none",
    }
    return [f"{key}={value}" for key, value in keys.items()]


def train_asyncflow(task: TaskSetting, learner: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train one seed by the command line, and play the evaluation's episodes with the last checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted call left
    flags = ["--buffer-type", learner.split()[1], "--seed", str(seed), "--device", "cpu", "--out", str(folder)]
    words = [sys.executable, "-m", "asyncflow", "train", f"env.task=gym:{task.env_id}", *flags, *overrides(task)]
    subprocess.run(words, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    file = load_policy_file(resolve_checkpoint(str(folder)))
    spec = file.env_spec
    policy = make_policy(file.policy_config, spec.obs_shapes, spec.action_dim, seed, spec.image_shapes)
    load_into(policy, file)

    def decide(obs: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        seen = TensorDict({"state": torch.from_numpy(obs)[None]}, [1])
        actions: Any = policy.sample_actions(seen, "eval", torch.zeros(1, policy.noise_size))["actions"]
        return np.asarray(actions[0, 0].numpy())

    return {"returns": play(task, decide), "env_steps": row["env_steps"], "wall_s": row["wall_s"]}


def train_sb3(name: str, seed: int, path: Path) -> dict[str, Any]:
    """Train and judge one seed of stable-baselines3 in its own environment."""
    install()
    words = [str(PYTHON), "-m", "tools.bench.gym.sb3", name, str(seed), str(path)]
    subprocess.run(words, check=True, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"})
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def record_of(name: str, learner: str, seed: int) -> Path:
    """Return the file that a finished run leaves."""
    return DATA / f"{name}_{learner.replace(' ', '_')}_seed{seed}.json"


def measure(name: str, learner: str, seed: int, out: Path) -> None:
    """Train and judge one seed, unless its file is there."""
    path = record_of(name, learner, seed)
    if path.exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    start, draft = time.perf_counter(), out / path.name
    task = TASKS[name]
    result = train_sb3(name, seed, draft) if learner == SB3 else train_asyncflow(task, learner, seed, out / path.stem)
    record = {"task": name, "learner": learner, "seed": seed, "setting": asdict(task), "machine": describe_machine()}
    record |= {"software": describe_software(), "command": describe_command(), "result": result}
    record["peers"] = result.pop("peers", {})
    DATA.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    mean = statistics.mean(result["returns"])
    print(f"{name}, {learner}, seed {seed}: {mean:.1f} ({time.perf_counter() - start:.0f} s)", flush=True)


def main() -> int:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--learners", nargs="+", choices=LEARNERS, default=list(LEARNERS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/gym"), help="run folders, which may be thrown away")
    parser.add_argument("--page-only", action="store_true")
    options = parser.parse_args()
    for name in options.tasks if not options.page_only else ():
        for seed in range(options.seeds):
            for learner in options.learners:
                measure(name, learner, seed, options.out)
    records = [json.loads(path.read_text()) for path in sorted(DATA.glob("*.json"))]
    PAGE.write_text(write_page(records))
    findings = judge(collect(records))
    for found in findings:
        print(f"{'met' if found.is_met else 'missed'}: {found.what}: {found.measured}, target {found.target}")
    return 0 if all(found.is_met for found in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
