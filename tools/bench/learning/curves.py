"""Learning curves as `tools.bench.learning` leaves them: tables of checkpoints, pooled rates and their difference.

Owns the reading of the tables, not what is concluded from them.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from asyncflow.run.evaluate import wilson_interval


@dataclass(frozen=True)
class Point:
    """One evaluated checkpoint."""

    updates: int
    env_steps: int
    wall_s: float
    num_episodes: int
    num_successes: int

    @property
    def success_rate(self) -> float:
        """Fraction of episodes that solved the task."""
        return self.num_successes / self.num_episodes


Curve = list[Point]
Curves = dict[str, dict[int, Curve]]  # condition -> seed -> points


def read_curves(folder: Path) -> Curves:
    """Return every curve of the folder, seeds rising."""
    curves: Curves = defaultdict(dict)
    for path in sorted(folder.glob("learning_*_seed*.csv")):
        condition, seed = path.stem.removeprefix("learning_").rsplit("_seed", 1)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        curves[condition][int(seed)] = [read_point(row) for row in rows]
    return {condition: dict(sorted(seeds.items())) for condition, seeds in curves.items()}


def read_point(row: dict[str, str]) -> Point:
    """Return a row of a table."""
    counts = {name: int(row[name]) for name in ("updates", "env_steps", "num_episodes", "num_successes")}
    return Point(wall_s=float(row["wall_s"]), **counts)


def pool_final(seeds: dict[int, Curve]) -> tuple[int, int]:
    """Return successes and episodes of the last checkpoints of all seeds."""
    finals = [curve[-1] for curve in seeds.values()]
    return sum(point.num_successes for point in finals), sum(point.num_episodes for point in finals)


def difference_interval(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, float, float]:
    """Return the difference of two success rates and its 95 % interval, from (successes, episodes) of each.

    Newcombe, "Interval estimation for the difference between independent proportions", Statistics in Medicine 17,
    1998, method 10.
    """
    rates = [successes / episodes for successes, episodes in (first, second)]
    (low_1, high_1), (low_2, high_2) = wilson_interval(*first), wilson_interval(*second)
    difference = rates[0] - rates[1]
    low = difference - math.hypot(rates[0] - low_1, high_2 - rates[1])
    high = difference + math.hypot(high_1 - rates[0], rates[1] - low_2)
    return difference, low, high
