"""The picture of a profile: who worked when, in both modes on one scale, and throughput against its ceilings.

matplotlib is imported only here, when a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asyncflow.caches import prepare_caches
from asyncflow.errors import AsyncflowError
from asyncflow.metrics.tracing import Span
from asyncflow.profile.model import mean
from asyncflow.profile.read import COLLECTOR, TRAINER, Leg

NUM_PERIODS = 4  # updates of the slowest mode that are shown
LANES = (COLLECTOR, "simulators", TRAINER)
COLOURS = {  # name of a span -> colour and meaning; in the order in which they are drawn over each other
    "collect": ("#c6dbef", "collecting: waits for simulators, writes"),
    "inference": ("#2171b5", "policy infers"),
    "chunk": ("#41ab5d", "simulators step"),
    "update": ("#e6550d", "update"),
    "publish": ("#7a0177", "publish"),
}


class NoPicture(AsyncflowError):
    """matplotlib is not installed; the message is one line."""


def _import_pyplot() -> Any:
    prepare_caches()
    try:
        import matplotlib as mpl  # noqa: PLC0415  slow, and not everybody has it
    except ImportError:
        raise NoPicture("no picture: matplotlib is not installed") from None
    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    return plt


def draw_profile(path: Path, legs: Mapping[Any, Leg], summary: Mapping[str, Any]) -> None:
    """Draw the lanes of one leg of each mode above bars of throughput.

    Args:
        path: PNG file.
        legs: Mode -> a leg, from top to bottom.
        summary: Of the profile, as `profile.json` holds it.

    Raises:
        NoPicture: matplotlib is not installed.
    """
    plt = _import_pyplot()
    heights = [1.2 * len(legs), 0.45 * len(legs) + 0.4]
    figure, (lanes, bars) = plt.subplots(
        2, 1, figsize=(11, sum(heights) + 2.2), height_ratios=heights, layout="constrained"
    )
    _draw_lanes(lanes, legs)
    _draw_bars(bars, summary)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_lanes(axes: Any, legs: Mapping[Any, Leg]) -> None:
    slowest_s = max(mean(leg.samples["period"]) for leg in legs.values())
    shown_s = min(NUM_PERIODS * slowest_s, *(leg.seconds for leg in legs.values()))
    ticks: list[tuple[float, str]] = []
    for number, (mode, leg) in enumerate(legs.items()):
        for place, lane in enumerate(LANES):
            row = -(number * (len(LANES) + 0.8) + place)
            ticks.append((row, f"{mode}: {lane}"))
            for name, (colour, _) in COLOURS.items():
                bars = [_clip(span, leg.start_s, shown_s) for span in leg.spans if _belongs(span, lane, name)]
                shown = [bar for bar in bars if bar[1] > 0]
                # Without snapping to pixels, bars narrower than one are faint instead of here and there.
                axes.broken_barh(shown, (row - 0.4, 0.8), color=colour, linewidth=0, snap=False)
    axes.set_yticks([row for row, _ in ticks], [label for _, label in ticks])
    axes.set_xlim(0, shown_s)
    axes.set_xlabel("seconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    patches = [axes.barh(0, 0, color=colour, label=meaning) for colour, meaning in COLOURS.values()]
    axes.legend(handles=patches, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=len(COLOURS), frameon=False)


def _belongs(span: Span, lane: str, name: str) -> bool:
    own = "simulators" if span.lane not in (COLLECTOR, TRAINER) else span.lane
    return own == lane and span.name == name


def _clip(span: Span, start_s: float, shown_s: float) -> tuple[float, float]:
    """Return where a bar begins within the picture and how long it is."""
    begin = max(0.0, span.start_s - start_s)
    return begin, min(shown_s, span.end_s - start_s) - begin


def _draw_bars(axes: Any, summary: Mapping[str, Any]) -> None:
    modes = summary["modes"]
    rates = [mode["decisions_per_s"] for mode in modes.values()]
    colours = ["#969696"] * (len(modes) - 1) + ["#08519c"]
    bars = axes.barh(range(len(modes)), rates, xerr=[m["decisions_per_s_std"] for m in modes.values()], color=colours)
    axes.set_yticks(range(len(modes)), list(modes))
    axes.invert_yaxis()
    axes.bar_label(bars, [f"{rate:.1f}" for rate in rates], label_type="center", color="white", weight="bold")
    for mode, stages, colour in (("standard", "two_stage", "black"), ("serial", "three_stage", "#e6550d")):
        for kind, style in (("ideal", "-"), ("contended", ":")):
            if mode in modes:
                ceiling = summary["ceilings"][kind][stages]
                label = f"{kind} ceiling, {ceiling:.2f} times {mode}"
                axes.axvline(modes[mode]["decisions_per_s"] * ceiling, color=colour, linestyle=style, label=label)
    reached = summary["speedup"]["standard"]
    axes.set_xlabel("fresh decisions per second")
    axes.set_title(
        f"vla is {reached['value']:.2f} times as fast as standard (95 % interval {describe_interval(reached)})",
        fontsize="medium",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=2, frameon=False)


def describe_interval(interval: Mapping[str, float | None]) -> str:
    """Return the ends of an interval; `-` where there is none."""
    low, high = interval["low"], interval["high"]
    return "-" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def draw_sweep(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw measured against predicted speed-up over Tt / Tc.

    Raises:
        NoPicture: matplotlib is not installed.
    """
    plt = _import_pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    ratios = [row["ratio"] for row in rows]
    axes.plot(ratios, [row["predicted"] for row in rows], color="black", label="predicted")
    axes.plot(ratios, [row["measured"] for row in rows], "o", color="#08519c", label="measured")
    axes.set_xscale("log")
    axes.set_xticks([row["wanted_ratio"] for row in rows], [f"{row['wanted_ratio']:g}" for row in rows], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("training over collecting, Tt / Tc")
    axes.set_ylabel("speed-up of vla over standard")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
