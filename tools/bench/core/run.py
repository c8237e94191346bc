"""Measure what the core costs: its workers beside bare simulators, a row of the ring; write `docs/benchmarks/core.md`.

    python -m tools.bench.core                  # everything, on a quiet machine; three minutes
    python -m tools.bench.core --part ring      # parts, each on its own
    python -m tools.bench.core --page           # the page again, from what is there

Every claim is a ratio or a count within one run, so that the speed of the machine cancels; what is compared takes turns
(A B B A), so that its drift cancels too. Overlap is measured by `tools.bench.overlap`, growth by `tools.soak`.

A finished part leaves a JSON among the page's data, and is skipped by the next call; remove the file to measure it
anew. `--out FOLDER` keeps page and data of its own, for a look at another machine. A missed target exits with 1.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tools.bench.common.parts import FindingParts
from tools.bench.common.records import choose_place
from tools.bench.core.processes import bench_processes
from tools.bench.core.ring import bench_ring
from tools.bench.core.settings import Settings
from tools.bench.core.workers import bench_workers

CORE = FindingParts("core", "The core", {"workers": bench_workers, "processes": bench_processes, "ring": bench_ring})


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=CORE.parts, default=list(CORE.parts), help="what to measure")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--out", type=Path, help="folder for page and data, instead of the documentation's")
    parser.add_argument("--repeats", type=int, default=Settings.repeats, help="workers: pairs of turns")
    parser.add_argument("--block-s", type=float, default=Settings.block_s, help="workers: seconds of a turn")
    parser.add_argument("--num-writes", type=int, default=Settings.num_writes, help="ring: rows written")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    return parser.parse_args()


def main() -> int:
    """Measure, write, and say which targets were missed."""
    options = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = "1"
    settings = Settings(
        num_writes=options.num_writes, repeats=options.repeats, block_s=options.block_s, seed=options.seed
    )
    place = choose_place(CORE.name, options.out or Path(), options.out is not None)
    return CORE.run([] if options.page else options.part, settings, place)
