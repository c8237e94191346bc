"""Report a profile: tables on the terminal, `profile.json`, CSV, a trace and a picture.

Every table is made from the numbers of `profile.json`.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from asyncflow.config.sections import Config
from asyncflow.metrics.console import ConsoleReporter, format_bytes
from asyncflow.metrics.tracing import write_processes
from asyncflow.profile.measure import Profile, ProfileOptions, SweepPoint, measure_profile, prepare, sweep
from asyncflow.profile.model import mean, spread
from asyncflow.profile.picture import NoPicture, describe_interval, draw_profile, draw_sweep
from asyncflow.profile.read import Leg, Mode, pool
from asyncflow.run.folder import describe_versions

# Sample -> what the table calls it.
STAGES = {
    "chunk": "Te, simulators, a chunk",
    "inference": "Ti, policy, a decision call",
    "trainer": "Tt, trainer, an update in all",
    "env": "simulators, a rollout",
    "policy": "policy, a rollout",
    "collect": "Tc, collect, a rollout",
    "update": "update",
    "publish": "publish",
    "wait_data": "trainer waits for data",
    "wait_slot": "collector waits for a slot",
}


def report_profile(config: Config, options: ProfileOptions, out: str | None, console: ConsoleReporter) -> None:
    """Measure, write all files and show the tables.

    Raises:
        ConfigError: As `prepare`.
    """
    folder = prepare(config, options, out)
    if options.is_sweep:
        write_sweep(folder, list(sweep(config, options, console.notice)), console)
    else:
        write_profile(folder, measure_profile(config, options, console.notice), console)


def summarise(profile: Profile) -> dict[str, Any]:
    """Return all figures of a profile, as `profile.json` holds them."""
    return {
        "config": profile.config.model_dump(),
        "options": asdict(profile.options),
        "versions": describe_versions(),
        "num_cores": len(os.sched_getaffinity(0)),
        "num_env_groups": profile.num_env_groups,
        "window": profile.blocks[0].legs[0].window._asdict(),
        "modes": {mode: _summarise_mode(profile.legs(mode)) for mode in profile.modes},
        "alone": asdict(profile.alone),
        "at_work": asdict(profile.at_work),
        "ceilings": {"ideal": asdict(profile.ideal), "contended": asdict(profile.contended)},
        "speedup": {mode: asdict(profile.speedup(mode)) for mode in profile.modes if mode != "vla"},
        "reached": _shares_of_ceilings(profile),
        "predicted": profile.predicted,
        "interval": f"95 %, Student's t on the log ratios of {len(profile.blocks)} blocks standard-vla-vla-standard",
        "tracing_share": profile.tracing_share,
        "advice": profile.advice,
        "legs": [_summarise_leg(block, leg) for block, each in enumerate(profile.blocks) for leg in each.legs],
    }


def _shares_of_ceilings(profile: Profile) -> dict[str, dict[str, float]]:
    """Return, by the mode that vla is compared with, which part of each ceiling was reached."""
    compared = {"standard": "two_stage", "serial": "three_stage"}
    limits = {"ideal": profile.ideal, "contended": profile.contended}
    return {
        mode: {kind: profile.speedup(mode).value / getattr(limit, stages) for kind, limit in limits.items()}
        for mode, stages in compared.items()
        if mode in profile.modes
    }


def _summarise_mode(legs: Sequence[Leg]) -> dict[str, Any]:
    rates = [1 / leg.decision_s for leg in legs]
    lags: Counter[int] = sum((Counter(leg.lags) for leg in legs), Counter())
    return {
        "decisions_per_s": mean(rates),
        "decisions_per_s_std": spread(rates),
        "stages": {name: _summarise_samples(pool(legs, name)) for name in (*STAGES, "period")},
        "bubbles": {name: mean([leg.bubbles[name] for leg in legs]) for name in legs[0].bubbles},
        "decisions": {name: sum(leg.counts[name] for leg in legs) for name in legs[0].counts},
        "lags": {str(lag): count for lag, count in sorted(lags.items())},
        "memory": {name: max(asdict(leg.memory)[name] for leg in legs) for name in asdict(legs[0].memory)},
    }


def _summarise_samples(samples: Sequence[float]) -> dict[str, float]:
    return {"mean_s": mean(samples), "std_s": spread(samples), "num": len(samples)}


def _summarise_leg(block: int, leg: Leg) -> dict[str, Any]:
    """Return a leg's row of the CSV."""
    stages = {f"{name}_s": mean(leg.samples[name]) for name in STAGES}
    figures = {"seconds": leg.seconds, "decisions_per_s": 1 / leg.decision_s, **stages}
    bubbles = {f"{name}_bubble": share for name, share in leg.bubbles.items()}
    return {"block": block, "mode": leg.mode} | figures | bubbles | leg.counts | asdict(leg.memory)


def write_profile(folder: Path, profile: Profile, console: ConsoleReporter) -> None:
    """Write all files of a profile and show its tables."""
    summary = summarise(profile)
    (folder / "profile.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _write_csv(folder / "profile.csv", summary["legs"])
    typical: dict[Mode, Leg] = {mode: median_leg(profile.legs(mode)) for mode in profile.modes}
    write_processes(folder / "trace.json", {mode: leg.spans for mode, leg in typical.items()})
    show(summary, console)
    try:
        draw_profile(folder / "profile.png", typical, summary)
    except NoPicture as error:
        console.notice(str(error))
    console.notice(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def median_leg(legs: Sequence[Leg]) -> Leg:
    """Return the leg of median speed, the slower one of two: a picture of a disturbed one would mislead."""
    return sorted(legs, key=lambda leg: leg.decision_s)[len(legs) // 2]


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# On the terminal.


def show(summary: dict[str, Any], console: ConsoleReporter) -> None:
    """Show a profile: stages, runs, and what overlap gave."""
    console.table(["seconds", *_stage_columns(summary)], _stage_rows(summary))
    console.table(["in the measured windows", *summary["modes"]], _mode_rows(summary["modes"]))
    console.table(["speed-up of vla", "reached", "95 % interval", "ideal", "contended"], _speedup_rows(summary))
    console.notice(
        f"keeping spans took about {100 * summary['tracing_share']:.2f} % of the vla legs, writing them not counted"
    )
    console.notice(f"advice: {summary['advice']}")


def _stage_columns(summary: dict[str, Any]) -> list[str]:
    if summary["num_env_groups"] == 1:
        return ["alone (standard)", "while the others run (vla)", "slower by"]
    return ["alone (serial)", f"{summary['num_env_groups']} groups (standard)", "all at once (vla)", "slower by"]


def _stage_rows(summary: dict[str, Any]) -> Iterator[list[str]]:
    modes = summary["modes"]
    for name, label in STAGES.items():
        cells = [_with_spread(modes[mode]["stages"][name]) for mode in modes]
        alone, at_work = (modes[mode]["stages"][name]["mean_s"] for mode in ("standard", "vla"))
        is_wait = name.startswith("wait")
        yield [label, *cells, "" if is_wait or not alone else f"{100 * (at_work / alone - 1):+.0f} %"]


def _with_spread(stage: dict[str, float]) -> str:
    return f"{stage['mean_s']:.4f} ± {stage['std_s']:.4f}" if stage["num"] else "-"


def _mode_rows(modes: dict[str, Any]) -> Iterator[list[str]]:
    def row(label: str, key: str, name: str, shown: str = "{}") -> list[str]:
        return [label, *(shown.format(mode[key][name]) for mode in modes.values())]

    yield ["decisions/s", *(f"{m['decisions_per_s']:.1f} ± {m['decisions_per_s_std']:.1f}" for m in modes.values())]
    for name in ("trainer", "collector", "simulators"):
        yield [f"bubbles, {name}", *(f"{100 * mode['bubbles'][name]:.1f} %" for mode in modes.values())]
    yield ["policy lag: updates", *(_describe_lags(mode["lags"]) for mode in modes.values())]
    for name in ("fresh", "reused", "dropped"):
        yield row(f"{name} decisions", "decisions", name)
    for name in ("process", "workers", "gpu"):
        yield [f"peak memory, {name}", *(format_bytes(mode["memory"][f"{name}_bytes"]) for mode in modes.values())]


def _describe_lags(lags: dict[str, int]) -> str:
    return ", ".join(f"{lag}: {count}" for lag, count in lags.items())


def _speedup_rows(summary: dict[str, Any]) -> Iterator[list[str]]:
    """Yield one row for each pair of runs that are compared, with the share of each ceiling that was reached."""
    kinds = {
        "standard": ("over standard, two stages", "two_stage"),
        "serial": ("over serial, three stages", "three_stage"),
    }
    for mode, interval in summary["speedup"].items():
        label, ceiling = kinds[mode]
        reached = summary["reached"][mode]
        shares = [f"{summary['ceilings'][kind][ceiling]:.3f} ({100 * reached[kind]:.1f} % reached)" for kind in reached]
        yield [label, f"{interval['value']:.3f}", describe_interval(interval), *shares]
    if "serial" not in summary["speedup"]:
        limits = [f"{summary['ceilings'][kind]['three_stage']:.3f}" for kind in ("ideal", "contended")]
        yield ["three stages, with groups", "-", "-", *limits]
    yield ["model of the ring", f"{summary['predicted']:.3f}", "-", "-", "-"]


# Sweeps.


def summarise_point(point: SweepPoint) -> dict[str, Any]:
    """Return a sweep's row of the CSV."""
    profile, reached = point.profile, point.profile.speedup()
    return {
        "wanted_ratio": point.wanted,
        "ratio": point.ratio,
        "collect_s": profile.alone.collect_s,
        "trainer_s": profile.alone.update_s,
        "ceiling": profile.ideal.two_stage,
        "predicted": profile.predicted,
        "measured": reached.value,
        "interval": describe_interval(asdict(reached)),
        "error": reached.value / profile.predicted - 1,
    }


def write_sweep(folder: Path, points: Sequence[SweepPoint], console: ConsoleReporter) -> None:
    """Write all files of a sweep and show its table."""
    rows = [summarise_point(point) for point in points]
    first = points[0].profile
    summary = {"config": first.config.model_dump(), "versions": describe_versions(), "sweep": rows}
    (folder / "profile.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _write_csv(folder / "profile.csv", rows)
    columns = ["Tt / Tc", "as measured", "ceiling", "predicted", "measured", "error"]
    console.table(columns, [_sweep_cells(row) for row in rows])
    try:
        draw_sweep(folder / "profile.png", rows)
    except NoPicture as error:
        console.notice(str(error))
    console.notice(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def _sweep_cells(row: dict[str, Any]) -> list[str]:
    figures = [f"{row[name]:.3f}" for name in ("ratio", "ceiling", "predicted", "measured")]
    return [f"{row['wanted_ratio']:g}", *figures, f"{100 * row['error']:+.1f} %"]
