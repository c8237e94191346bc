"""Write `docs/benchmarks/overlap.md` and its learning curves from the records of `tools.bench.overlap`.

Nothing is measured here and no number stands in this file: the page cannot say what the records do not, but for
`overlap_remarks.md` among them, which tells by hand what was repeated and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from asyncflow.profile.model import mean
from tools.bench.common.pages import Page
from tools.bench.common.records import Place, Records, describe_records, read_remarks
from tools.bench.common.report import MODE_NAMES, Finding, to_table
from tools.bench.learning.curves import Curve, Curves, pool_final, read_curves
from tools.bench.learning.page import COLOURS, GREY, MODES, describe_rate, draw_curves
from tools.bench.overlap.judge import JUDGES, judge_learning
from tools.bench.overlap.settings import CURVES
from tools.bench.overlap.training import (
    THRESHOLD,
    Finder,
    find_first,
    find_fitted,
    find_lasting,
    pool,
    read_finest,
    seconds_per_update,
    time_ratio,
    time_to,
)

TITLES = {
    "two_stages": "Two equal stages",
    "three_stages": "Three equal stages, two groups",
    "sweep": "Training over collecting, from 0.1 to 4",
    "lift": "Lift, emulated policy and update",
}
FINDERS = {"fitted": find_fitted, "lasting": find_lasting, "first": find_first}
STAGES = {"collect": "Tc, collecting", "env": "simulators", "policy": "policy", "trainer": "Tt, training"}


def write_page(place: Place, records: Records) -> list[Finding]:
    """Write what there are records of, and return the rows of the table."""
    curves = read_all(place, records)
    findings = judge(records, curves)
    make_page(place, records, curves, findings).write(place.page)
    if curves:
        draw_learning(place.pages / "overlap_learning.png", curves)
    return findings


def make_page(place: Place, records: Records, curves: Curves, findings: list[Finding]) -> Page:
    """Return the page."""
    learning = [describe_learning(curves)] if curves else []
    sections = [NOTES, *read_remarks(place), *describe_profiles(records), *learning]
    setting = describe_records(records)
    return Page("Overlap", setting=setting, findings=findings, measured="measured (95 %)", sections=sections)


def read_all(place: Place, records: Records) -> Curves:
    """Return the curves that are finished, with their ends as finely as those were evaluated."""
    if "evaluate_fine" in records:
        return read_finest(place)
    return read_curves(place.data / CURVES) if "evaluate" in records else {}


def judge(records: Records, curves: Curves) -> list[Finding]:
    """Return the rows of all parts that are finished."""
    rows = [
        row for part, judge_part in JUDGES.items() if part in records for row in judge_part(records[part]["figures"])
    ]
    return rows + (judge_learning(curves) if curves else [])


# Text.


NOTES = """
Speed-ups are ratios within blocks synchronous, asynchronous, asynchronous, synchronous, with Student's t on the
logarithms of the blocks' ratios. Estimates decide, unless a target names the interval. [profiling.md](../profiling.md)
tells how they are measured and what the ceilings are. For the overhead, two equal runs switch recording on and off
between updates, one of them where the other does not, so that the same work is compared with and without; what is
recorded is written as well.
"""


def describe_profiles(records: Records) -> Iterator[str]:
    """Yield a section for each profile: its picture, and what the table has no room for."""
    for part, title in TITLES.items():
        if part in records:
            found = records[part]["figures"]["profile"]
            table = sweep_table(found) if part == "sweep" else stage_table(found)
            yield f"## {title}\n![{title}](overlap_{part}.png)\n\n{table}\n"


def stage_table(found: dict[str, Any]) -> str:
    """Return the seconds of a rollout in each stage, mode by mode."""
    modes = found["modes"]
    rows = [[label, *(with_spread(mode["stages"][name]) for mode in modes.values())] for name, label in STAGES.items()]
    rates = [f"{mode['decisions_per_s']:.1f} ± {mode['decisions_per_s_std']:.1f}" for mode in modes.values()]
    table = to_table(["seconds of a rollout", *(MODE_NAMES[mode] for mode in modes)], [*rows, ["decisions/s", *rates]])
    kind = "three_stage" if "serial" in modes else "two_stage"
    ideal, contended = (found["ceilings"][name][kind] for name in ("ideal", "contended"))
    model = f"the model of the ring gains {found['predicted']:.3f} over the synchronous mode"
    return f"{table}\n\nCeilings: {ideal:.3f} ideal, {contended:.3f} contended; {model}."


def with_spread(stage: dict[str, float]) -> str:
    """Return a mean and its standard deviation over rollouts or updates."""
    return f"{stage['mean_s']:.3f} ± {stage['std_s']:.3f}"


def sweep_table(found: dict[str, Any]) -> str:
    """Return measured against predicted speed-up at each ratio."""
    head = ["Tt / Tc", "as measured", "ceiling", "predicted", "measured", "95 %", "error"]
    return to_table(head, [_sweep_row(row) for row in found["sweep"]])


def _sweep_row(row: dict[str, Any]) -> list[str]:
    figures = [f"{row[name]:.3f}" for name in ("ratio", "ceiling", "predicted", "measured")]
    return [f"{row['wanted_ratio']:g}", *figures, row["interval"], f"{100 * row['error']:+.1f} %"]


def describe_learning(curves: Curves) -> str:
    """Return the section about training to the threshold."""
    aim = f"{100 * THRESHOLD:g} %"
    head = ["seed", "mode", "s/update", *(cell for name in FINDERS for cell in (name, "ratio")), "final success"]
    rows = [row for seed in [*curves["vla"], None] for row in learning_rows(curves, seed)]
    counts = sorted({point.num_episodes for mode in MODES for curve in curves[mode].values() for point in curve})
    return LEARNING.format(table=to_table(head, rows), episodes=" or ".join(map(str, counts)), aim=aim)


LEARNING = """## Lift to {aim}
![Success over wall time](overlap_learning.png)

{table}

Seconds of training until {aim}; in brackets, the update. *Fitted*: until the curve that never falls and is nearest to
the rates in squares (isotonic regression) is there. *Lasting*: until the first checkpoint from which on every one
solves as many of its episodes, which a few unlucky episodes put off. *First*: until the first one that does, whatever
follows, which a few lucky ones bring forward; near the end of a curve, so does the fit. Ratios are asynchronous over
synchronous. Where both need k updates and overlap is perfect, the ratio is (k + 1) / 2k, because the asynchronous run
collects its first rollout as the synchronous one does. Every update leaves a checkpoint. Evaluations are made
afterwards and take no time that counts: {episodes} episodes a seed and checkpoint, on start states that training never
sees, the same ones for both modes.

The interval of the ratio takes every checkpoint's true rate from its posterior under Jeffreys' prior, 2,000 times
(draws in which neither mode gets there are left out); that of final success is Newcombe's, that of a rate Wilson's.
What another training seed would change is in none of them.
The curves are in [`data/emulated/`](data/emulated).
"""


def learning_rows(curves: Curves, seed: int | None) -> Iterator[list[str]]:
    """Yield a row a mode: of a seed, or of all."""
    chosen = {mode: curves[mode] if seed is None else {seed: curves[mode][seed]} for mode in MODES}
    pooled = {mode: pool(list(each.values())) for mode, each in chosen.items()}
    for mode in MODES:
        times = [cell for find in FINDERS.values() for cell in time_cells(pooled, mode, find)]
        pace = mean([seconds_per_update(curve) for curve in chosen[mode].values()])
        name = "**all**" if seed is None else str(seed)
        yield [name, MODE_NAMES[mode], f"{pace:.2f}", *times, describe_rate(*pool_final(chosen[mode]))]


def time_cells(pooled: dict[str, Curve], mode: str, find: Finder) -> list[str]:
    """Return when a mode is at the threshold, and of the asynchronous one the ratio."""
    end, ratio = time_to(pooled[mode], find), time_ratio(pooled["vla"], pooled["standard"], find)
    seconds = "never" if end is None else f"{end.wall_s:.1f} s ({end.updates})"
    return [seconds, f"{ratio:.3f}" if mode == "vla" and ratio is not None else ""]


# The picture.


def draw_learning(path: Path, curves: Curves) -> None:
    """Draw success over wall time and over updates: seeds thin, means thick."""
    plt.switch_backend("Agg")
    figure, (seconds, updates) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    draw_curves(seconds, curves, lambda point: point.wall_s)
    draw_curves(updates, curves, lambda point: point.updates)
    for axes, name in ((seconds, "seconds of training"), (updates, "updates")):
        axes.axhline(100 * THRESHOLD, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
        axes.set_xlabel(name)
        axes.spines[["top", "right"]].set_visible(False)
    for row, (mode, line) in enumerate((("vla", "- -"), ("standard", "\u2014"))):
        place: dict[str, Any] = {"transform": seconds.transAxes, "ha": "right", "color": COLOURS[mode]}
        seconds.text(0.97, 0.05 + 0.09 * row, f"{line} {MODE_NAMES[mode]}", fontweight="bold", **place)
    seconds.set_title("Success, %", loc="left")
    figure.savefig(path, dpi=160)
    plt.close(figure)
