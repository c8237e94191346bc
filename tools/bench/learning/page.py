"""Write `docs/benchmarks/learning.md` and `learning.png` from the tables of `tools.bench.learning`.

    python -m tools.bench.learning.page

Nothing is measured here and no number stands in this file but the targets: the page cannot say what the data do not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from asyncflow.run.evaluate import wilson_interval
from tools.bench.common.pages import Page
from tools.bench.common.report import (
    MODE_NAMES,
    REPOSITORY,
    Finding,
    conclude,
    describe_command,
    describe_setting,
    to_table,
)
from tools.bench.learning.curves import Curve, Curves, Point, difference_interval, pool_final, read_curves

PAGES = REPOSITORY / "docs" / "benchmarks"
MODES = ("standard", "vla")
TARGET_TASK, POOLED_TARGET, SEED_TARGET, MAX_ENV_STEPS = "Lift", 0.95, 0.92, 100_000
TARGET_SEEDS, TARGET_EPISODES = {0, 1, 2}, 200
# Lag -> condition; at lag 0 both objectives are the same, and lag 1, decoupled, is what vla does.
LAGS = {
    "decoupled": {0: "standard", 1: "vla", 2: "decoupled_lag2", 4: "decoupled_lag4"},
    "plain": {0: "standard", 1: "plain_lag1", 2: "plain_lag2", 4: "plain_lag4"},
}
# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {"standard": "#0072B2", "vla": "#D55E00", "decoupled": "#D55E00", "plain": "#444444"}
GREY = "#767676"


# The page.


def percent(rate: float) -> str:
    """Return a rate in per cent."""
    return f"{100 * rate:.1f} %"


def describe_rate(successes: int, episodes: int) -> str:
    """Return a rate with its 95 % interval."""
    low, high = wilson_interval(successes, episodes)
    return f"{percent(successes / episodes)} ({100 * low:.1f} to {100 * high:.1f})"


def judge(condition: str, seeds: dict[int, Curve]) -> Finding:
    """Return whether a mode meets the targets of Lift; what was not measured does not."""
    finals = {seed: curve[-1] for seed, curve in seeds.items()}
    what = f"{MODE_NAMES[condition]}: success after the last update, seeds 0, 1 and 2, {TARGET_EPISODES} episodes each"
    target = f">= {percent(POOLED_TARGET)} pooled, >= {percent(SEED_TARGET)} every seed, <= {MAX_ENV_STEPS:,} env steps"
    if not set(finals) >= TARGET_SEEDS or any(point.num_episodes < TARGET_EPISODES for point in finals.values()):
        return Finding(what, "not measured", target, False)
    successes, episodes = pool_final(seeds)
    worst = min(finals, key=lambda seed: finals[seed].success_rate)
    steps = max(point.env_steps for point in finals.values())
    is_met = (
        successes / episodes >= POOLED_TARGET and finals[worst].success_rate >= SEED_TARGET and steps <= MAX_ENV_STEPS
    )
    measured = (
        f"{percent(successes / episodes)} pooled, worst seed ({worst}) {percent(finals[worst].success_rate)}, "
        f"{steps:,} env steps at most"
    )
    return Finding(what, measured, target, is_met)


def modes_table(curves: Curves, has_seconds: bool) -> str:
    """Return the final success of each mode and seed, and pooled."""
    head = ["mode", "seed", "start (95 %)", "final success (95 %)", "episodes", "env steps", "training, s", "speed-up"]
    rows = []
    for mode in (mode for mode in MODES if mode in curves):
        for seed, curve in curves[mode].items():
            rows.append([MODE_NAMES[mode], str(seed), *describe_curve(curve), describe_speedup(curves, mode, [seed])])
        successes, episodes = pool_final(curves[mode])
        seconds = statistics.mean(curve[-1].wall_s for curve in curves[mode].values())
        speedup = describe_speedup(curves, mode, list(curves[mode]))
        pooled = [describe_rate(successes, episodes), str(episodes), "", f"{seconds:.0f} (mean)", speedup]
        rows.append([f"**{MODE_NAMES[mode]}**", "**all**", "", *pooled])
    shown = len(head) if has_seconds else -2
    return to_table(head[:shown], [row[:shown] for row in rows])


def describe_curve(curve: Curve) -> list[str]:
    """Return the cells of one run."""
    first, final = curve[0], curve[-1]
    start = describe_rate(first.num_successes, first.num_episodes) if first.updates == 0 else "-"
    rate = describe_rate(final.num_successes, final.num_episodes)
    return [start, rate, str(final.num_episodes), f"{final.env_steps:,}", f"{final.wall_s:.0f}"]


def describe_speedup(curves: Curves, mode: str, seeds: list[int]) -> str:
    """Return the wall time of standard over that of vla for the same number of updates, averaged over seeds."""
    common = [seed for seed in seeds if seed in curves.get("standard", {})]
    if mode != "vla" or not common:
        return ""
    ratio = statistics.mean(curves["standard"][seed][-1].wall_s / curves["vla"][seed][-1].wall_s for seed in common)
    return f"{ratio:.2f}"


def lag_table(curves: Curves) -> str:
    """Return final success by lag, decoupled against plain."""
    head = ["lag", "decoupled: seeds", "pooled (95 %)", "plain: seeds", "pooled (95 %)", "decoupled - plain (95 %)"]
    rows = []
    for lag, name in LAGS["decoupled"].items():
        decoupled, plain = curves.get(name), curves.get(LAGS["plain"][lag])
        rows.append([str(lag), *describe_seeds(decoupled), *describe_seeds(plain), describe_gap(lag, decoupled, plain)])
    return to_table(head, rows)


def describe_seeds(seeds: dict[int, Curve] | None) -> list[str]:
    """Return the rates of the seeds and their pooled rate."""
    if not seeds:
        return ["-", "-"]
    rates = ", ".join(f"{100 * curve[-1].success_rate:.1f}" for curve in seeds.values())
    return [rates, describe_rate(*pool_final(seeds))]


def describe_gap(lag: int, decoupled: dict[int, Curve] | None, plain: dict[int, Curve] | None) -> str:
    """Return the difference in points with its interval."""
    if lag == 0:
        return "the same run"
    if not decoupled or not plain:
        return "-"
    gap, low, high = difference_interval(pool_final(decoupled), pool_final(plain))
    return f"{100 * gap:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def describe_panels(options: argparse.Namespace, curves: Curves) -> list[str]:
    """Return what the picture shows: wall time if it means something, lags if conditions with one were measured."""
    has_lags = not set(curves) <= set(MODES)
    return [" over env steps", *[" over wall time"] * options.has_seconds, *[" by policy lag"] * has_lags]


def make_page(options: argparse.Namespace, curves: Curves, meta: dict[str, Any], command: str) -> Page:
    """Return the page.

    Args:
        options: Of the command line.
        curves: What it shows.
        meta: Where and how they were measured.
        command: What writes this page.
    """
    commits = sorted(set(meta["commits"].values()))
    setting = describe_setting(meta["machine"], {"commit": "`, `".join(commits), **meta["versions"]})
    note = f"- Note: {options.note}\n" if options.note else ""
    block = "\n".join(["```", *meta["commands"], command, "```"])
    has_lags = not set(curves) <= set(MODES)
    return Page(
        f"Learning: {options.task}",
        introduction=INTRODUCTION.format(pictured=",".join(describe_panels(options, curves))),
        setting=f"{setting}{note}\n{block}\n{CURVES_NOTE}",
        findings=judge_modes(options.task, curves),
        sections=[
            f"## Both modes\n{modes_table(curves, options.has_seconds)}",
            SECONDS if options.has_seconds else "",
            STALENESS.format(lags=lag_table(curves)) if has_lags else "",
            INTERVALS,
        ],
    )


def judge_modes(task: str, curves: Curves) -> list[Finding]:
    """Return whether each mode meets the targets, which are those of Lift alone."""
    return [judge(mode, curves.get(mode, {})) for mode in MODES] if task == TARGET_TASK else []


INTRODUCTION = """![Success{pictured}](learning.png)

Thin lines are seeds, thick ones their mean; bars are 95 % intervals over the pooled episodes of all seeds.
"""
CURVES_NOTE = """\
The curves are in [`data/`](data), one table per condition and seed. Evaluations are deterministic, on start states
that training never sees; training seconds leave them out. Where runs start from weights, these are the first point of
every curve.
"""
INTERVALS = """\
Intervals are Wilson's, and Newcombe's for differences, over pooled episodes. They say how exactly these policies were
measured; how much another training seed would change is seen from the rows or columns of seeds.
"""
SECONDS = """
Speed-up: training seconds of the synchronous run over those of the asynchronous one, for the same number of updates on
as many fresh decisions. Below 1 the asynchronous run is slower. Simulators, policy and training share the cores here,
and the policy is small.
"""
STALENESS = """
## What stale data cost
Lag is the number of updates between the version that acted and the version that is trained. A lag of 0 is the
synchronous run, where both objectives are the same. A lag of 1 with the decoupled objective is the asynchronous run.
The others are synchronous runs with an artificial lag (`buffer.max_policy_lag`), which end as asynchronous ones do.
Success in per cent.

{lags}
"""


# The picture.


def mean_curve(seeds: dict[int, Curve], x: Callable[[Point], float]) -> tuple[list[float], list[float]]:
    """Return the mean of x and of the success in per cent, over the seeds, at each number of updates all have."""
    by_updates = [{point.updates: point for point in curve} for curve in seeds.values()]
    common = sorted(set.intersection(*(set(points) for points in by_updates)))
    points = [[points[updates] for points in by_updates] for updates in common]
    xs = [statistics.mean(x(point) for point in each) for each in points]
    return xs, [100 * statistics.mean(point.success_rate for point in each) for each in points]


def _thousand_env_steps(point: Point) -> float:
    return point.env_steps / 1000


def _seconds(point: Point) -> float:
    return point.wall_s


def draw_curves(axes: Axes, curves: Curves, x: Callable[[Point], float]) -> None:
    """Draw both modes: seeds thin, means thick, a name at the end of each mean."""
    for mode, style in zip(MODES, ("-", "--"), strict=True):
        for curve in curves.get(mode, {}).values():
            success = [100 * point.success_rate for point in curve]
            axes.plot([x(point) for point in curve], success, style, color=COLOURS[mode], linewidth=0.7, alpha=0.45)
        if mode in curves:
            xs, ys = mean_curve(curves[mode], x)
            axes.plot(xs, ys, style, color=COLOURS[mode], linewidth=2.4, marker="o", markersize=4)


def draw_lags(axes: Axes, curves: Curves) -> None:
    """Draw final success by lag with intervals, decoupled against plain."""
    for objective, offset, marker in (("decoupled", -0.05, "o"), ("plain", 0.05, "s")):
        rates = {lag: pool_final(curves[name]) for lag, name in LAGS[objective].items() if name in curves}
        xs, ys = [lag + offset for lag in rates], [100 * k / n for k, n in rates.values()]
        ends = [wilson_interval(k, n) for k, n in rates.values()]
        errors = [
            [y - 100 * low for y, (low, _) in zip(ys, ends, strict=True)],
            [100 * high - y for y, (_, high) in zip(ys, ends, strict=True)],
        ]
        axes.errorbar(xs, ys, errors, color=COLOURS[objective], marker=marker, markersize=5, capsize=3, linewidth=1.8)


def add_names(axes: Axes, names: dict[str, str], x: float, align: Literal["left", "right"]) -> None:
    """Write what the lines are, in their colours, into a lower corner, which rising or falling curves leave free."""
    for row, (name, text) in enumerate(reversed(names.items())):
        place: dict[str, Any] = {"transform": axes.transAxes, "ha": align, "color": COLOURS[name], "fontweight": "bold"}
        axes.text(x, 0.05 + 0.09 * row, text, **place)


def add_target(axes: Axes) -> None:
    """Draw the pooled target behind everything."""
    axes.axhline(100 * POOLED_TARGET, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    place: dict[str, Any] = {"va": "bottom", "color": GREY, "fontsize": 8}
    axes.text(0.02, 100 * POOLED_TARGET + 0.5, "target", transform=axes.get_yaxis_transform(), **place)


def draw_picture(path: Path, curves: Curves, options: argparse.Namespace) -> None:
    """Write the PNG: success over env steps, over wall time, and by lag, as far as the page has them."""
    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
    }
    panels = describe_panels(options, curves)
    with plt.rc_context(style):
        size = (max(4.5, 3 * len(panels)), 3.1)
        figure, grid = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
        by_panel = dict(zip(panels, grid[0], strict=True))
        lags = by_panel.pop(" by policy lag", None)
        for panel, axes in by_panel.items():
            is_steps = panel == " over env steps"
            draw_curves(axes, curves, _thousand_env_steps if is_steps else _seconds)
            add_names(axes, {"standard": "\u2014 synchronous", "vla": "- - asynchronous"}, 0.97, "right")
            if options.task == TARGET_TASK:
                add_target(axes)
            axes.set(title="Success, %", xlabel="thousand env steps" if is_steps else "seconds of training")
        if lags is not None:
            draw_lags(lags, curves)
            add_names(lags, {"decoupled": "\u25cf decoupled", "plain": "\u25a0 plain PPO"}, 0.05, "left")
            lags.set(title="Final success, %", xlabel="policy lag, updates", xticks=[0, 1, 2, 3, 4], xlim=(-0.3, 4.3))
        plt.setp(grid[0], ylim=(None, 101))
        figure.savefig(path, dpi=200)
        plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default=TARGET_TASK, help="what the tables are of; the targets are those of Lift")
    parser.add_argument("--note", default="", help="what a reader must know of these tables")
    parser.add_argument("--no-seconds", dest="has_seconds", action="store_false", help="seconds mean nothing here")
    parser.add_argument("--data", type=Path, default=PAGES / "data", help="folder of the tables")
    parser.add_argument("--out", type=Path, default=PAGES, help="folder of the page and the picture")
    return parser.parse_args()


def main() -> int:
    """Read, write, and say which targets were missed."""
    options = parse_arguments()
    plt.switch_backend("Agg")
    curves = read_curves(options.data)
    if not curves:
        raise SystemExit(f"{options.data} holds no learning_*_seed*.csv; python -m tools.bench.learning writes them")
    meta = json.loads((options.data / "learning_meta.json").read_text())
    make_page(options, curves, meta, describe_command()).write(options.out / "learning.md")
    draw_picture(options.out / "learning.png", curves, options)
    return conclude(judge_modes(options.task, curves))


if __name__ == "__main__":
    sys.exit(main())
