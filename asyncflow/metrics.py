"""Metrics: the one glossary of names, and the files that a run's numbers go to.

Owns what a metric is called, what it means, and `metrics.jsonl` and the TensorBoard events. It must not know how a
number is measured. A name that is not in the glossary is refused, so that console, TensorBoard, JSON lines and
`docs/metrics.md` cannot drift apart.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Unit = Literal["fraction", "s", "1/s", "bytes", "count", "updates", "env steps", "nats", "return", "1"]


class Metric(NamedTuple):
    """One glossary entry: its unit, its meaning in a sentence, and the updates in which it has a value."""

    unit: Unit
    meaning: str
    when: str = "always"


_EPISODE = "an episode ended in the rollout"
_EVALUATION = "an evaluation followed the update"

GLOSSARY: dict[str, Metric] = {
    "updates": Metric("count", "Finished PPO updates; the version of the weights."),
    "env_steps": Metric("env steps", "Executed simulator steps of all trained rollouts; the x axis of every curve."),
    "decisions": Metric("count", "Policy calls, one per environment, of all trained rollouts."),
    "wall_s": Metric("s", "Time since the run was built, evaluations left out."),
    "rollout/success_rate": Metric("fraction", "Episodes ended in the rollout that solved the task.", _EPISODE),
    "rollout/episode_return": Metric("return", "Mean undiscounted return of those episodes.", _EPISODE),
    "rollout/episode_length": Metric("env steps", "Mean length of those episodes.", _EPISODE),
    "train/policy_loss": Metric("1", "Clipped policy objective, negated; mean over minibatches."),
    "train/value_loss": Metric("1", "Half the mean squared error of the value function; mean over minibatches."),
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
        "1", "1 - mean((returns - values)^2) / Var(returns) before the update; 1 is a perfect critic."
    ),
    "train/grad_norm": Metric("1", "Gradient norm of the actor before clipping, mean over minibatches."),
    "train/critic_grad_norm": Metric("1", "Gradient norm of the critic before clipping, mean over minibatches."),
    "train/num_epochs": Metric("count", "Passes over the rollout; fewer than update_epochs if target_kl ended it."),
    "time/env_step_s": Metric("s", "The rollout's time in the simulators."),
    "time/inference_s": Metric("s", "The rollout's time in the policy."),
    "time/collect_s": Metric("s", "From the rollout's first decision to its last row, waiting for a slot left out."),
    "time/update_s": Metric("s", "The update's time, all epochs."),
    "time/wait_data_s": Metric(
        "s", "Time that the trainer waited for a full rollout; collecting it, in a standard run."
    ),
    "time/wait_slot_s": Metric("s", "Time that the collector waited for a free slot or its weights."),
    "time/publish_s": Metric("s", "Time to publish the weights, a wait for the old snapshot's readers included."),
    "throughput/env_steps_per_s": Metric("1/s", "Fresh env steps trained on, over the time since the last update."),
    "throughput/decisions_per_s": Metric("1/s", "Fresh decisions trained on, over the time since the last update."),
    "throughput/updates_per_s": Metric("1/s", "Updates over the time since the last update."),
    "staleness/policy_lag_mean": Metric("updates", "Version trained minus version that acted, mean over decisions."),
    "staleness/policy_lag_max": Metric("updates", "The same, largest."),
    "async/collector_busy": Metric("fraction", "Share of the time since the last update in which it collected."),
    "async/trainer_busy": Metric("fraction", "Share of the time since the last update in which it trained."),
    "async/overlap": Metric("fraction", "Share of the time since the last update in which both were busy."),
    "buffer/collected": Metric("count", "Decisions written so far: trained + in_flight + dropped + invalid."),
    "buffer/trained": Metric("count", "Decisions trained on so far, each once."),
    "buffer/in_flight": Metric("count", "Decisions written and not yet trained on."),
    "buffer/dropped": Metric("count", "Decisions recycled before they were trained on (on_full: overwrite)."),
    "buffer/invalid": Metric("count", "Decisions that were collected and must not be trained on."),
    "health/rss_bytes": Metric("bytes", "Largest resident memory of the main process so far."),
    "health/gpu_bytes": Metric("bytes", "Largest CUDA memory allocated by torch so far; 0 on a CPU."),
    "eval/success_rate": Metric("fraction", "Evaluation episodes that solved the task.", _EVALUATION),
    "eval/success_low": Metric("fraction", "Lower end of its 95 % interval.", _EVALUATION),
    "eval/success_high": Metric("fraction", "Upper end of its 95 % interval.", _EVALUATION),
    "eval/episode_length": Metric("env steps", "Mean length of the evaluation's episodes.", _EVALUATION),
}

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
        "shows it in per cent. This page is written by `make docs` from `asyncflow/metrics.py`.",
        "",
        "| name | unit | meaning | has a value when |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{name}` | {metric.unit} | {metric.meaning} | {metric.when} |" for name, metric in GLOSSARY.items()]
    return "\n".join(lines) + "\n"


class MetricLogger:
    """Writes one row per update to `metrics.jsonl`, and to TensorBoard. Main thread only."""

    def __init__(self, run_dir: str | Path, logger: Literal["tensorboard", "none"]) -> None:
        """Open the files; rows are appended to what `run_dir` already holds."""
        self._file = (Path(run_dir) / "metrics.jsonl").open("a", encoding="utf-8")
        self._writer = _open_tensorboard(run_dir) if logger == "tensorboard" else None

    def write(self, row: Mapping[str, float]) -> None:
        """Write one row; it is on disk, for a crash of this process at least, when this returns.

        Raises:
            ValueError: A name is not in the glossary, or `env_steps` is missing.
        """
        _check_names(row)
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()
        if self._writer is not None:
            self._write_scalars(self._writer, finite)

    @staticmethod
    def _write_scalars(writer: SummaryWriter, row: Mapping[str, float | None]) -> None:
        step = int(row["env_steps"] or 0)
        for name, value in row.items():
            if value is not None:
                writer.add_scalar(name, value, step)
        writer.flush()

    def close(self) -> None:
        """Flush and close; may be called twice."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _check_names(row: Mapping[str, float]) -> None:
    unknown = sorted(set(row) - set(GLOSSARY))
    if unknown:
        raise ValueError(f"metrics {', '.join(unknown)} are not in asyncflow.metrics.GLOSSARY; describe them there")
    if "env_steps" not in row:
        raise ValueError("a row of metrics needs env_steps, the clock of every curve")


def _open_tensorboard(run_dir: str | Path) -> SummaryWriter:
    with warnings.catch_warnings():  # of its dependencies; TensorBoard is imported only where it is used
        warnings.simplefilter("ignore")
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

    return SummaryWriter(str(run_dir))
