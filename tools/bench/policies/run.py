"""Measure what policies cost, and what overlap gives with them; write `docs/benchmarks/policies.md`.

    python -m tools.bench.policies                        # everything, on a quiet machine; an hour on a processor
    python -m tools.bench.policies --part frozen_base     # parts, each on its own
    python -m tools.bench.policies --page                 # the page again, from what is there

Parts: `profile_*` runs both modes with a policy on Lift, `inference_*` times its decisions, `frozen_*` updates of a VLA
whose backbone is trained, run again, or not run at all. Runs with `base` need a GPU.

A finished part leaves a JSON among the page's data, and is skipped by the next call; remove the file to measure it
anew. A missed target exits with 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from tools.bench.common.records import Place, choose_place, measure, read_records
from tools.bench.common.report import conclude
from tools.bench.policies.page import write_page
from tools.bench.policies.parts import PARTS
from tools.bench.policies.settings import CPU, NAME, Settings, choose_settings


def choose_parts(asked: Sequence[str] | None, settings: Settings) -> list[str]:
    """Return what is asked for, in the order of measuring; without a question, all that this device can.

    Raises:
        SystemExit: Something is asked for that needs a GPU, and there is none.
    """
    possible = [part for part in PARTS if settings.can_measure(part)]
    for part in asked or []:
        if part not in possible:
            raise SystemExit(f"--part {part}: needs a GPU; without one there are {', '.join(possible)}")
    return [part for part in possible if asked is None or part in asked]


def report(place: Place, settings: Settings) -> int:
    """Write the page of all parts that are finished and return the exit code."""
    records = read_records(place, PARTS)
    if not records:
        raise SystemExit(f"{place.data} holds no {NAME}_*.json; call without --page first")
    missing = [part for part in choose_parts(None, settings) if part not in records]
    return conclude(write_page(place, records), missing)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, help="what to measure; everything if not given")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--out", type=Path, default=Path("runs/policies"), help="folder of profiles")
    parser.add_argument(
        "--quick", action="store_true", help="toys instead of Lift, to try the tool; the page goes to OUT/pages"
    )
    return parser.parse_args()


def main() -> int:
    """Measure, write, and say which targets were missed."""
    options = parse_arguments()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else CPU
    settings, place = choose_settings(device, options.quick), choose_place(NAME, options.out, options.quick)
    parts = choose_parts(options.part, settings)
    if not options.page:
        measure({part: PARTS[part] for part in parts}, settings, place)
    return report(place, settings)
