"""Numbers that follow the updates of a run: step sizes and the weights of losses."""

from __future__ import annotations

import math

from asyncflow.config.sections import Schedule
from asyncflow.errors import ConfigError


def remaining(schedule: Schedule, update: int, total_updates: int | None, key: str) -> float:
    """Return how much of a falling number is left in an update: 1 in the first, 0 after `total_updates`.

    Args:
        schedule: linear, or cosine: half a period of a cosine; constant: always 1.
        update: Number of the update, from 0.
        total_updates: Over how many it falls.
        key: Whose schedule it is, for a message.

    Raises:
        ConfigError: It falls, and nothing says over how many updates.
    """
    if schedule == "constant":
        return 1.0
    if total_updates is None:
        raise ConfigError(f"{key} = {schedule} needs the number of updates over which it falls (total_updates)")
    left = max(0.0, 1 - update / total_updates)
    return left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def learning_rate_factor(schedule: Schedule, update: int, total_updates: int | None, num_warmup: int) -> float:
    """Return the factor of the step sizes in an update.

    It rises linearly over `num_warmup` updates, the last of which has the whole step size, and falls from there on.
    """
    if update < num_warmup:
        return (update + 1) / num_warmup
    total = None if total_updates is None else max(1, total_updates - num_warmup)
    return remaining(schedule, update - num_warmup, total, "algorithm.lr_schedule")
