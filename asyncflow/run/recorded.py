"""RecordedRun: a trainer with a run folder. After every update it evaluates, logs and saves, each when due.

It is a callback of its trainer, which knows nothing of folders. An evaluation that a stop prevents or cuts is noted in
the checkpoint as owed; the resumed run makes up for it first and writes that row again.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from asyncflow.config.plugins import trusting_words
from asyncflow.config.sections import Config
from asyncflow.envs.base import EnvInterrupted, VecEnv
from asyncflow.errors import AsyncflowError, TrainingError
from asyncflow.metrics.glossary import MetricLogger
from asyncflow.rollout.ring import BufferClosed
from asyncflow.run.checkpoint import Checkpoint, point_at, prune_checkpoints, save_checkpoint
from asyncflow.run.evaluate import EvalResult, evaluate
from asyncflow.run.progress import Limits
from asyncflow.run.reporter import Row, RunReporter
from asyncflow.run.trainer import Trainer
from asyncflow.terminal import command


class RecordedRun:
    """A trainer, and what evaluates, logs and saves it. Main thread only, except `request_stop`."""

    def __init__(  # noqa: PLR0913  a run's parts
        self,
        trainer: Trainer,
        eval_env: VecEnv | None,
        config: Config,
        run_dir: Path,
        *,
        reporter: RunReporter,
        resumed: Checkpoint | None = None,
    ) -> None:
        """Open the run's logs.

        Args:
            trainer: What trains; it is closed with the run.
            eval_env: The evaluation's own environments; None without evaluations.
            config: The run.
            run_dir: Its folder.
            reporter: Told what happens.
            resumed: What the trainer went on from.
        """
        self.trainer, self.progress, self.eval_env = trainer, trainer.progress, eval_env
        self.config, self.run_dir, self.reporter = config, run_dir, reporter
        self._limits = Limits(config.trainer.total_updates, config.trainer.total_env_steps)
        self._is_evaluation_owed = resumed.state.is_evaluation_owed if resumed else True
        self._newest = resumed.path if resumed else None
        kept_rows = self.progress.updates - self._is_evaluation_owed if resumed else 0
        self._logger = MetricLogger(run_dir, config.logging.logger, kept_rows)
        self._logged = self.progress.updates  # the newest update whose row was written, or is owed with its evaluation
        trainer.notice = reporter.notice
        trainer.callbacks = [lambda trainer, row: self._finish_update()]
        if config.logging.trace:
            name = f"trace_{self.progress.updates:06d}.json" if resumed else "trace.json"
            trainer.collecting.tracer.open(run_dir / name)

    def run(self) -> Row:
        """Train to the end or until stopped, save, and return the last update's metrics.

        Raises:
            CollectorError: Collecting failed; what was trained is saved.
            TrainingError: Training failed; the message names the last good checkpoint.
            AsyncflowError: The end could not be saved.
        """
        try:
            self.trainer.begin()
            if self._is_evaluation_owed:
                self._finish_update()
            self.trainer.train_until(self._limits)
        except TrainingError as error:
            raise TrainingError(f"{error}; last good checkpoint: {self._newest or 'none'}") from error
        except (Exception, SystemExit):  # a model or a simulator may call sys.exit
            if self._is_whole and self._save():
                env = self.config.env
                words = [] if env.python is None else [f"env.python={env.python}"]
                words += trusting_words(self.config.policy.vla.model_class, env.tasks or [env.task])
                resume = command("train", "--resume", self.run_dir, *words)
                self.reporter.notice(f"saved {self._newest}; go on with: {resume}")
            raise
        if not self._save():
            raise AsyncflowError(f"the run's end could not be saved; newest checkpoint: {self._newest or 'none'}")
        assert self._newest is not None  # it was saved
        self.reporter.end(self.run_dir, self._newest, self.trainer.row, self.is_stopping)
        return self.trainer.row

    @property
    def is_stopping(self) -> bool:
        """Whether a stop was requested."""
        return self.trainer.is_stopping

    def request_stop(self) -> None:
        """End the run after the update under way, if that is soon. Any thread or a signal handler; never waits."""
        self.trainer.interrupt()
        if self.eval_env is not None:
            self.eval_env.interrupt()

    def close(self) -> None:
        """Join the collector thread, stop all simulators, close the logs; each of them whatever the others raise."""
        with ExitStack() as stack:
            stack.callback(self._close_logs)
            if self.eval_env is not None:
                stack.callback(self.eval_env.close)
            stack.callback(self.trainer.close)

    def _close_logs(self) -> None:
        for problem in (*self._logger.close(), self.trainer.collecting.tracer.close()):
            if problem is not None:
                self.reporter.notice(problem)

    @property
    def _is_whole(self) -> bool:
        """Return whether a run can go on from here: the newest update is published, its row written or still due."""
        return self._is_evaluation_owed or self._logged == self.progress.updates

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
        problems = self._logger.write(self.trainer.row)
        self._logged = self.progress.updates
        for problem in (*problems, self.trainer.collecting.tracer.flush()):
            if problem is not None:
                self.reporter.notice(problem)
        self.reporter.update(self.trainer.row)

    def _evaluate_if_due(self) -> bool:
        """Evaluate while the collector goes on, unmeasured; tell whether this update is the best so far.

        An evaluation that a stop prevents or cuts is owed, and made up for by a resumed run.
        """
        interval, updates = self.config.trainer.eval_interval, self.progress.updates
        self._is_evaluation_owed = bool(interval) and (updates % interval == 0 or self.progress.is_at_end(self._limits))
        if not self._is_evaluation_owed or self.is_stopping:
            return False
        try:
            with self.trainer.unmeasured():
                result = self._evaluate()
        except (BufferClosed, EnvInterrupted):
            return False  # a stop was requested
        self._is_evaluation_owed = False
        self.trainer.row |= result.as_metrics()
        self.reporter.evaluation(updates, result)
        self.progress.faults.update(fault.kind for fault in result.faults)
        for fault in result.faults:
            self.reporter.notice(fault.message)
        is_best = self.progress.is_best(result.score)
        if is_best:
            self.progress.best_success, self.progress.best_update = result.score, updates
        return is_best

    def _evaluate(self) -> EvalResult:
        assert self.eval_env is not None  # evaluations are due
        trainer = self.config.trainer
        policy, count, seed = self.trainer.policy, trainer.eval_episodes, trainer.seed
        with self.trainer.ppo.averaged_weights():
            return evaluate(policy, self.eval_env, count, seed, self._check_evaluation)

    def _check_evaluation(self, _num_finished: int) -> None:
        """Let a failed collector or a requested stop end an evaluation between two decisions."""
        self.trainer.collecting.check()
        if self.is_stopping:
            raise BufferClosed("a stop was requested")

    def _save(self) -> bool:
        """Save the boundary after the newest update; tell whether that worked. A full disk is reported, no more."""
        trainer, progress = self.trainer, self.progress
        try:
            state, groups = trainer.state(self._is_evaluation_owed), trainer.groups()
            with trainer.ppo.averaged_weights():
                self._newest = save_checkpoint(self.run_dir, trainer.policy_to_save(), state, groups)
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
