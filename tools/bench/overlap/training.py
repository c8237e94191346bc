"""The part of `tools.bench.overlap` that trains Lift with emulated stages, and what follows from its learning curves.

Owns the time to a success rate, its ratio between modes and the comparison of final success: arithmetic on the tables
of `tools.bench.learning`, which trains and evaluates.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.optimize

from asyncflow.profile.measure import ProfileOptions, emulate
from asyncflow.profile.model import Interval, mean
from tools.bench.common.records import Place, figures_of
from tools.bench.learning.curves import Curve, Curves, Point, difference_interval, pool_final, read_curves
from tools.bench.overlap.settings import CURVES, FINE_CURVES, Settings

THRESHOLD = 0.95
NUM_DRAWS = 2000
Finder = Callable[[Sequence[float], float, Sequence[int] | None], int | None]
"""(rates, threshold, episodes of each) -> index, or None if it is not reached."""


# Running.


def emulation(settings: Settings, place: Place) -> list[str]:
    """Return the arguments that emulate what the profile of Lift emulates."""
    update_s = figures_of(place, "balance")["Lift"]["update_latency_s"]
    options = ProfileOptions(inference_latency_s=settings.lift_inference_s, update_latency_s=update_s)
    stages = emulate(settings.load("Lift"), options)
    seconds = {"inference_s": round(stages.inference_s, 6), "update_s": round(stages.update_s, 6)}
    return ["--emulate", json.dumps(seconds)]


def learning_arguments(settings: Settings, place: Place, phase: str, is_fine: bool = False) -> list[str]:
    """Return what follows `tools.bench.learning`: both modes, every update a checkpoint.

    Args:
        settings: How much is trained and evaluated.
        place: Where runs and tables are.
        phase: Of `tools.bench.learning`.
        is_fine: Whether only later checkpoints count, each with more episodes.
    """
    what = ["--phase", phase, "--conditions", "standard", "vla", "--seeds", *map(str, settings.seeds)]
    folder, curve, final, start = CURVES, settings.curve_episodes, settings.final_episodes, 0
    if is_fine:
        folder, start = FINE_CURVES, settings.fine_from
        curve, final = settings.fine_curve_episodes, settings.fine_final_episodes
    folders = ["--out", str(place.out / CURVES), "--data", str(place.data / folder)]
    episodes = ["--curve-episodes", str(curve), "--final-episodes", str(final), "--from-update", str(start)]
    stages = emulation(settings, place)
    return [*folders, *what, "--save-interval", "1", *episodes, *stages, "--override", *settings.lift_overrides]


def run_learning(settings: Settings, place: Place, phase: str, is_fine: bool = False) -> dict[str, Any]:
    """Run a phase; what is finished of it is skipped.

    Raises:
        SystemExit: It failed.
    """
    arguments = learning_arguments(settings, place, phase, is_fine)
    command = [sys.executable, "-m", "tools.bench.learning", *arguments]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"{shlex.join(command)} failed")
    return {"command": shlex.join(["python", "-m", "tools.bench.learning", *arguments])}


def train_lift(settings: Settings, place: Place) -> dict[str, Any]:
    """Train both modes on every seed, in turns; it takes the wall times."""
    return run_learning(settings, place, "train")


def evaluate_lift(settings: Settings, place: Place) -> dict[str, Any]:
    """Evaluate every checkpoint, on the same start states in both modes; takes no time that counts."""
    return run_learning(settings, place, "eval")


def evaluate_ends(settings: Settings, place: Place) -> dict[str, Any]:
    """Evaluate the later checkpoints once more, with more episodes."""
    return run_learning(settings, place, "eval", is_fine=True)


def read_finest(place: Place) -> Curves:
    """Return the curves; a checkpoint that was evaluated twice with the evaluation of more episodes."""
    curves, fine = read_curves(place.data / CURVES), read_curves(place.data / FINE_CURVES)
    return {
        mode: {seed: _finest([*curve, *fine.get(mode, {}).get(seed, [])]) for seed, curve in seeds.items()}
        for mode, seeds in curves.items()
    }


def _finest(points: Sequence[Point]) -> Curve:
    by_updates = {point.updates: point for point in sorted(points, key=lambda point: point.num_episodes)}
    return [by_updates[updates] for updates in sorted(by_updates)]


# Arithmetic.


def pool(curves: Sequence[Curve]) -> Curve:
    """Return the curve of all seeds: episodes summed up and clocks averaged, at the updates that all have.

    The weights that a run starts from are left out: they took no time.
    """
    by_updates = [{point.updates: point for point in curve if point.updates} for curve in curves]
    common = sorted(set.intersection(*(set(points) for points in by_updates)))
    return [_pool_points([points[updates] for points in by_updates]) for updates in common]


def _pool_points(points: Sequence[Point]) -> Point:
    return Point(
        updates=points[0].updates,
        env_steps=round(mean([point.env_steps for point in points])),
        wall_s=mean([point.wall_s for point in points]),
        num_episodes=sum(point.num_episodes for point in points),
        num_successes=sum(point.num_successes for point in points),
    )


def find_lasting(rates: Sequence[float], threshold: float, episodes: Sequence[int] | None = None) -> int | None:
    """Return where the rate is at the threshold or above it from then on; None if it is not at the end."""
    below = [index for index, rate in enumerate(rates) if rate < threshold]
    start = below[-1] + 1 if below else 0
    return start if start < len(rates) else None


def find_first(rates: Sequence[float], threshold: float, episodes: Sequence[int] | None = None) -> int | None:
    """Return where the rate reaches the threshold for the first time, whatever follows."""
    return next((index for index, rate in enumerate(rates) if rate >= threshold), None)


def find_fitted(rates: Sequence[float], threshold: float, episodes: Sequence[int] | None = None) -> int | None:
    """Return where a curve that never falls, fitted to the rates by least squares, reaches the threshold.

    A rate of few episodes that is below the threshold by chance moves the fit a little; it moves what lasts a lot. Near
    the end of a curve the fit is too high: nothing follows that could pull a lucky rate down.

    Args:
        rates: Of the checkpoints.
        threshold: What is to be reached.
        episodes: Weights of the rates; all alike if not given.
    """
    return find_first(scipy.optimize.isotonic_regression(rates, weights=episodes).x.tolist(), threshold)


def time_to(curve: Curve, find: Finder = find_fitted) -> Point | None:
    """Return the checkpoint with which a pooled curve is at the threshold."""
    index = find([point.success_rate for point in curve], THRESHOLD, [point.num_episodes for point in curve])
    return None if index is None else curve[index]


def time_ratio(vla: Curve, standard: Curve, find: Finder = find_fitted) -> float | None:
    """Return the wall time of vla to the threshold over that of standard; None unless both are there."""
    ends = [time_to(curve, find) for curve in (vla, standard)]
    if ends[0] is None or ends[1] is None:
        return None
    return ends[0].wall_s / ends[1].wall_s


def ratio_interval(vla: Curve, standard: Curve, find: Finder = find_fitted) -> Interval | None:
    """Return the ratio of wall times to the threshold with an interval for the episodes that were drawn.

    Every checkpoint's true rate is drawn from Beta(k + 1/2, n - k + 1/2), its posterior under Jeffreys' prior, and the
    times are taken anew; the interval holds the middle 95 % of the draws. A mode that does not get there takes for
    ever; draws in which neither does are left out. How much another training seed would change is not in it.
    """
    value = time_ratio(vla, standard, find)
    if value is None:
        return None
    rng = np.random.default_rng(0)
    seconds = [_redraw_seconds(curve, rng, find) for curve in (vla, standard)]
    ratios = sorted(a / b for a, b in zip(*seconds, strict=True) if math.isfinite(a) or math.isfinite(b))
    low, high = (ratios[min(len(ratios) - 1, int(share * len(ratios)))] for share in (0.025, 0.975))
    return Interval(value, low, high)


def _redraw_seconds(curve: Curve, rng: np.random.Generator, find: Finder) -> list[float]:
    successes = np.array([point.num_successes for point in curve])
    episodes = np.array([point.num_episodes for point in curve])
    draws = rng.beta(successes + 0.5, episodes - successes + 0.5, (NUM_DRAWS, len(curve)))
    ends = [find(rates, THRESHOLD, episodes.tolist()) for rates in draws.tolist()]
    return [math.inf if end is None else curve[end].wall_s for end in ends]


def final_difference(vla: dict[int, Curve], standard: dict[int, Curve]) -> Interval:
    """Return final success of vla minus that of standard over all seeds, with Newcombe's interval.

    Both modes meet the same start states; the interval takes them as independent, which makes it wider if anything.
    """
    return Interval(*difference_interval(pool_final(vla), pool_final(standard)))


def is_non_inferior(difference: Interval, margin: float) -> bool:
    """Tell whether the whole interval of a difference lies above the margin by which it may be worse."""
    return difference.low is not None and difference.low > -margin


def seconds_per_update(curve: Curve) -> float:
    """Return the mean wall time of an update."""
    return curve[-1].wall_s / curve[-1].updates
