"""Episodes as training meets them, and statistics of them without a bias towards those that end soon.

The episodes that end within a rollout are no fair sample: successes end early, and failures, which last until the
horizon, are missing at first and then come all at once. An episode is therefore counted by its start: a rollout reports
the episodes that began a horizon or more before its end, each once. All of those are over, however they ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Episode(NamedTuple):
    """An episode that ended.

    Attributes:
        start: Number of its first decision, counted in each environment from the beginning of the run.
        episode_return: Undiscounted return.
        length: Env steps.
        is_success: Whether it solved the task.
        task: Place of its task in `EnvSpec.task_table`.
    """

    start: int
    episode_return: float
    length: int
    is_success: bool
    task: int = 0


def split_by_start(episodes: Iterable[Episode], end: int) -> tuple[list[Episode], list[Episode]]:
    """Return the episodes that began before decision `end`, and the others."""
    episodes = list(episodes)
    return [e for e in episodes if e.start < end], [e for e in episodes if e.start >= end]


def episode_metrics(
    episodes: list[Episode], has_success: bool = True, task_names: Sequence[str] = ()
) -> dict[str, float]:
    """Return the `rollout/` metrics; of no episode there is nothing but their number.

    Args:
        episodes: Those that count now.
        has_success: `EnvSpec.has_success`; without it there is no success rate.
        task_names: Of several tasks, each of which has metrics of its own, too.
    """
    metrics = _describe(episodes, has_success)
    for place, task in enumerate(task_names):
        of_task = _describe([episode for episode in episodes if episode.task == place], has_success)
        metrics |= {f"{name}/{task}": value for name, value in of_task.items()}
    return metrics


def _describe(episodes: list[Episode], has_success: bool) -> dict[str, float]:
    num = len(episodes)
    if not num:
        return {"rollout/num_episodes": 0.0}
    rate = {"rollout/success_rate": sum(e.is_success for e in episodes) / num} if has_success else {}
    return {
        "rollout/num_episodes": float(num),
        **rate,
        "rollout/episode_return": sum(e.episode_return for e in episodes) / num,
        "rollout/episode_length": sum(e.length for e in episodes) / num,
    }
