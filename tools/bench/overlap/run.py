"""Measure what overlap gives, and what the profiler says of it; write `docs/benchmarks/overlap.md` and its pictures.

    python -m tools.bench.overlap                       # everything, on a quiet machine; an hour
    python -m tools.bench.overlap --part overhead_toy   # parts, each on its own
    python -m tools.bench.overlap --part evaluate       # any time, any machine: nothing of it is timed
    python -m tools.bench.overlap --page                # the page again, from what is there

A finished part leaves a JSON among the page's data, and is skipped by the next call; remove the file to measure it
anew. A missed target exits with 1.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from tools.bench.common.records import MeasurePart, Place, choose_place, measure, read_records
from tools.bench.common.report import conclude
from tools.bench.overlap.overhead import measure_overhead
from tools.bench.overlap.page import write_page
from tools.bench.overlap.profiles import (
    measure_balance,
    profile_lift,
    profile_sweep,
    profile_three_stages,
    profile_two_stages,
)
from tools.bench.overlap.settings import FULL, NAME, TINY
from tools.bench.overlap.training import evaluate_ends, evaluate_lift, train_lift

PARTS: dict[str, MeasurePart] = {  # in the order in which they are measured
    "balance": measure_balance,
    "two_stages": profile_two_stages,
    "three_stages": profile_three_stages,
    "sweep": profile_sweep,
    "overhead_toy": partial(measure_overhead, "Toy"),
    "overhead_lift": partial(measure_overhead, "Lift"),
    "lift": profile_lift,
    "train": train_lift,
    "evaluate": evaluate_lift,
    "evaluate_fine": evaluate_ends,
}
NEEDS = {
    "two_stages": ["balance"], "lift": ["balance"], "train": ["balance"], "evaluate": ["balance", "train"],
    "evaluate_fine": ["balance", "train", "evaluate"],
}  # fmt: skip


def with_needs(asked: list[str]) -> list[str]:
    """Return what is asked for and what that needs, in the order of measuring."""
    wanted = {*asked, *(need for part in asked for need in NEEDS.get(part, []))}
    return [part for part in PARTS if part in wanted]


def report(place: Place) -> int:
    """Write the page of all parts that are finished and return the exit code."""
    records = read_records(place, list(PARTS))
    if not records:
        raise SystemExit(f"{place.data} holds no overlap_*.json; call without --page first")
    findings = write_page(place, records)
    return conclude(findings, [part for part in PARTS if part not in records])


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--out", type=Path, default=Path("runs/overlap"), help="folder of run folders and profiles")
    parser.add_argument("--override", nargs="*", default=[], metavar="KEY=VALUE", help="for every run of Lift")
    parser.add_argument("--curve-episodes", type=int, help="episodes of a checkpoint before the last one")
    parser.add_argument(
        "--quick", action="store_true", help="tiny everything, to try the tool; the page goes to OUT/pages"
    )
    return parser.parse_args()


def main() -> int:
    """Measure, write, and say which targets were missed."""
    options = parse_arguments()
    settings, place = TINY if options.quick else FULL, choose_place(NAME, options.out, options.quick)
    settings = replace(
        settings,
        lift_overrides=(*settings.lift_overrides, *options.override),
        curve_episodes=options.curve_episodes or settings.curve_episodes,
    )
    if not options.page:
        measure({part: PARTS[part] for part in with_needs(options.part)}, settings, place)
    return report(place)
