"""Hold the records of `tools.bench.overlap` against its targets; return rows of a table.

Owns the targets and the verdicts. A row that an estimate decides says so by its target; intervals stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asyncflow.profile.model import Interval, log_ratio_interval
from tools.bench.common.report import Finding
from tools.bench.learning.curves import Curves
from tools.bench.overlap.training import (
    final_difference,
    find_first,
    find_lasting,
    is_non_inferior,
    pool,
    ratio_interval,
    time_ratio,
)

TWO_STAGES_CEILING, TWO_STAGES_SHARE = 2.0, 0.97
THREE_STAGES_CEILING, MIN_THREE_STAGES = 3.0, 2.6
MAX_SWEEP_ERROR, MAX_OVERHEAD = 0.05, 0.02
MIN_LIFT_SHARE, MAX_TIME_RATIO, MARGIN = 0.93, 0.6, 0.03

Figures = dict[str, Any]


def with_interval(interval: Interval, shown: Callable[[float], str] = "{:.3f}".format) -> str:
    """Return an estimate and its interval."""
    if interval.low is None or interval.high is None:
        return f"{shown(interval.value)} (no interval)"
    return f"{shown(interval.value)} ({shown(interval.low)} to {shown(interval.high)})"


def signed_percent(share: float) -> str:
    """Return a share in per cent, with its sign."""
    return f"{100 * share:+.2f} %"


def to_interval(values: Figures) -> Interval:
    """Return an interval as JSON holds it."""
    return Interval(values["value"], values["low"], values["high"])


def judge_two_stages(figures: Figures) -> list[Finding]:
    """Compare two equal stages with the ceiling of two stages that take equally long."""
    found = figures["profile"]
    reached, alone = to_interval(found["speedup"]["standard"]), found["alone"]
    target = TWO_STAGES_SHARE * TWO_STAGES_CEILING
    share = f"{100 * reached.value / TWO_STAGES_CEILING:.1f} % of {TWO_STAGES_CEILING:g}"
    own = f"{100 * reached.value / found['ceilings']['ideal']['two_stage']:.1f} % of the profile's own ideal ceiling"
    return [
        Finding(
            f"toy, two equal emulated stages (Tc {alone['collect_s']:.2f} s, Tt {alone['update_s']:.2f} s), lag 1: "
            "speed-up over the synchronous mode",
            f"{with_interval(reached)}: {share}, {own}",
            f">= {target:.2f} = {TWO_STAGES_SHARE} x {TWO_STAGES_CEILING}",
            reached.value >= target,
        )
    ]


def judge_three_stages(figures: Figures) -> list[Finding]:
    """Compare three equal stages with their target."""
    reached = to_interval(figures["profile"]["speedup"]["serial"])
    own = 100 * reached.value / figures["profile"]["ceilings"]["ideal"]["three_stage"]
    return [
        Finding(
            "toy, three equal emulated stages, two groups: speed-up over the synchronous mode with one group",
            f"{with_interval(reached)}: {own:.1f} % of the profile's own ideal ceiling",
            f">= {MIN_THREE_STAGES} of {THREE_STAGES_CEILING}",
            reached.value >= MIN_THREE_STAGES,
        )
    ]


def judge_sweep(figures: Figures) -> list[Finding]:
    """Compare every point of the sweep with its prediction."""
    errors = [row["error"] for row in figures["profile"]["sweep"]]
    ratios = [row["ratio"] for row in figures["profile"]["sweep"]]
    worst = max(errors, key=abs)
    return [
        Finding(
            f"toy, Tt / Tc from {min(ratios):.2f} to {max(ratios):.2f}: measured over predicted speed-up, worst of "
            f"{len(errors)} points",
            f"{signed_percent(worst)}; all: {signed_percent(min(errors))} to {signed_percent(max(errors))}",
            f"every point within {100 * MAX_SWEEP_ERROR:g} %",
            abs(worst) <= MAX_SWEEP_ERROR,
        )
    ]


def judge_overhead(figures: Figures) -> list[Finding]:
    """Compare what recording costs with its limit, which the whole interval has to keep."""
    return [_judge_overhead(task, found) for task, found in figures.items()]


def _judge_overhead(task: str, found: Figures) -> Finding:
    wall, cpu = to_interval(found["wall_s"]), to_interval(found["cpu_s"])
    return Finding(
        f"profiler's own overhead, {task}, asynchronous, nothing emulated: seconds of an update with recording on over "
        "off",
        f"{with_interval(wall, signed_percent)}; CPU seconds of all processes {with_interval(cpu, signed_percent)}",
        f"< {100 * MAX_OVERHEAD:g} %, whole interval of the seconds",
        wall.high is not None and wall.high < MAX_OVERHEAD,
    )


def block_shares(found: Figures) -> list[tuple[float, float]]:
    """Return the speed-up and the contended ceiling of each block of a profile with one group."""
    blocks = sorted({leg["block"] for leg in found["legs"]})
    return [_block_share([leg for leg in found["legs"] if leg["block"] == block]) for block in blocks]


def _block_share(legs: list[Figures]) -> tuple[float, float]:
    def of(mode: str, name: str) -> float:
        values: list[float] = [leg[name] for leg in legs if leg["mode"] == mode]
        return sum(values) / len(values)

    in_turn = of("standard", "collect_s") + of("standard", "trainer_s")
    ceiling = in_turn / max(of("vla", "collect_s"), of("vla", "trainer_s"))
    # Legs of a block have as many decisions each, so that means of seconds are those of seconds per decision.
    return of("standard", "seconds") / of("vla", "seconds"), ceiling


def judge_lift(figures: Figures) -> list[Finding]:
    """Compare Lift with its contended ceiling."""
    found = figures["profile"]
    reached, alone = to_interval(found["speedup"]["standard"]), found["alone"]
    ceiling = found["ceilings"]["contended"]["two_stage"]
    shares = block_shares(found)
    by_block = log_ratio_interval([each for each, _ in shares], [limit for _, limit in shares])
    share = reached.value / ceiling
    return [
        Finding(
            f"Lift, policy and update emulated so that Tc = Tt (measured alone: Tc {alone['collect_s']:.2f} s, Tt "
            f"{alone['update_s']:.2f} s): share of the contended ceiling",
            f"{share:.3f}: speed-up {with_interval(reached)} of {ceiling:.3f}; by blocks {with_interval(by_block)}; "
            f"of the ideal ceiling {reached.value / found['ceilings']['ideal']['two_stage']:.3f}",
            f">= {MIN_LIFT_SHARE}, both",
            min(share, by_block.value) >= MIN_LIFT_SHARE,
        )
    ]


def judge_learning(curves: Curves) -> list[Finding]:
    """Compare wall time to the threshold and final success of both modes, pooled over seeds."""
    vla, standard = (pool(list(curves[mode].values())) for mode in ("vla", "standard"))
    ratio, seeds = ratio_interval(vla, standard), ", ".join(map(str, curves["vla"]))
    others = {"lasting": find_lasting, "first": find_first}
    found = {name: time_ratio(vla, standard, find) for name, find in others.items()}
    note = "".join(f"; {name}: {value:.3f}" for name, value in found.items() if value is not None)
    difference = final_difference(curves["vla"], curves["standard"])
    pairs = zip(curves["vla"].values(), curves["standard"].values(), strict=True)
    by_seed = ", ".join(f"{100 * (vla[-1].success_rate - standard[-1].success_rate):+.1f}" for vla, standard in pairs)
    return [
        Finding(
            f"Lift, the same latencies, seeds {seeds} pooled: wall time to 95 % success, asynchronous over synchronous",
            ("a mode does not end at 95 %" if ratio is None else with_interval(ratio)) + note,
            f"<= {MAX_TIME_RATIO}",
            ratio is not None and ratio.value <= MAX_TIME_RATIO,
        ),
        Finding(
            f"Lift, the same runs: final success, asynchronous minus synchronous, {points_of(curves)} episodes each",
            with_interval(difference, lambda rate: f"{100 * rate:+.1f}") + f" points; by seeds {by_seed}",
            f"non-inferior: whole interval > {-100 * MARGIN:g} points",
            is_non_inferior(difference, MARGIN),
        ),
    ]


def points_of(curves: Curves) -> int:
    """Return the episodes of the last checkpoints of a mode, all seeds together."""
    return sum(curve[-1].num_episodes for curve in curves["vla"].values())


JUDGES = {
    "two_stages": judge_two_stages,
    "three_stages": judge_three_stages,
    "sweep": judge_sweep,
    "overhead_toy": judge_overhead,
    "overhead_lift": judge_overhead,
    "lift": judge_lift,
}
