"""Launching: a new run, or one that goes on from its newest checkpoint.

This file makes a run's folder, parts and trainer in order, and closes them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from asyncflow.config.lerobot_folder import with_export
from asyncflow.config.sections import Config
from asyncflow.devices import resolve_device
from asyncflow.envs.base import VecEnv
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.policies import find_policy_code
from asyncflow.run.build import build_eval_env, build_trainer, check_start
from asyncflow.run.checkpoint import (
    Checkpoint,
    checkpoint_path,
    clean_checkpoints,
    find_newest,
    list_checkpoints,
    point_at,
)
from asyncflow.run.folder import (
    changed_versions,
    create_run_folder,
    lock_run_folder,
    note_simulators,
    tell_removed,
    write_config,
)
from asyncflow.run.parts import tell_environment
from asyncflow.run.progress import Limits, Progress
from asyncflow.run.recorded import RecordedRun
from asyncflow.run.reporter import RunReporter
from asyncflow.run.trainer import Trainer


def train(
    config: Config, reporter: RunReporter, on_built: Callable[[RecordedRun], None] = lambda run: None
) -> RecordedRun:
    """Train a new run from beginning to end and return it, closed.

    Args:
        config: The run.
        reporter: Told what happens.
        on_built: Given the run before it begins, so that a signal handler can stop it.

    Raises:
        ConfigError: The run cannot be built as asked.
        CollectorError: Collecting failed.
        TrainingError: Training failed.
    """
    folder = check_start(config)
    if (told := tell_environment(config)) is not None:
        reporter.notice(told)
    with ExitStack() as stack:
        trainer, eval_env = _build(stack, config)
        folder, descriptor = create_run_folder(folder, config)
        stack.callback(os.close, descriptor)
        note_simulators(folder, trainer.env.versions)
        _announce(trainer, config, folder, reporter)
        return _run(stack, RecordedRun(trainer, eval_env, config, folder, reporter=reporter), on_built)


def resume(
    folder: Path,
    config: Config,
    reporter: RunReporter,
    on_built: Callable[[RecordedRun], None] = lambda run: None,
) -> RecordedRun:
    """Go on with a run from its newest checkpoint that is whole, to the end; return it, closed.

    Args:
        folder: The run folder.
        config: The run, as `run_folder.resume_config` returns it.
        reporter: Told what happens.
        on_built: Given the run before it goes on, so that a signal handler can stop it.

    Raises:
        CheckpointError: Every checkpoint is damaged.
        ConfigError: The run is finished, another process trains in the folder, or the folder names a model's class
            that the user did not.
        CollectorError: Collecting failed.
        TrainingError: Training failed.
    """
    with ExitStack() as stack:
        stack.callback(os.close, lock_run_folder(folder))
        try:
            checkpoint = _find_start(folder, reporter)
            _check_unfinished(config, checkpoint)
            find_policy_code(with_export(config.policy, checkpoint.path) if checkpoint else config.policy)
            removed = tell_removed(folder)
            write_config(folder, config)
        except OSError as error:
            raise CheckpointError(f"--resume {folder}: {error.filename}: {error.strerror}") from None
        if (told := tell_environment(config, checkpoint)) is not None:
            reporter.notice(told)
        for told in removed:
            reporter.notice(told)
        for change in changed_versions(folder):
            reporter.notice(f"since this run began, {change}: it may differ from an uncut one")
        trainer, eval_env = _build(stack, config, checkpoint)
        for change in note_simulators(folder, trainer.env.versions):
            reporter.notice(f"since this run began, {change}: it may differ from an uncut one")
        _announce(trainer, config, folder, reporter)
        if checkpoint is not None:
            _tell_risen_step_size(config, checkpoint, trainer, reporter)
        return _run(
            stack, RecordedRun(trainer, eval_env, config, folder, reporter=reporter, resumed=checkpoint), on_built
        )


def _build(stack: ExitStack, config: Config, checkpoint: Checkpoint | None = None) -> tuple[Trainer, VecEnv | None]:
    """Build what trains and where it is evaluated; the stack closes both, whatever happens afterwards."""
    trainer = build_trainer(config, checkpoint)
    stack.callback(trainer.close)
    eval_env = build_eval_env(config, trainer)
    if eval_env is not None:
        stack.callback(eval_env.close)
    return trainer, eval_env


def _announce(trainer: Trainer, config: Config, folder: Path, reporter: RunReporter) -> None:
    """Tell the size of the ring, then allocate it."""
    reporter.start(config, folder, trainer.collecting.plan.num_bytes, str(resolve_device(config.trainer.device)))
    trainer.collecting.set_up(trainer.progress)


def _find_start(folder: Path, reporter: RunReporter) -> Checkpoint | None:
    """Return where a run goes on; None at its beginning, if it was cut before its first checkpoint."""
    clean_checkpoints(folder)
    if not list_checkpoints(folder):
        reporter.notice(f"{folder} has no checkpoint yet: beginning at update 0")
        return None
    checkpoint, problems = find_newest(folder)
    for problem in problems:
        reporter.notice(problem)
    reporter.notice(f"going on from {checkpoint.path}")
    best = checkpoint_path(folder, checkpoint.state.best_update)
    if best.exists():  # the process may have been killed before the link was moved
        point_at(folder, "best", best)
    return checkpoint


def _tell_risen_step_size(config: Config, checkpoint: Checkpoint, trainer: Trainer, reporter: RunReporter) -> None:
    """Say that a falling schedule begins again higher: it falls over more updates than it did."""
    key, updates = "train/learning_rate", trainer.progress.updates
    before, now = checkpoint.state.row.get(key, math.inf), trainer.ppo.learning_rates(updates)[key]
    if now > before and updates >= config.algorithm.lr_warmup_updates:
        reporter.notice(
            f"algorithm.lr_schedule = {config.algorithm.lr_schedule} falls over trainer.total_updates = "
            f"{config.trainer.total_updates}, more than the run had: the step size rises from {before:.3g} in update "
            f"{updates} to {now:.3g} in the next"
        )


def _check_unfinished(config: Config, checkpoint: Checkpoint | None) -> None:
    if checkpoint is None:
        return
    clocks = Progress(updates=checkpoint.state.updates, env_steps=checkpoint.state.env_steps)
    if (
        clocks.is_at_end(Limits(config.trainer.total_updates, config.trainer.total_env_steps))
        and not checkpoint.state.is_evaluation_owed
    ):
        raise ConfigError(
            f"--resume {checkpoint.path.parent.parent}: the run is finished after {clocks.updates} updates and "
            f"{clocks.env_steps} env steps; raise trainer.total_updates or trainer.total_env_steps to go on"
        )


def _run(stack: ExitStack, run: RecordedRun, on_built: Callable[[RecordedRun], None]) -> RecordedRun:
    stack.callback(run.close)
    on_built(run)
    run.run()
    return run
