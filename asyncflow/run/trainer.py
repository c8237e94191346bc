"""The loop: take a rollout, update, publish, release, and tell callbacks. `Trainer` is what a user's program holds.

The loop never asks whether rollouts are collected inline or in a thread (`collecting` does), and it writes nothing by
itself: `recorded` adds a run folder, evaluation, logs and checkpoints to it by being one of its callbacks.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from torch import Tensor
from typing_extensions import Self

from asyncflow.config.sections import BufferType, CompileMode
from asyncflow.envs.base import VecEnv
from asyncflow.errors import AsyncflowError, ConfigError
from asyncflow.metrics.timing import Stopwatch
from asyncflow.policies.base import Policy
from asyncflow.policies.policy_file import check_saving
from asyncflow.ppo.ppo import PPO
from asyncflow.ppo.promises import check_first_ratio
from asyncflow.rollout.channel import Channel
from asyncflow.rollout.collector import Collector
from asyncflow.rollout.episodes import episode_metrics
from asyncflow.rollout.ring import BufferClosed, Rollout
from asyncflow.run.checkpoint import Checkpoint, PolicyToSave, write_checkpoint
from asyncflow.run.collecting import Collecting, LoopSettings
from asyncflow.run.doubts import Doubts
from asyncflow.run.progress import Limits, Progress
from asyncflow.run.rates import RateMeter, memory_metrics, rollout_metrics
from asyncflow.run.recipe import RECIPE, Recipe, check_agreement, check_journal, check_kinds, read_saved
from asyncflow.run.reporter import Reporter, Row
from asyncflow.run.state import RunState, name_snapshots, read_snapshots
from asyncflow.signals import ctrl_c_calls

STOP_GRACE_S = 5.0  # an update that takes longer after a request to stop is abandoned


class StopTraining(AsyncflowError):
    """Raised by a callback: `train` returns after this update."""


class UpdateAbandoned(AsyncflowError):
    """A stop was requested, and the update under way took too long after that."""


class Trainer:
    """Trains a policy in environments with PPO. Main thread only, except `request_stop` and `interrupt`.

    Between two calls of `train` nothing runs; the environments may be evaluated in, and the next call goes on as if
    that had not been.

    Attributes:
        policy: What is trained.
        env: The environments that it acts in.
        ppo: What updates it.
        progress: How far training is.
        row: Metrics of the last update.
        callbacks: Called with the trainer and its row after every update.
        is_stopping: Whether a stop was requested.
    """

    def __init__(  # noqa: PLR0913  keyword arguments with defaults, of which a user gives a few
        self,
        policy: Policy,
        env: VecEnv,
        ppo: PPO | None = None,
        *,
        buffer_size: int = 960,
        buffer_type: BufferType = "vla",
        max_policy_lag: int | None = None,
        lag_mode: Literal["fixed", "bounded"] = "fixed",
        on_full: Literal["block", "overwrite"] = "block",
        num_env_groups: int = 1,
        compile: CompileMode = "none",
        seed: int = 0,
        reporter: Reporter | None = None,
        callbacks: Sequence[Callable[[Trainer, Row], object]] = (),
    ) -> None:
        """Check that everything fits together; rollouts are allocated when training begins.

        Args:
            policy: What is trained, on the device that it lies on.
            env: Environments; the trainer closes them when it is closed.
            ppo: What updates the policy; None: `PPO(policy)` with its defaults.
            buffer_size: Decisions in a rollout, a multiple of the number of environments and of minibatches.
            buffer_type: `vla` collects in a thread while training; `standard` collects, then trains.
            max_policy_lag: Updates by which a rollout's weights may be older than those that are trained; None means 1
                for `vla` and 0 for `standard`.
            lag_mode: `fixed`: every rollout is as old as `max_policy_lag`, and the run can be repeated; `bounded`: it
                is collected with the newest weights.
            on_full: Whether a collector without a free slot waits, or drops the oldest finished rollout.
            num_env_groups: Groups of environments stepped while others infer.
            compile: How the collector's copy of the policy infers: `none`, `compile` or `graph`.
            seed: Seed of start states, of noise and of the order of minibatches.
            reporter: Told about every update, and what was survived; None: the log named `asyncflow` has the latter.
            callbacks: Functions that are called with the trainer and the row of metrics after every update.

        Raises:
            ConfigError: Policy, environments and settings do not fit together, memory does not suffice, or an argument
                is of another kind.
        """
        self.policy, self.env = policy, env
        self.ppo = PPO(policy) if ppo is None else ppo
        check_kinds(env, self.ppo, reporter, callbacks)
        self.settings = LoopSettings(
            buffer_size, buffer_type, max_policy_lag, lag_mode, on_full, num_env_groups, seed, compile
        )
        Recipe.describe(policy, env, self.ppo, self.settings)  # refuses settings that do not go together
        check_agreement(policy, env, self.ppo)
        self._has_own_length = self.ppo.total_updates is None
        if self.ppo.seed is None:
            self.ppo.seed = seed
        self.progress = Progress()
        self.row: Row = {}
        self.reporter, self.callbacks = reporter, list(callbacks)
        self.notice: Callable[[str], None] = reporter.notice if reporter else logging.getLogger("asyncflow").warning
        self.is_stopping = False
        self.collecting = Collecting(env, policy, self.ppo.config, self.settings)
        self._limits = Limits()
        self._watch = Stopwatch(self.collecting.tracer.recorder("trainer"))
        self._meter: RateMeter | None = None
        self._stop_deadline = math.inf
        self._doubts = Doubts(self._tell, self.ppo.config.success_value == "continue")
        self._has_begun = self._is_closed = False

    # What a user calls.

    def train(self, *, total_updates: int | None = None, total_env_steps: int | None = None) -> Row:
        """Train for so many updates or env steps more, whichever comes first, and return the last update's metrics.

        Ctrl-C, or the stop button of a notebook, ends an update under way within seconds and raises
        `KeyboardInterrupt`; the trainer can train on, be saved or be closed.

        Args:
            total_updates: Updates of this call.
            total_env_steps: Env steps of this call; the update that reaches them is the last.

        Raises:
            ConfigError: Neither limit is given, or the step size falls over a number of updates that is not given.
            CollectorError: Collecting failed.
            TrainingError: Training diverged.
        """
        if self._is_closed:
            raise ConfigError("the trainer is closed; load what was saved: Trainer.resume(path)")
        limits = self.progress.limits_after(total_updates, total_env_steps)
        if self._has_own_length:
            if total_updates is None and self.ppo.config.lr_schedule != "constant":
                raise ConfigError(
                    f"algorithm.lr_schedule = {self.ppo.config.lr_schedule} needs train(total_updates=...), over which "
                    "the step size changes"
                )
            self.ppo.total_updates = limits.total_updates
        self.is_stopping, self._stop_deadline = False, math.inf
        self.collecting.allow()
        with ctrl_c_calls(self.request_stop) as was_interrupted:
            row = self.train_until(limits)
        if was_interrupted():
            raise KeyboardInterrupt
        return row

    def save(self, path: str | Path) -> Path:
        """Write everything that training goes on from into a folder, which `resume` reads; return it.

        The folder is a checkpoint: `asyncflow eval`, `--checkpoint` and `load_policy` take it, too. An older one of
        that name is replaced in one step.

        Raises:
            ConfigError: The path is a file or a folder of something else, or the policy cannot be stored.
            OSError: The disk is full.
        """
        folder = Path(path).expanduser()
        recipe = Recipe.describe(self.policy, self.env, self.ppo, self.settings)
        if self._has_own_length:  # a resumed trainer's schedules, too, fall over the updates of its next call
            recipe = replace(recipe, total_updates=None)
        recipe.check_folder(folder)
        source = self.policy_to_save()
        check_saving(source.policy, source.config, source.env_spec)
        with self.ppo.averaged_weights():
            write_checkpoint(folder, source, self.state(), self.groups(), {RECIPE: recipe.to_json().encode()})
        return folder

    @classmethod
    def resume(  # noqa: PLR0913  objects that may have to be given
        cls,
        path: str | Path,
        *,
        policy: Policy | None = None,
        env: VecEnv | None = None,
        ppo: PPO | None = None,
        reporter: Reporter | None = None,
        callbacks: Sequence[Callable[[Trainer, Row], object]] = (),
    ) -> Self:
        """Return a trainer that goes on where another was saved, bit for bit as if it had not been cut.

        Args:
            path: A folder that `save` wrote; or a run folder of `asyncflow train`, or a checkpoint in it.
            policy: The policy, where asyncflow cannot build it (a class of your own); its weights are replaced.
            env: The environments, where asyncflow cannot build them.
            ppo: The `PPO` of `policy`, where it was given objects such as an advantage estimator.
            reporter: As for `Trainer`.
            callbacks: As for `Trainer`.

        Raises:
            CheckpointError: Nothing was saved there, it is damaged, or does not fit what was given.
            ConfigError: Something has to be given that was not; the message names it.
        """
        saved = read_saved(Path(path).expanduser())
        with contextlib.ExitStack() as on_failure:
            saved.recipe.check_given(policy=policy, env=env, ppo=ppo)
            if env is None:
                env = saved.build_env()
                on_failure.callback(env.close)
            policy = saved.load_into(policy) if policy is not None else saved.build_policy(env)
            ppo = saved.build_ppo(policy, env) if ppo is None else ppo
            trainer = cls(policy, env, ppo, **saved.recipe.arguments, reporter=reporter, callbacks=callbacks)
            trainer.restore(saved.checkpoint)
            on_failure.pop_all()
        return trainer

    def request_stop(self) -> None:
        """Let `train` return after the update under way, if that is soon. Any thread or a signal handler."""
        self._stop_deadline = time.perf_counter() + STOP_GRACE_S
        self.is_stopping = True
        self.collecting.stop()

    def interrupt(self) -> None:
        """Request a stop and end every wait for simulators, which cannot be used afterwards. Never waits."""
        self.request_stop()
        self.collecting.interrupt()

    def close(self) -> None:
        """Stop collecting, then close the environments; may be called twice."""
        self._is_closed = True
        with contextlib.ExitStack() as stack:
            stack.callback(self.env.close)
            stack.callback(self.collecting.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # The loop.

    def train_until(self, limits: Limits) -> Row:
        """Train until a limit of the whole run is reached or a stop was requested; return the last row.

        Raises:
            CollectorError: Collecting failed.
            TrainingError: Training diverged.
        """
        self._limits, clocks = limits, self.progress
        counters = (clocks.env_steps, clocks.decisions, clocks.updates)
        self._meter = RateMeter(self.collecting.clock, self.row.get("wall_s", 0.0), counters)
        self.begin()
        try:
            self._run_updates()
            self.collecting.finish()
        except BaseException:
            self.collecting.stop()
            raise
        return self.row

    def begin(self) -> None:
        """Tell, once, what environments and rewards give reason to tell."""
        if not self._has_begun:
            self._has_begun = True
            for notice in self.env.notices:
                self.notice(notice)
            self._doubts.look_at_rewards(self.env.simulator_spec.env_meta)

    def _run_updates(self) -> None:
        """The loop, the same for both buffer types."""
        while not self.is_finished:
            try:
                with self._watch.measure("wait_data_s"):
                    rollout = self._next_rollout()
                self._train_on(rollout)
            except (BufferClosed, UpdateAbandoned):
                if not self.is_stopping:
                    raise
                break
            try:
                self._tell_update()
            except StopTraining:
                break

    def _next_rollout(self) -> Rollout:
        if not self.collecting.is_open:
            total = self._limits.total_updates
            self.collecting.open(self.progress, None if total is None else total - self.progress.updates)
        return self.collecting.next_rollout()

    def _train_on(self, rollout: Rollout) -> None:
        """Update on one rollout, publish the new weights, release the slot, and note the metrics."""
        progress, watch, channel = self.progress, self._watch, self.collecting.channel
        assert self._meter is not None  # `train_until` made it
        if progress.updates == 0:
            check_first_ratio(self.policy, rollout, self.ppo.config.num_minibatches)
        with channel.clock.busy("trainer"):
            with watch.measure("update_s"):
                metrics = self.ppo.update(rollout, progress.updates, self._check_update)
            lag = progress.updates - rollout.policy_version
            progress.advance(rollout)
            self.policy.anneal(progress.updates)
            with watch.measure("publish_s"):
                channel.publisher.publish(progress.updates)
            metrics |= rollout_metrics(rollout, lag, watch.take())
            horizon = math.ceil(self.env.spec.horizon / self.policy.n_action_steps)
            end = (rollout.index + 1) * self.collecting.plan.num_steps - horizon + 1  # later episodes may be open still
            episodes = progress.take_episodes(rollout.info.episodes, end)
            names = [task.name for task in self.env.spec.tasks]
            metrics |= episode_metrics(episodes, self.env.spec.has_success, names)
            self._doubts.look_at_inputs(self.policy, self.env.spec, rollout.obs)
            channel.buffer.release(rollout)
        for fault in rollout.info.faults:
            self.notice(fault.message)
        self._doubts.look_at_returns(episodes)
        metrics |= {f"buffer/{name}": float(count) for name, count in channel.buffer.books().items()}
        metrics |= memory_metrics() | progress.fault_metrics() | progress.clocks
        collect_s = rollout.info.seconds["collect_s"]
        self.row = metrics | self._meter.measure(progress.env_steps, progress.decisions, progress.updates, collect_s)

    def _tell(self, text: str) -> None:
        self.notice(text)

    def _tell_update(self) -> None:
        if self.reporter is not None:
            self.reporter.update(self.row)
        for callback in self.callbacks:
            callback(self, self.row)

    def _check_update(self) -> None:
        """Let a failed collector, or a stop requested too long ago, end an update before the next minibatch."""
        self.collecting.check()
        if time.perf_counter() > self._stop_deadline:
            raise UpdateAbandoned("a stop was requested")

    # What others read.

    @property
    def is_finished(self) -> bool:
        """Whether a limit was reached or a stop was requested."""
        return self.is_stopping or self.progress.is_at_end(self._limits)

    @property
    def channel(self) -> Channel:
        """Ring and weights, once training has begun."""
        return self.collecting.channel

    @property
    def collector(self) -> Collector:
        """The source of rollouts, once training has begun."""
        return self.collecting.collector

    def unmeasured(self) -> contextlib.AbstractContextManager[None]:
        """Leave a block, such as an evaluation in a callback, out of wall time and rates."""
        return contextlib.nullcontext() if self._meter is None else self._meter.paused()

    def state(self, is_evaluation_owed: bool = False) -> RunState:
        """Return the plain values that training goes on from."""
        books = self.collecting.books()
        return self.progress.to_state(books, self.ppo.num_nonfinite_steps, is_evaluation_owed, self.row)

    def groups(self) -> dict[str, Mapping[str, Tensor]]:
        """Return the tensors that training goes on from, besides the policy's."""
        groups = name_snapshots(self.collecting.snapshots()) | {"optimizer": self.ppo.state_tensors()}
        if self.progress.journal is not None:
            groups["journal"] = self.progress.journal.to_tensors()
        return groups

    def policy_to_save(self) -> PolicyToSave:
        """Return the policy with what rebuilds it."""
        return PolicyToSave(self.policy, self.policy.made_from, self.env.simulator_spec)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, whose file of the policy was loaded already.

        Raises:
            CheckpointError: It is of another policy, of other environments, or of other settings.
        """
        state, journal = checkpoint.state, checkpoint.journal
        check_journal(journal, self.env, self.policy, checkpoint.path)
        self.ppo.begin_average()  # the policy's file holds the averaged weights, where there are such
        self.collecting.restore(read_snapshots(checkpoint.groups), asdict(state.books), str(checkpoint.path))
        self.ppo.load_state_tensors(checkpoint.groups.get("optimizer", {}))
        self.ppo.num_nonfinite_steps = state.num_nonfinite_steps
        self.progress, self.row = Progress.from_state(state, journal), dict(state.row)
