"""The loop: take a rollout, update, publish, release, then evaluate, log and save when due.

Owns the order of things, the three clocks, and what a checkpoint holds. `Trainer` never asks whether rollouts are
collected inline or in a thread; only `build` knows both kinds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from asyncflow.config.plugins import trusting_words
from asyncflow.config.sections import Config
from asyncflow.envs.base import EnvInterrupted, Fault
from asyncflow.errors import AsyncflowError, TrainingError
from asyncflow.metrics.glossary import MetricLogger
from asyncflow.metrics.timing import Stopwatch
from asyncflow.policies.base import Normalizer, clipped_inputs
from asyncflow.ppo.promises import check_first_ratio
from asyncflow.rollout.episodes import episode_metrics
from asyncflow.rollout.latency import EmulatedLatency
from asyncflow.rollout.ring import BufferClosed, Rollout
from asyncflow.rollout.success_value import warn_of_returns, warn_of_shaped_reward
from asyncflow.run.build import Parts
from asyncflow.run.checkpoint import Checkpoint, PolicyToSave, point_at, prune_checkpoints, save_checkpoint
from asyncflow.run.evaluate import EvalResult, evaluate
from asyncflow.run.rates import RateMeter, memory_metrics, rollout_metrics
from asyncflow.run.state import name_snapshots
from asyncflow.shell import command

NOTICED_CLIPPED_SHARE = 0.1  # of a rollout's observed numbers
STOP_GRACE_S = 5.0  # an update that takes longer after a request to stop is abandoned


class Reporter(Protocol):
    """Who watches a run."""

    def start(self, config: Config, run_dir: Path, ring_bytes: int, device: str) -> None:
        """Everything is planned, nothing large is allocated yet."""

    def update(self, row: dict[str, float]) -> None:
        """An update was finished; `row` is its line of `metrics.jsonl`."""

    def evaluation(self, updates: int, result: EvalResult) -> None:
        """An evaluation was finished."""

    def notice(self, text: str) -> None:
        """Something was survived, or was not as expected."""

    def end(self, run_dir: Path, checkpoint: Path, row: dict[str, float], is_stopped: bool) -> None:
        """The run is over and saved; `row` is that of its last update."""


class UpdateAbandoned(AsyncflowError):
    """A stop was requested, and the update under way took too long after that."""


class Trainer:
    """Runs the loop on built parts. Main thread only, except `request_stop`."""

    def __init__(
        self, config: Config, parts: Parts, run_dir: Path, reporter: Reporter, resumed: Checkpoint | None = None
    ) -> None:
        """Open the run's logs; `resumed` is what `parts` were built from."""
        self.config, self.parts, self.run_dir, self.reporter = config, parts, run_dir, reporter
        self.progress = parts.progress
        self.is_stopping = False
        self._stop_deadline = float("inf")
        self._has_told_clipped = False
        self._has_told_of_rewards = config.algorithm.success_value == "continue"
        self._row: dict[str, float] = dict(resumed.state.row) if resumed else {}
        self._is_evaluation_owed = resumed.state.is_evaluation_owed if resumed else True
        self._newest = resumed.path if resumed else None
        kept_rows = self.progress.updates - self._is_evaluation_owed if resumed else 0
        self._logger = MetricLogger(run_dir, config.logging.logger, kept_rows)
        self._logged = self.progress.updates  # the newest update whose row was written, or is owed with its evaluation
        self._watch = Stopwatch(parts.channel.tracer.recorder("trainer"))
        self._latency = EmulatedLatency.from_config(config.trainer, "update", config.algorithm.emulated_latency_s)
        if config.logging.trace:
            name = f"trace_{self.progress.updates:06d}.json" if resumed else "trace.json"
            parts.channel.tracer.open(run_dir / name)
        clocks = self.progress
        counters = (clocks.env_steps, clocks.decisions, clocks.updates)
        self._meter = RateMeter(parts.channel.clock, self._row.get("wall_s", 0.0), counters)

    def run(self) -> dict[str, float]:
        """Train to the end or until stopped, save, and return the last update's metrics.

        Raises:
            CollectorError: Collecting failed; what was trained is saved.
            TrainingError: Training failed; the message names the last good checkpoint.
            AsyncflowError: The end could not be saved.
        """
        try:
            self._run_updates()
        except TrainingError as error:
            raise TrainingError(f"{error}; last good checkpoint: {self._newest or 'none'}") from error
        except (Exception, SystemExit):  # a model or a simulator may call sys.exit
            if self._is_whole and self._save():
                words = trusting_words(self.config.policy.vla.model_class)
                resume = command("train", "--resume", self.run_dir, *words)
                self.reporter.notice(f"saved {self._newest}; go on with: {resume}")
            raise
        if not self._save():
            raise AsyncflowError(f"the run's end could not be saved; newest checkpoint: {self._newest or 'none'}")
        assert self._newest is not None  # it was saved
        self.reporter.end(self.run_dir, self._newest, self._row, self.is_stopping)
        return self._row

    def request_stop(self) -> None:
        """End the run after the update under way, if that is soon. Any thread or a signal handler; never waits."""
        self._stop_deadline = time.perf_counter() + STOP_GRACE_S
        self.is_stopping = True
        self.parts.interrupt()

    def close(self) -> None:
        """Join the collector thread, stop all simulators, close the logs; each of them whatever the others raise."""
        with ExitStack() as stack:
            stack.callback(self._close_logs)
            stack.callback(self.parts.close)

    def _close_logs(self) -> None:
        for problem in (*self._logger.close(), self.parts.channel.tracer.close()):
            if problem is not None:
                self.reporter.notice(problem)

    @property
    def is_finished(self) -> bool:
        """Whether a limit was reached or a stop was requested."""
        return self.is_stopping or self.progress.is_at_end(self.config.trainer)

    @property
    def _is_whole(self) -> bool:
        """Whether a run can go on from here: the newest update is published and its row written, or owed with it."""
        return self._is_evaluation_owed or self._logged == self.progress.updates

    def _run_updates(self) -> None:
        """The loop, the same for both buffer types."""
        self._tell_of_rewards(warn_of_shaped_reward(self.parts.env.simulator_spec.env_meta))
        if self._is_evaluation_owed:
            self._finish_update()
        self.parts.collector.start()
        while not self.is_finished:
            try:
                with self._watch.measure("wait_data_s"):
                    rollout = self.parts.collector.next_rollout()
                self._train_on(rollout)
            except (BufferClosed, UpdateAbandoned):
                break  # a stop was requested
            self._finish_update()

    def _train_on(self, rollout: Rollout) -> None:
        """Update on one rollout, publish the new weights, release the slot, and note the metrics."""
        parts, progress, watch = self.parts, self.progress, self._watch
        if progress.updates == 0:
            check_first_ratio(parts.policy, rollout, self.config.algorithm.num_minibatches)
        with parts.channel.clock.busy("trainer"):
            with watch.measure("update_s"):
                metrics = parts.ppo.update(rollout, progress.updates, self._check_update)
            lag = progress.updates - rollout.policy_version
            self._advance(rollout)
            parts.policy.anneal(progress.updates)
            with watch.measure("publish_s"):
                parts.channel.publisher.publish(progress.updates)
            metrics |= rollout_metrics(rollout, lag, watch.take())
            episodes = progress.take_episodes(rollout.info.episodes, self._end_of_fair_starts(rollout))
            metrics |= episode_metrics(episodes, parts.env.spec.has_success)
            self._tell_clipped(rollout)
            parts.channel.buffer.release(rollout)
        self._tell(rollout.info.faults)
        self._tell_of_rewards(warn_of_returns(episodes))
        metrics |= {f"buffer/{name}": float(count) for name, count in parts.channel.buffer.books().items()}
        metrics |= memory_metrics() | progress.fault_metrics() | progress.clocks
        collect_s = rollout.info.seconds["collect_s"]
        self._row = metrics | self._meter.measure(progress.env_steps, progress.decisions, progress.updates, collect_s)

    def _advance(self, rollout: Rollout) -> None:
        """Move the counters to the boundary after the update on `rollout`; nothing in it can fail."""
        progress, valid = self.progress, rollout.data["valid"]
        progress.updates += 1
        progress.decisions += int(valid.sum())  # sync: the update's metrics were just fetched
        progress.env_steps += int((rollout.data["executed"] * valid).sum())  # sync: likewise
        progress.next_rollout = rollout.index + 1
        progress.journal = rollout.info.journal
        progress.faults.update(fault.kind for fault in rollout.info.faults)

    def _tell_clipped(self, rollout: Rollout) -> None:
        """Say once that the policy no longer sees what it observes: its normaliser cuts too much of it."""
        shares = None if self._has_told_clipped else clipped_inputs(self.parts.policy, rollout.obs)
        if shares is None or (share := shares.mean().item()) < NOTICED_CLIPPED_SHARE:  # sync: one number a rollout
            return
        self._has_told_clipped = True
        worst = self.parts.env.spec.name_number(int(shares.argmax()))
        self.reporter.notice(
            f"{share:.0%} of the numbers observed in a rollout lie beyond {Normalizer.LIMIT:g} times the "
            f"demonstrations' range and are cut there, most often {worst}: the policy was made for other observations"
        )

    def _tell_of_rewards(self, warning: str | None) -> None:
        """Say once that a success pays less than going on, unless the configuration sees to that."""
        if warning is not None and not self._has_told_of_rewards:
            self._has_told_of_rewards = True
            self.reporter.notice(warning)

    def _end_of_fair_starts(self, rollout: Rollout) -> int:
        """Return the decision from which on an episode may still have been open at the rollout's end."""
        horizon = math.ceil(self.parts.env.spec.horizon / self.parts.policy.n_action_steps)
        return (rollout.index + 1) * self.config.num_steps - horizon + 1

    def _tell(self, faults: Sequence[Fault]) -> None:
        for fault in faults:
            self.reporter.notice(fault.message)

    def _check_update(self) -> None:
        """Let a failed collector, or a stop requested too long ago, end an update before the next minibatch."""
        self.parts.collector.check()
        if time.perf_counter() > self._stop_deadline:
            raise UpdateAbandoned("a stop was requested")
        self._latency.wait(self.progress.updates)

    def _finish_update(self) -> None:
        """Evaluate, log and save, each when due."""
        updates, interval = self.progress.updates, self.config.trainer.save_interval
        before = (self.progress.best_success, self.progress.best_update)
        is_best = self._evaluate_if_due()
        if not updates:
            return
        self._log()
        is_due = is_best or (updates % interval == 0 and not self.is_stopping)
        if is_due and not self._save():
            self.progress.best_success, self.progress.best_update = before  # what is not saved cannot be the best

    def _log(self) -> None:
        problems = self._logger.write(self._row)
        self._logged = self.progress.updates
        for problem in (*problems, self.parts.channel.tracer.flush()):
            if problem is not None:
                self.reporter.notice(problem)
        self.reporter.update(self._row)

    def _evaluate_if_due(self) -> bool:
        """Evaluate while the collector goes on, unmeasured; tell whether this update is the best so far.

        An evaluation that a stop prevents or cuts is owed, and made up for by a resumed run.
        """
        interval, updates = self.config.trainer.eval_interval, self.progress.updates
        self._is_evaluation_owed = bool(interval) and (
            updates % interval == 0 or self.progress.is_at_end(self.config.trainer)
        )
        if not self._is_evaluation_owed or self.is_stopping:
            return False
        try:
            with self._meter.paused():
                result = self._evaluate()
        except (BufferClosed, EnvInterrupted):
            return False  # a stop was requested
        self._is_evaluation_owed = False
        self._row |= result.as_metrics()
        self.reporter.evaluation(updates, result)
        self.progress.faults.update(fault.kind for fault in result.faults)
        self._tell(result.faults)
        is_best = self.progress.is_best(result.score)
        if is_best:
            self.progress.best_success, self.progress.best_update = result.score, updates
        return is_best

    def _evaluate(self) -> EvalResult:
        assert self.parts.eval_env is not None  # evaluations are due
        trainer = self.config.trainer
        return evaluate(
            self.parts.policy, self.parts.eval_env, trainer.eval_episodes, trainer.seed, self._check_evaluation
        )

    def _check_evaluation(self, _num_finished: int) -> None:
        """Let a failed collector or a requested stop end an evaluation between two decisions."""
        self.parts.collector.check()
        if self.is_stopping:
            raise BufferClosed("a stop was requested")

    def _save(self) -> bool:
        """Save the boundary after the newest update; tell whether that worked. A full disk is reported, no more."""
        parts, progress = self.parts, self.progress
        source = PolicyToSave(parts.policy, self.config.policy, parts.env.simulator_spec)
        groups = name_snapshots(parts.channel.publisher.snapshots()) | {"optimizer": parts.ppo.state_tensors()}
        if progress.journal is not None:
            groups["journal"] = progress.journal.to_tensors()
        books, num_skipped = parts.channel.buffer.settled_books(), parts.ppo.num_nonfinite_steps
        state = progress.to_state(books, num_skipped, self._is_evaluation_owed, self._row)
        try:
            self._newest = save_checkpoint(self.run_dir, source, state, groups)
            if progress.best_update == progress.updates:
                point_at(self.run_dir, "best", self._newest)
        except OSError as error:
            reason = f"{error.strerror or error}; newest: {self._newest or 'none'}; trying again at the next save"
            self.reporter.notice(f"the checkpoint of update {progress.updates} could not be written: {reason}")
            return False
        self._prune()
        return True

    def _prune(self) -> None:
        try:
            prune_checkpoints(self.run_dir, self.config.trainer.keep_last)
        except OSError as error:
            self.reporter.notice(f"old checkpoints could not be removed: {error.strerror or error}")
