"""Environments in worker processes for the tests of them, with fake simulators, and what is done to them."""

import gc
import os
import signal
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from fake_simulator import ACTION_DIM, FakeSimulator

from asyncflow.config.sections import EnvConfig
from asyncflow.envs.base import ChunkResult
from asyncflow.envs.server import running_workers
from asyncflow.envs.workers import WorkerVecEnv
from asyncflow.seeding import derive_seed

N, H, SEED = 5, 4, 3
IDLE = torch.zeros(2, H, ACTION_DIM)


def make(num_workers: int, num_envs: int = N, make_simulator=FakeSimulator, **keys) -> WorkerVecEnv:
    config = EnvConfig(**{"num_workers": num_workers, "max_restarts": 0} | keys)
    return WorkerVecEnv(make_simulator, config, num_envs, H, SEED)


def command(kind: int, env: int) -> torch.Tensor:
    actions = IDLE.clone()
    actions[env, 1, kind] = 1.0
    return actions


def run(vec_env: WorkerVecEnv, actions: torch.Tensor, env_ids: range = range(2)) -> ChunkResult:
    vec_env.step_async(actions, env_ids)
    return vec_env.step_wait(env_ids)


def tensors(result: ChunkResult) -> dict[str, torch.Tensor]:
    values = {entry.name: getattr(result, entry.name) for entry in fields(result)}
    values = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return values | {"obs": result.obs["state"], "final_obs": result.final_obs["state"]}


def process_of(vec_env: WorkerVecEnv) -> int:
    """Return the number of the first worker's process."""
    process = vec_env._workers[0].process
    assert process is not None
    return process


def is_running(process: int) -> bool:
    """Tell whether a process runs; one that has ended and that nobody asks after does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for_end(process: int) -> None:
    """Wait until a process has ended and its server has seen that."""
    while is_running(process):
        time.sleep(0.005)


def first_draw(env: int, episode: int) -> float:
    return float(np.float32(np.random.default_rng(derive_seed(SEED, "episode", env, episode)).uniform()))


def kill(vec_env: WorkerVecEnv) -> None:
    os.kill(process := process_of(vec_env), signal.SIGKILL)
    wait_for_end(process)


def stop(vec_env: WorkerVecEnv) -> None:
    os.kill(process_of(vec_env), signal.SIGSTOP)


def list_workers() -> set[int]:
    """Return the processes of all workers of this process's servers."""
    return set(running_workers())


def left_behind() -> tuple[set[int], int, int]:
    """Return this process's workers, its mapped boards and the number of its descriptors."""
    gc.collect()  # what earlier tests have let go of may hold some until then
    boards = Path("/proc/self/maps").read_text().count("asyncflow-board")
    return list_workers(), boards, len(os.listdir("/proc/self/fd"))
