"""Metrics: the one glossary of names, and the logger through which a run's numbers leave it.

A metric's name and meaning stand here only. A name that is not in the glossary is refused, so that console,
TensorBoard, JSON lines and `docs/metrics.md` cannot drift apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from asyncflow.metrics.files import EventFile, JsonLines, cut_rows

Unit = Literal["fraction", "s", "1/s", "bytes", "count", "updates", "env steps", "nats", "return", "1"]


class Metric(NamedTuple):
    """One glossary entry: its unit, its meaning in a sentence, and the updates in which it has a value."""

    unit: Unit
    meaning: str
    when: str = "always"


_EPISODE = "num_episodes is not 0"
_EVALUATION = "an evaluation followed the update"

GLOSSARY: dict[str, Metric] = {
    "updates": Metric("count", "Finished PPO updates; the version of the weights."),
    "env_steps": Metric("env steps", "Executed simulator steps of all trained rollouts; the x axis of every curve."),
    "decisions": Metric("count", "Policy calls, one per environment, of all trained rollouts."),
    "wall_s": Metric(
        "s", "Time since the run was built, evaluations left out, but not the time of rollouts collected meanwhile."
    ),
    "rollout/num_episodes": Metric(
        "count",
        "Episodes that began a horizon or more before the rollout's end, each counted once. All of them are over, so "
        "that those that end soon do not count more.",
    ),
    "rollout/success_rate": Metric("fraction", "Those of them that solved the task.", _EPISODE),
    "rollout/episode_return": Metric("return", "Mean undiscounted return of those episodes.", _EPISODE),
    "rollout/episode_length": Metric("env steps", "Mean length of those episodes.", _EPISODE),
    "train/policy_loss": Metric("1", "Clipped policy objective, negated; mean over minibatches."),
    "train/value_loss": Metric("1", "Half the mean squared error of the value function; mean over minibatches."),
    "train/bc_loss": Metric(
        "1", "Imitation loss of algorithm.auxiliary, without its weight; 0 without a success yet.", "with bc"
    ),
    "train/reference_kl_loss": Metric(
        "nats", "KL divergence of a decision from the policy to the first one, without its weight.", "with reference_kl"
    ),
    "train/entropy": Metric("nats", "Entropy of the decisions' distribution."),
    "train/approx_kl": Metric(
        "nats", "KL from the policy that acted to the trained one, in the units of log_prob; mean over minibatches."
    ),
    "train/prox_kl": Metric(
        "nats", "KL from the policy before the update to the trained one, likewise; target_kl bounds it."
    ),
    "train/behavior_kl": Metric(
        "nats", "KL from the policy that acted to the one before the update, likewise: how stale the data is."
    ),
    "train/clip_fraction": Metric("fraction", "Decisions whose ratio left the clip range."),
    "train/dual_clip_fraction": Metric("fraction", "Decisions bounded by the dual clip."),
    "train/is_weight_mean": Metric(
        "1", "Mean behavior weight, exp(proximal - behavior), after truncation; 1 at lag 0."
    ),
    "train/is_weight_max": Metric("1", "Largest behavior weight, after truncation."),
    "train/is_weight_clipped_fraction": Metric("fraction", "Decisions whose behavior weight was truncated or masked."),
    "train/explained_variance": Metric(
        "1",
        "1 - mean((returns - values)^2) / Var(returns) before the update; 1 is a perfect critic.",
        "the returns are not all equal",
    ),
    "train/grad_norm": Metric("1", "Gradient norm of the actor before clipping, mean over minibatches."),
    "train/critic_grad_norm": Metric("1", "Gradient norm of the critic before clipping, mean over minibatches."),
    "train/learning_rate": Metric(
        "1",
        "Adam step size of the actor in the update, by lr_schedule; in the critic's warm-up the actor takes no step.",
    ),
    "train/critic_learning_rate": Metric("1", "Adam step size of the critic in the update, likewise."),
    "train/num_epochs": Metric("count", "Passes over the rollout; fewer than update_epochs if target_kl ended it."),
    "train/nonfinite_decisions": Metric(
        "count",
        "Decisions left out of the update for an advantage or return that was not finite or too large to be squared; "
        "clocks and books count them.",
    ),
    "train/nonfinite_skipped": Metric(
        "count",
        "Minibatches skipped because loss, entropy or a gradient was not finite, or all their decisions were left out "
        "for that; no other mean includes them.",
    ),
    "time/env_step_s": Metric("s", "The rollout's time in the simulators."),
    "time/inference_s": Metric("s", "The rollout's time in the policy."),
    "time/collect_s": Metric("s", "From the rollout's first decision to its last row, waiting for a slot left out."),
    "time/update_s": Metric("s", "The update's time, all epochs."),
    "time/wait_data_s": Metric(
        "s", "Time that the trainer waited for a full rollout; collecting it, in a standard run."
    ),
    "time/wait_slot_s": Metric(
        "s", "Time that the collector waited for a free slot or its weights, during an evaluation, too."
    ),
    "time/publish_s": Metric("s", "Time to publish the weights, a wait for the old snapshot's readers included."),
    "throughput/env_steps_per_s": Metric("1/s", "Fresh env steps trained on, over their part of wall_s."),
    "throughput/decisions_per_s": Metric("1/s", "Fresh decisions trained on, over their part of wall_s."),
    "throughput/updates_per_s": Metric("1/s", "Updates over their part of wall_s."),
    "staleness/policy_lag_mean": Metric("updates", "Version trained minus version that acted, mean over decisions."),
    "staleness/policy_lag_max": Metric("updates", "The same, largest."),
    "async/collector_busy": Metric("fraction", "Share of wall_s since the last update in which the collector worked."),
    "async/trainer_busy": Metric("fraction", "Share of wall_s since the last update in which the trainer worked."),
    "async/overlap": Metric("fraction", "Share of wall_s since the last update in which both worked."),
    "buffer/collected": Metric("count", "Decisions written so far: trained + in_flight + dropped + invalid."),
    "buffer/trained": Metric("count", "Decisions trained on so far, each once."),
    "buffer/in_flight": Metric("count", "Decisions written and not yet trained on."),
    "buffer/dropped": Metric("count", "Decisions recycled before they were trained on (on_full: overwrite)."),
    "buffer/invalid": Metric("count", "Decisions that were collected and must not be trained on."),
    "health/worker_restarts": Metric("count", "Workers replaced so far."),
    "health/env_timeouts": Metric("count", "Of them, those replaced for silence past env.step_timeout_s."),
    "health/nonfinite_episodes": Metric("count", "Episodes given up so far because a number was not finite."),
    "health/rss_bytes": Metric("bytes", "Largest resident memory of the main process so far."),
    "health/gpu_bytes": Metric("bytes", "Largest CUDA memory allocated by torch so far; 0 on a CPU."),
    "eval/success_rate": Metric("fraction", "Evaluation episodes that solved the task.", _EVALUATION),
    "eval/success_low": Metric("fraction", "Lower end of its 95 % interval.", _EVALUATION),
    "eval/success_high": Metric("fraction", "Upper end of its 95 % interval.", _EVALUATION),
    "eval/episode_length": Metric("env steps", "Mean length of the evaluation's episodes.", _EVALUATION),
    "eval/episode_return": Metric("return", "Mean undiscounted return of those episodes.", _EVALUATION),
}

# With several tasks also of each by itself, as in `rollout/success_rate/ToyGreen`.
PER_TASK = {name for name in GLOSSARY if name.startswith(("rollout/", "eval/"))}

_TIMING_GROUPS = ("time/", "throughput/", "async/", "health/")
_TIMING_NAMES = {"wall_s", "buffer/collected", "buffer/in_flight"}


def is_timing(name: str) -> bool:
    """Tell whether a metric depends on how fast the machine is, so that two equal runs may differ in it."""
    return name.startswith(_TIMING_GROUPS) or name in _TIMING_NAMES


def glossary_markdown() -> str:
    """Return the text of `docs/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        "One name everywhere: on the terminal, in TensorBoard, in `metrics.jsonl` (one row per update; what is not a",
        "finite number is `null`) and here. TensorBoard's step is `env_steps`. A fraction is in [0, 1]; the terminal",
        "shows it in per cent. With several tasks (`env.tasks`), every `rollout/` and `eval/` number is there of all",
        "of them together and, with the task's name behind it, of each: `rollout/success_rate/ToyGreen`. This page is",
        "written by `make docs` from `asyncflow/metrics/glossary.py`.",
        "",
        "| name | unit | meaning | has a value when |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{name}` | {metric.unit} | {metric.meaning} | {metric.when} |" for name, metric in GLOSSARY.items()]
    return "\n".join(lines) + "\n"


class MetricLogger:
    """Writes one row per update to `metrics.jsonl`, and to TensorBoard. Main thread only.

    What a full disk refuses is kept and written, in order, as soon as there is room again.
    """

    def __init__(self, run_dir: str | Path, logger: Literal["tensorboard", "none"], updates: int = 0) -> None:
        """Open the files; rows of later updates than `updates`, of a run that was cut, are removed.

        Args:
            run_dir: The run folder.
            logger: Whether TensorBoard gets the rows too.
            updates: Update that the run goes on from.

        Raises:
            ConfigError: A file cannot be written.
        """
        folder = Path(run_dir)
        last = cut_rows(folder, updates)
        purge_step = 0 if last is None else last + 1  # what is at that step is forgotten too
        self._files: list[JsonLines | EventFile] = [JsonLines(folder)]
        if logger == "tensorboard":
            self._files.append(EventFile(folder, purge_step))

    def write(self, row: Mapping[str, float]) -> list[str]:
        """Write one row; it is on disk, for a crash of this process at least, when this returns no problem.

        Returns:
            A line about each file that could not be written; the row waits for the next call.

        Raises:
            ValueError: A name is not in the glossary, or `env_steps` is missing.
        """
        _check_names(row)
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        return [problem for file in self._files for problem in file.write(finite)]

    def close(self) -> list[str]:
        """Write what waits and close; return a line about each file that lost rows. May be called twice."""
        return [problem for file in self._files for problem in file.close()]


def pooled_name(name: str) -> str:
    """Return the name of what a metric of one task is for all tasks together; any other name as it is."""
    pooled = "/".join(name.split("/", 2)[:2])
    return pooled if pooled in PER_TASK else name


def is_known(name: str) -> bool:
    """Tell whether a name is in the glossary, of one task or of all, or a user's own auxiliary `train/<name>_loss`."""
    return pooled_name(name) in GLOSSARY or re.fullmatch(r"train/\w+_loss", name) is not None


def _check_names(row: Mapping[str, float]) -> None:
    unknown = sorted(name for name in row if not is_known(name))
    if unknown:
        raise ValueError(
            f"metrics {', '.join(unknown)} are not in asyncflow.metrics.glossary.GLOSSARY; describe them there"
        )
    if "env_steps" not in row:
        raise ValueError("a row of metrics needs env_steps, the clock of every curve")
