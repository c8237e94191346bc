"""The loop: take a rollout, update, publish, release, then log, evaluate and save when due.

Owns the order of things and the three clocks. `Trainer` never asks whether rollouts are collected inline or in a
thread; only `build_collector` knows both kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from asyncflow.buffer import BufferClosed, Rollout, RolloutBuffer
from asyncflow.checkpoint import create_run_folder, name_run_folder, point_at, save_checkpoint
from asyncflow.collector import (
    Channel,
    Collector,
    CollectorSettings,
    InlineCollector,
    RolloutWriter,
    ThreadedCollector,
    plan_ring,
)
from asyncflow.config import Config
from asyncflow.device import resolve_device
from asyncflow.envs import make_vec_env
from asyncflow.envs.base import EnvSpec, VecEnv
from asyncflow.errors import CheckpointError
from asyncflow.evaluate import EvalResult, evaluate
from asyncflow.metrics import MetricLogger
from asyncflow.policies import make_policy
from asyncflow.policies.base import Policy
from asyncflow.policy_file import load_into, load_policy_file, resolve_checkpoint
from asyncflow.ppo import PPO
from asyncflow.rates import RateMeter, memory_metrics, rollout_metrics
from asyncflow.seeding import derive_seed
from asyncflow.timing import OverlapClock, Stopwatch
from asyncflow.weights import WeightPublisher


class Reporter(Protocol):
    """Who watches a run."""

    def start(self, config: Config, run_dir: Path, ring_bytes: int, device: str) -> None:
        """Everything is planned, nothing large is allocated yet."""

    def update(self, row: dict[str, float]) -> None:
        """An update was finished; `row` is its line of `metrics.jsonl`."""

    def evaluation(self, updates: int, result: EvalResult) -> None:
        """An evaluation was finished."""

    def end(self, run_dir: Path, checkpoint: Path, row: dict[str, float], is_stopped: bool) -> None:
        """The run is over and saved; `row` is that of its last update."""


@dataclass
class Clocks:
    """The three clocks, never mixed: env steps and decisions of trained rollouts, and updates."""

    env_steps: int = 0
    decisions: int = 0
    updates: int = 0


@dataclass(frozen=True)
class Parts:
    """What a run is made of; `build_parts` makes it."""

    env: VecEnv
    policy: Policy
    channel: Channel
    collector: Collector
    ppo: PPO

    def close(self) -> None:
        """Stop the collector, then the simulators. Main thread; waits for the decision under way."""
        try:
            self.collector.close()
        finally:
            self.env.close()


def build_policy(config: Config, spec: EnvSpec, device: torch.device) -> Policy:
    """Return the policy that training starts from, on `device`.

    Raises:
        ConfigError: The policy's keys do not fit together.
        CheckpointError: `policy.checkpoint` does not exist or does not fit.
    """
    policy = make_policy(config.policy, spec.obs_shapes, spec.action_dim, config.trainer.seed)
    if config.policy.checkpoint:
        file = load_policy_file(resolve_checkpoint(config.policy.checkpoint))
        if file.env_spec.obs_keys != spec.obs_keys:
            raise CheckpointError(
                f"policy.checkpoint = {config.policy.checkpoint}: made for env.obs_keys = "
                f"{list(file.env_spec.obs_keys)}, the run has {list(spec.obs_keys)}"
            )
        load_into(policy, file)
    policy.anneal(0)
    return policy.to(device)


def check_start(config: Config) -> Path:
    """Find a user's mistakes before simulators are built, which takes seconds; return the run folder to create.

    Raises:
        ConfigError: The device, the checkpoint or the policy cannot be had, or the folder already holds a run.
    """
    resolve_device(config.trainer.device)
    folder = name_run_folder(config)
    spec = EnvSpec({"state": (1,)}, action_dim=1, horizon=1)
    if config.policy.checkpoint:
        spec = load_policy_file(resolve_checkpoint(config.policy.checkpoint)).env_spec
    build_policy(config, spec, torch.device("cpu"))
    return folder


def build_parts(config: Config, on_plan: Callable[[int], None] = lambda num_bytes: None) -> Parts:
    """Build everything that trains.

    Args:
        config: The run.
        on_plan: Told the ring's bytes before it is allocated.

    Raises:
        ConfigError: The device, the task or the checkpoint does not exist or does not fit.
        EnvError: A simulator could not be built.
    """
    device = resolve_device(config.trainer.device)
    torch.set_num_threads(config.trainer.num_threads)
    seed = config.trainer.seed
    env = make_vec_env(config.env, config.policy.n_action_steps, config.env.num_envs, derive_seed(seed, "train"))
    try:
        policy = build_policy(config, env.spec, device)
        num_slots = config.max_policy_lag + 1 if config.trainer.buffer_type == "vla" else 1
        plan = plan_ring(policy, env.spec, config.env.num_envs, config.num_steps, num_slots)
        on_plan(plan.num_bytes)
        buffer = RolloutBuffer(plan, device, config.buffer.on_full == "overwrite")
        channel = Channel(buffer, WeightPublisher(policy, config.max_policy_lag), OverlapClock())
        ppo = PPO(policy, config.algorithm, seed, config.trainer.total_updates)
        collector = build_collector(config, env, policy, channel)
    except BaseException:
        env.close()
        raise
    return Parts(env, policy, channel, collector, ppo)


def build_collector(config: Config, env: VecEnv, policy: Policy, channel: Channel) -> Collector:
    """Return the collector of `trainer.buffer_type`; the only place that tells the two modes apart."""
    settings = CollectorSettings(
        seed=config.trainer.seed,
        gamma=config.algorithm.gamma,
        num_env_groups=config.collector.num_env_groups,
        max_policy_lag=config.max_policy_lag if config.buffer.lag_mode == "fixed" else None,
        emulated_latency_s=config.policy.emulated_latency_s,
    )
    writer = RolloutWriter(env, policy, channel, settings)
    if config.trainer.buffer_type == "standard":
        return InlineCollector(writer, channel)
    num_rollouts = config.trainer.total_updates if config.buffer.on_full == "block" else None
    return ThreadedCollector(writer, channel, num_rollouts)


class Trainer:
    """Runs the loop on built parts. Main thread only, except `request_stop`."""

    def __init__(self, config: Config, parts: Parts, run_dir: Path, reporter: Reporter) -> None:
        """Open the run's logs."""
        self.config, self.parts, self.run_dir, self.reporter = config, parts, run_dir, reporter
        self.clocks = Clocks()
        self.is_stopping = False
        self._logger = MetricLogger(run_dir, config.logging.logger)
        self._watch = Stopwatch()
        self._meter = RateMeter(parts.channel.clock)
        self._eval_env: VecEnv | None = None
        self._best = -1.0

    def run(self) -> dict[str, float]:
        """Train to the end or until stopped, save, and return the last update's metrics.

        Raises:
            CollectorError: Collecting failed.
        """
        row: dict[str, float] = {}
        self._evaluate_if_due({})
        self.parts.collector.start()
        while not self.is_finished:
            try:
                with self._watch.measure("wait_data_s"):
                    rollout = self.parts.collector.next_rollout()
            except BufferClosed:
                break  # a stop was requested
            row = self._train_on(rollout)
            self._evaluate_if_due(row)
            self._log(row)
            if self.clocks.updates % self.config.trainer.save_interval == 0:
                self._save()
        checkpoint = self._save()
        self.reporter.end(self.run_dir, checkpoint, row, self.is_stopping)
        return row

    @property
    def is_finished(self) -> bool:
        """Whether a limit was reached or a stop was requested."""
        limits, clocks = self.config.trainer, self.clocks
        return (
            self.is_stopping
            or (limits.total_updates is not None and clocks.updates >= limits.total_updates)
            or (limits.total_env_steps is not None and clocks.env_steps >= limits.total_env_steps)
        )

    def request_stop(self) -> None:
        """End the run after the update under way. Any thread or a signal handler; never waits."""
        self.is_stopping = True
        self.parts.channel.buffer.close()

    def close(self) -> None:
        """Join the collector thread, stop all simulators, close the logs; each of them whatever the others raise."""
        with ExitStack() as stack:
            stack.callback(self._logger.close)
            if self._eval_env is not None:
                stack.callback(self._eval_env.close)
            stack.callback(self.parts.close)

    def _train_on(self, rollout: Rollout) -> dict[str, float]:
        """Update on one rollout, publish the new weights, release the slot; return the metrics."""
        parts, clocks, watch = self.parts, self.clocks, self._watch
        with parts.channel.clock.busy("trainer"):
            with watch.measure("update_s"):
                metrics = parts.ppo.update(rollout, clocks.updates, parts.collector.check)
            lag = clocks.updates - rollout.policy_version
            clocks.updates += 1
            clocks.decisions += int(rollout.data.numel())
            clocks.env_steps += int(rollout.data["executed"].sum())  # sync: the update's metrics were just fetched
            parts.policy.anneal(clocks.updates)
            with watch.measure("publish_s"):
                parts.channel.publisher.publish(clocks.updates)
            metrics |= rollout_metrics(rollout, lag, watch.take())
            parts.channel.buffer.release(rollout)
        metrics |= {f"buffer/{name}": float(count) for name, count in parts.channel.buffer.books().items()}
        metrics |= memory_metrics() | asdict(clocks)
        return metrics | self._meter.measure(clocks.env_steps, clocks.decisions, clocks.updates)

    def _log(self, row: dict[str, float]) -> None:
        self._logger.write(row)
        self.reporter.update(row)

    def _evaluate_if_due(self, row: dict[str, float]) -> None:
        """Evaluate in the main thread while the collector goes on; the meter leaves this time out."""
        trainer, updates = self.config.trainer, self.clocks.updates
        is_last = self.is_finished and not self.is_stopping
        if not trainer.eval_interval or self.is_stopping or (updates % trainer.eval_interval and not is_last):
            return
        try:
            with self._meter.paused():
                env = self._open_eval_env()
                result = evaluate(self.parts.policy, env, trainer.eval_episodes, trainer.seed, self._check_evaluation)
        except BufferClosed:
            return  # a stop was requested
        row |= result.as_metrics()
        self.reporter.evaluation(updates, result)
        if result.success_rate > self._best and updates:
            self._best = result.success_rate
            point_at(self.run_dir, "best", self._save())

    def _check_evaluation(self) -> None:
        """Let a failed collector or a requested stop end an evaluation between two decisions."""
        self.parts.collector.check()
        if self.is_stopping:
            raise BufferClosed("a stop was requested")

    def _open_eval_env(self) -> VecEnv:
        """Return simulators of the evaluation's own, built at the first call."""
        if self._eval_env is None:
            config = self.config
            num_envs = min(config.env.num_envs, config.trainer.eval_episodes)
            seed = derive_seed(config.trainer.seed, "evaluation")
            self._eval_env = make_vec_env(config.env, config.policy.n_action_steps, num_envs, seed)
        return self._eval_env

    def _save(self) -> Path:
        state = asdict(self.clocks)
        return save_checkpoint(self.run_dir, self.parts.policy, self.config.policy, self.parts.env.spec, state)


def train(config: Config, reporter: Reporter, on_built: Callable[[Trainer], None] = lambda trainer: None) -> Trainer:
    """Train a new run from beginning to end and return its closed trainer.

    Args:
        config: The run.
        reporter: Told what happens.
        on_built: Given the trainer before it runs, so that a signal handler can stop it.

    Raises:
        ConfigError: The run cannot be built as asked.
        CollectorError: Collecting failed.
    """
    folder = check_start(config)

    def announce(ring_bytes: int) -> None:
        create_run_folder(folder, config)
        reporter.start(config, folder, ring_bytes, str(resolve_device(config.trainer.device)))

    parts = build_parts(config, announce)
    with ExitStack() as stack:
        stack.callback(parts.close)  # a trainer that cannot be built leaves no simulators behind
        trainer = Trainer(config, parts, folder, reporter)
        stack.pop_all()
        stack.callback(trainer.close)
        on_built(trainer)
        trainer.run()
    return trainer
