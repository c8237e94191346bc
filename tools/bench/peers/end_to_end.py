"""Compare collecting and training on Lift with the peers; a part of `tools.bench.peers`."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import SubprocVecEnv

from asyncflow.config.presets import load_config
from asyncflow.config.sections import Config
from asyncflow.profile.leg import Watcher
from asyncflow.run import launch
from tools.bench.common.report import REPORTED, Finding, Part, isolated
from tools.bench.core.workers import CHUNK_LENGTH, HORIZON, NUM_ENVS, count_workers
from tools.bench.peers.contenders import make_sb3
from tools.bench.peers.env import ChunkEnv, EnvPlan
from tools.bench.peers.setting import ALGORITHM, HIDDEN, NUM_EPOCHS, NUM_MINIBATCHES, STD
from tools.bench.peers.settings import Settings
from tools.bench.peers.torchrl import run_torchrl

NUM_WARMUP = 2  # updates: both lanes in step, caches and allocators warm
MIN_SPEEDUP = 1.5
OURS, SB3, SB3_FEW, TORCHRL = (
    "asyncflow (asynchronous)",
    "stable-baselines3",
    "stable-baselines3, few environments",
    "TorchRL",
)
Marks = list[tuple[float, int]]

END_TO_END_NOTE = (
    "End to end: Lift, {envs} environments, {workers} workers, chunks of {chunk}, episodes of {horizon} env steps, "
    "{size} decisions a rollout, {epochs} epochs of {minibatches} minibatches, the network of the update above, "
    "untrained. Everyone steps the same simulator. asyncflow: `--buffer-type vla`, lag 1. stable-baselines3: "
    "`SubprocVecEnv`, which has a process for every environment; also with {workers} environments alone, as many as "
    "workers, whose rollouts are as large. TorchRL: `MultiAsyncCollector` of {workers} workers, each with its share of "
    "the environments in a `SerialEnv`. A run of each in turn, {repeats} times, every run in processes of its own; "
    "env steps of {updates} updates over their time, from an update's end to another's, the first {warmup} left out."
)


# The contenders.


def run_asyncflow(plan: EnvPlan, rollout_size: int, num_updates: int) -> Marks:
    """Train asynchronously; return when each update ended, in seconds, and the env steps trained on until then."""
    with tempfile.TemporaryDirectory() as parent:
        watcher = Watcher(num_updates)
        config = make_config(plan, rollout_size, num_updates, Path(parent) / "run")
        launch.train(config, watcher, watcher.watch)
    return [(row["wall_s"], int(row["env_steps"])) for row in watcher.rows]


def make_config(plan: EnvPlan, rollout_size: int, num_updates: int, folder: Path) -> Config:
    """Return the run; it is longer than what is measured, so that the collector works on until the end."""
    changes: dict[str, Any] = {
        "env.task": "Lift",
        "env.horizon": HORIZON,
        "env.num_envs": NUM_ENVS,
        "env.num_workers": count_workers(),
        "env.fast_step": plan.fast_step,
        "policy.kind": "gaussian",
        "policy.log_prob": "joint_sum",
        "policy.hidden_sizes": HIDDEN,
        "policy.critic_hidden_sizes": HIDDEN,
        "policy.horizon": CHUNK_LENGTH,
        "policy.n_action_steps": CHUNK_LENGTH,
        "policy.initial_std": STD,
        **{f"algorithm.{key}": value for key, value in ALGORITHM.items()},
        "buffer.buffer_size": rollout_size,
        "trainer.buffer_type": "vla",
        "trainer.seed": plan.seed,
        "trainer.device": "cpu",
        "trainer.total_updates": num_updates + 3,
        "trainer.save_interval": num_updates + 4,
        "trainer.eval_interval": 0,
        "logging.logger": "none",
        "logging.out": str(folder),
    }
    return load_config(None, changes)


class UpdateClock(BaseCallback):
    """Notes when stable-baselines3's updates end: at the next rollout's start, or at the end of training."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: Marks = []
        self._env_steps = 0

    def _on_step(self) -> bool:
        self._env_steps += int(sum(info["executed"] for info in self.locals["infos"]))
        return True

    def _on_rollout_start(self) -> None:
        self.marks.append((time.perf_counter(), self._env_steps))

    def _on_training_end(self) -> None:
        self._on_rollout_start()


def run_sb3(plan: EnvPlan, num_envs: int, rollout_size: int, num_updates: int) -> Marks:
    """Train with stable-baselines3; returns as `run_asyncflow` does."""
    import_simulator(plan)
    env = SubprocVecEnv([partial(ChunkEnv, plan, index) for index in range(num_envs)], start_method="fork")
    clock = UpdateClock()
    make_sb3(env, rollout_size // num_envs).learn(rollout_size * num_updates, clock)
    env.close()
    return clock.marks[1:]


def import_simulator(plan: EnvPlan) -> None:
    """Import and compile what simulators need, for forks of this process: each of many would take seconds for it."""
    env = ChunkEnv(plan, 0)
    env.reset()
    env.step(np.zeros(env.action_space.shape or (), np.float32))
    env.close()


# The comparison.


def make_runs(rollout_size: int, num_updates: int) -> dict[str, Callable[[EnvPlan], Marks]]:
    """Return everyone, by name."""
    workers = count_workers()
    return {
        OURS: partial(run_asyncflow, rollout_size=rollout_size, num_updates=num_updates),
        SB3: partial(run_sb3, num_envs=NUM_ENVS, rollout_size=rollout_size, num_updates=num_updates),
        SB3_FEW: partial(run_sb3, num_envs=workers, rollout_size=rollout_size, num_updates=num_updates),
        TORCHRL: partial(run_torchrl, num_workers=workers, rollout_size=rollout_size, num_updates=num_updates),
    }


def measure_run(run: Callable[[EnvPlan], Marks], fast_step: bool, seed: int) -> float:
    """Return the env steps/s of one run after its warm-up."""
    torch.set_num_threads(1)
    marks = run(EnvPlan(fast_step, seed))
    (start_s, first), (end_s, last) = marks[NUM_WARMUP - 1], marks[-1]
    return (last - first) / (end_s - start_s)


def measure_all(settings: Settings) -> dict[tuple[str, bool], list[float]]:
    """Return env steps/s of every contender, with the fast step and without, a run in each repeat."""
    runs = make_runs(settings.rollout, NUM_WARMUP + settings.updates)
    turns = [(name, fast_step) for fast_step in (False, True) for name in runs]
    rates: dict[tuple[str, bool], list[float]] = {turn: [] for turn in turns}
    for repeat in range(settings.repeats):
        for name, fast_step in turns[:: -1 if repeat % 2 else 1]:
            rates[name, fast_step].append(isolated(measure_run, runs[name], fast_step, repeat))
    return rates


def describe_end_to_end(rates: dict[tuple[str, bool], list[float]], settings: Settings) -> Part:
    """Compare asyncflow with the faster peer, both on the steps that they would have and on each other's."""
    medians = {turn: statistics.median(values) for turn, values in rates.items()}
    findings = []
    for ours, theirs, target in ((True, False, MIN_SPEEDUP), (False, False, None), (True, True, None)):
        peer = max((SB3, SB3_FEW, TORCHRL), key=lambda name: medians[name, theirs])
        ratio = medians[OURS, ours] / medians[peer, theirs]
        steps = f"{name_step(ours)} over {peer} with {name_step(theirs)}"
        what = f"env steps/s, collecting and training on Lift: {OURS} with {steps}, the faster peer"
        is_met = not target or ratio >= target
        findings.append(Finding(what, f"{ratio:.2f}", f">= {target}" if target else REPORTED, is_met))
    return Part(findings, [describe_options(settings), *describe_rates(rates)])


def name_step(is_fast: bool) -> str:
    """Return what a simulator's step is called."""
    return "`fast_step`" if is_fast else "robosuite's step"


def describe_options(settings: Settings) -> str:
    """Return what was measured, in one paragraph."""
    return END_TO_END_NOTE.format(
        envs=NUM_ENVS,
        workers=count_workers(),
        chunk=CHUNK_LENGTH,
        horizon=HORIZON,
        size=settings.rollout,
        epochs=NUM_EPOCHS,
        minibatches=NUM_MINIBATCHES,
        repeats=settings.repeats,
        updates=settings.updates,
        warmup=NUM_WARMUP,
    )


def describe_rates(rates: dict[tuple[str, bool], list[float]]) -> list[str]:
    """Return the env steps/s of everyone, a line for each kind of step."""
    lines = []
    for fast_step in (False, True):
        each = [
            f"{name} {statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"
            for (name, is_fast), values in rates.items()
            if is_fast == fast_step
        ]
        lines.append(f"Env steps/s with {name_step(fast_step)}, median and range: {', '.join(each)}.")
    return lines


def bench_end_to_end(settings: Settings) -> Part:
    """Run everyone in turn."""
    return describe_end_to_end(measure_all(settings), settings)
