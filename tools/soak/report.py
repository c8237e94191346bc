"""Report the samples of `tools.soak`: slopes with their intervals, a page and a picture.

Owns the columns of the samples, the arithmetic and the verdicts. Nothing is measured here.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from tools.bench.common.pages import Page, to_verdicts
from tools.bench.common.report import REPORTED, Finding, describe_setting

Sample = dict[str, int]
Series = dict[str, list[float]]  # column -> a value a sample

NUM_BLOCKS = 20
T_QUANTILE = 2.100922  # 0.975 quantile of Student's t with NUM_BLOCKS - 2 = 18 degrees of freedom
MIB = 2**20
# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {"main": "#0072B2", "workers": "#D55E00"}


@dataclass(frozen=True)
class Quantity:
    """A column of the samples that must not grow.

    Attributes:
        meaning: What the page calls it, with its unit.
        scale: That unit in units of the column.
        resolution: The slope, per hour, under which a growth is of no practical interest; None where strangers on the
            machine move the column, which is then shown and not judged.
    """

    meaning: str
    scale: float
    resolution: float | None


QUANTITIES = {
    "main_rss_bytes": Quantity("memory of the main process (RSS), MiB", MIB, 1.0),
    "main_pss_bytes": Quantity("the same with its share of shared pages (PSS), MiB", MIB, None),
    "workers_rss_bytes": Quantity("memory of the workers together (RSS), MiB", MIB, 1.0),
    "workers_pss_bytes": Quantity("the same with its share of shared pages (PSS), MiB", MIB, None),
    "main_threads": Quantity("threads of the main process", 1.0, 0.5),
    "workers_threads": Quantity("threads of the workers", 1.0, 0.5),
    "main_descriptors": Quantity("open descriptors of the main process", 1.0, 0.5),
    "workers_descriptors": Quantity("open descriptors of the workers", 1.0, 0.5),
    "processes": Quantity("processes", 1.0, 0.5),
    "shm_bytes": Quantity("growth of `/dev/shm` since before the run, MiB", MIB, 0.1),
    "shm_entries": Quantity("names in `/dev/shm`, likewise", 1.0, 0.5),
}
COLUMNS = ("seconds", *QUANTITIES)


# Arithmetic.


@dataclass(frozen=True)
class Slope:
    """A least-squares slope per hour.

    Attributes:
        value: The slope.
        half_width: Half of its 95 % interval.
        correlation: Of neighbouring residuals; far above zero, the interval is too narrow.
    """

    value: float
    half_width: float
    correlation: float

    @property
    def contains_zero(self) -> bool:
        """Tell whether the interval contains zero."""
        return abs(self.value) <= self.half_width

    def grows(self, resolution: float) -> bool:
        """Tell whether a quantity grows: the interval is above zero, and the slope is not below the resolution."""
        return self.value >= resolution and not self.contains_zero


def block_means(values: list[float], num_blocks: int) -> list[float]:
    """Return the means of consecutive blocks whose sizes differ by one at most."""
    edges = [len(values) * i // num_blocks for i in range(num_blocks + 1)]
    return [statistics.fmean(values[low:high]) for low, high in pairwise(edges)]


def fit_slope(seconds: list[float], values: list[float]) -> Slope:
    """Return the slope of the means of 20 blocks.

    Neighbouring samples resemble each other (an allocator keeps what it has, a checkpoint spans two samples), so that
    each of them is not an observation of its own; the mean of a block is closer to one.

    Raises:
        ValueError: There are fewer samples than blocks.
    """
    if len(values) < NUM_BLOCKS:
        raise ValueError(f"{len(values)} samples after the warm-up: a slope needs {NUM_BLOCKS} at least")
    hours = [second / 3600 for second in block_means(seconds, NUM_BLOCKS)]
    means = block_means([value - values[0] for value in values], NUM_BLOCKS)  # a constant is exactly so
    line = statistics.linear_regression(hours, means)
    residuals = [y - line.intercept - line.slope * x for x, y in zip(hours, means, strict=True)]
    squares = math.fsum(residual**2 for residual in residuals)
    centre = statistics.fmean(hours)
    spread = math.fsum((hour - centre) ** 2 for hour in hours)
    error = math.sqrt(squares / (NUM_BLOCKS - 2) / spread)
    return Slope(line.slope, T_QUANTILE * error, correlate_neighbours(residuals))


def correlate_neighbours(residuals: list[float]) -> float:
    """Return the lag-1 autocorrelation of residuals; 0 if there are none to speak of."""
    squares = math.fsum(residual**2 for residual in residuals)
    products = math.fsum(x * y for x, y in pairwise(residuals))
    return products / squares if squares > 0 else 0.0


# The page.


def read_series(path: Path) -> Series:
    """Return the columns of a table of samples."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in COLUMNS}


def after(series: Series, warmup: float) -> Series:
    """Return the samples that were taken after so many minutes."""
    kept = [second >= 60 * warmup for second in series["seconds"]]
    return {name: [x for x, is_kept in zip(values, kept, strict=True) if is_kept] for name, values in series.items()}


def write_page(data: Path, pages: Path, warmup: float, tasks: list[str]) -> list[Finding]:
    """Write `soak.md` and `soak.png`, and return every verdict.

    Args:
        data: Folder of the tables.
        pages: Folder to write to.
        warmup: Minutes at the start that no slope is taken of.
        tasks: The soaks, in order.

    Raises:
        SystemExit: A soak has not been run, or was too short.
    """
    missing = [task for task in tasks if not (data / f"soak_{task}.json").exists()]
    if missing:
        raise SystemExit(f"{data} holds no soak_{missing[0]}.json; python -m tools.soak --task {missing[0]} writes it")
    facts = {task: json.loads((data / f"soak_{task}.json").read_text()) for task in tasks}
    series = {task: read_series(data / f"soak_{task}.csv") for task in tasks}
    try:
        findings = {task: judge_soak(after(series[task], warmup)) for task in tasks}
    except ValueError as error:
        raise SystemExit(f"{data}: {error}") from None
    remarks = data / "soak_remarks.md"
    said = remarks.read_text(encoding="utf-8") if remarks.exists() else ""
    make_page(facts, findings, warmup, said).write(pages / "soak.md")
    draw_picture(pages / "soak.png", series, warmup)
    return [replace(found, what=f"{task}: {found.what}") for task in tasks for found in findings[task]]


def make_page(
    facts: dict[str, dict[str, Any]], findings: dict[str, list[Finding]], warmup: float, remarks: str = ""
) -> Page:
    """Return the page of soaks, by task; `remarks` tell by hand what was repeated."""
    soaks = [describe_soak(task, facts[task], found) for task, found in findings.items()]
    sections = [*soaks, remarks, METHOD.format(num_blocks=NUM_BLOCKS)]
    return Page("Soak", INTRODUCTION.format(warmup=warmup), sections=sections)


def judge_soak(series: Series) -> list[Finding]:
    """Return whether anything grows in one soak."""
    return [judge_quantity(quantity, series["seconds"], series[name]) for name, quantity in QUANTITIES.items()]


def describe_soak(task: str, facts: dict[str, Any], findings: list[Finding]) -> str:
    """Return the section of one soak."""
    setting = describe_setting(facts["machine"], facts["software"])
    shown = facts | {"left": ", ".join(facts["left"]) or "nothing"}
    table = to_verdicts(findings, "mean (range); slope per hour (95 %); correlation")
    return SECTION.format(title=task.capitalize(), setting=setting, table=table, **shown)


def judge_quantity(quantity: Quantity, seconds: list[float], values: list[float]) -> Finding:
    """Return a quantity's level, its slope, and whether it grows.

    Raises:
        ValueError: There are too few samples for a slope.
    """
    scaled = [value / quantity.scale for value in values]
    slope = fit_slope(seconds, scaled)
    low, high = slope.value - slope.half_width, slope.value + slope.half_width
    level = f"{statistics.fmean(scaled):.2f} ({min(scaled):.2f} to {max(scaled):.2f})"
    measured = f"{level}; {slope.value:+.3f} ({low:+.3f} to {high:+.3f}); {slope.correlation:+.2f}"
    if quantity.resolution is None:
        return Finding(quantity.meaning, measured, REPORTED, True)
    target = f"< {quantity.resolution:g} an hour, or 0 in the interval"
    return Finding(quantity.meaning, measured, target, not slope.grows(quantity.resolution))


SECTION = """## {title}, {minutes:g} minutes
{setting}- Command: `{command}`
- Run: {updates:,} updates, {env_steps:,} env steps, {checkpoints:,} checkpoints written (one every {save_interval}
  updates and at the end; the last is `{last_checkpoint}`), {worker_restarts} worker restarts
- End: SIGINT ended it with exit code 130; left behind as processes or in `/dev/shm`: {left}

{table}
"""

INTRODUCTION = """\
Does anything grow while a run goes on? Slopes leave out the first {warmup:g} minutes, which are shaded.

![Memory, threads, descriptors and /dev/shm over time](soak.png)

The axes of memory span what was measured after the shaded minutes; the rise at the start leaves them below.
"""

METHOD = """## Method
The run is asynchronous (`--buffer-type vla`), with TensorBoard curves and checkpoints, of which the oldest are removed;
Lift is evaluated as well.
"Workers" are all processes of the run but the main one. Samples are read from `/proc` every few seconds; they are
the tables `soak_*.csv` in [`data/`](data). Samples that follow each other resemble each other, so slopes are
least-squares lines through the means of {num_blocks} blocks of equal size, and intervals are Student's with
{num_blocks} - 2 degrees of freedom. The correlation is that of neighbouring blocks about the line: within about 0.45 of
zero it may be chance; above that, the interval is narrower than it should be.

A quantity meets its target if the interval of its slope contains zero or the slope is below the resolution, in units an
hour. An interval that contains zero and is wider than the resolution says that no growth was seen, not that there is
none. Resident memory (RSS) counts a page that several processes share in each of them. Proportional memory (PSS)
counts a k-th of it in each of k, so it moves when strangers that map the same libraries start or end: it is shown and
not judged. `/dev/shm` counts files without a name, too, and belongs to all processes of the machine.
"""


# The picture.


def draw_picture(path: Path, series: dict[str, Series], warmup: float) -> None:
    """Write the PNG: a column a soak, a row a quantity."""
    style: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style | {"axes.titlelocation": "left", "axes.formatter.useoffset": False}):
        figure, grid = plt.subplots(5, len(series), figsize=(9, 9), layout="constrained", sharex="col", squeeze=False)
        for column, (task, values) in enumerate(series.items()):
            draw_soak(list(grid[:, column]), task.capitalize(), values)
            focus(list(grid[:, column]), after(values, warmup))
            for axes in grid[:, column]:
                axes.axvspan(0, warmup, color="#000000", alpha=0.08, linewidth=0)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def draw_soak(rows: list[Axes], title: str, series: Series) -> None:
    """Draw one soak from top to bottom."""
    main, workers, threads, descriptors, shared = rows
    draw_line(main, series, "main_rss_bytes", COLOURS["main"])
    draw_line(workers, series, "workers_rss_bytes", COLOURS["workers"])
    for axes, what in ((threads, "threads"), (descriptors, "descriptors")):
        for who, colour in COLOURS.items():
            draw_line(axes, series, f"{who}_{what}", colour, who)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, ncols=2, fontsize=8)
    draw_line(shared, series, "shm_bytes", "#444444")
    names = ("main process, MiB (RSS)", "workers, MiB (RSS)", "threads", "descriptors", "/dev/shm growth, MiB")
    for axes, name in zip(rows, names, strict=True):
        axes.set_title(f"{title}: {name}")
    shared.set_xlabel("minutes")


def focus(rows: list[Axes], settled: Series) -> None:
    """Let memory fill its axes as it is after the warm-up, or 4 MiB of them, so that no growth looks flat."""
    main, workers, _, _, shared = rows
    for axes, name in ((main, "main_rss_bytes"), (workers, "workers_rss_bytes"), (shared, "shm_bytes")):
        low, high = (end(settled[name]) / MIB for end in (min, max))
        margin = max(0.1 * (high - low), 2 - (high - low) / 2)
        axes.set_ylim(low - margin, high + margin)


def draw_line(axes: Axes, series: Series, name: str, colour: str, label: str = "") -> None:
    """Draw a column over minutes, in the unit of the page."""
    values = [value / QUANTITIES[name].scale for value in series[name]]
    axes.plot([second / 60 for second in series["seconds"]], values, color=colour, linewidth=1.0, label=label)
