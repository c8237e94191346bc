"""The stress suite: everything that can go wrong is made to, seeded and counted; it writes docs/reliability.md.

    python -m tools.stress            all parts, minutes; exit code 1 if anything did not hold
    python -m tools.stress --part cuts --part disk    only these; no page

A run that is cut writes no page. One that fails writes a page that says so, and says so itself. Two lanes run side by
side, one per core: threads that wait for commands, or for a fresh process where the work is in Python itself.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tools.bench.common.report import REPOSITORY, isolated
from tools.stress.bare_python import make_bare_python
from tools.stress.cuts import Lane, draw_cuts, report_cuts, run_uncut
from tools.stress.disk import fill_disk
from tools.stress.faults import (
    bound_lag,
    check_nothing_is_left,
    crash_collector,
    delay,
    kill_workers,
    mix,
    poison,
    raise_in_simulators,
    stop_workers,
)
from tools.stress.process import shared_memory
from tools.stress.report import Row, page
from tools.stress.ring import race_through_ring
from tools.stress.weights import hunt_torn_weights

NUM_LEASES, NUM_ROLLOUTS, NUM_CUTS = 4_000, 100_000, 50
NUM_LANES = 2
PAGE = REPOSITORY / "docs" / "reliability.md"

Part = Callable[[Path, int], list[Row]]


def _weights(folder: Path, seed: int) -> list[Row]:
    return isolated(hunt_torn_weights, NUM_LEASES, seed)


def _ring(folder: Path, seed: int) -> list[Row]:
    return isolated(race_through_ring, NUM_ROLLOUTS, seed)


def _lag(folder: Path, seed: int) -> list[Row]:
    return bound_lag(folder, 20, seed)


def _workers(folder: Path, seed: int) -> list[Row]:
    return [
        kill_workers(folder, 12, seed),
        stop_workers(folder, 4, seed),
        raise_in_simulators(folder, 20, seed),
        mix(folder, 6, seed),
    ]


def _elsewhere(folder: Path, seed: int) -> list[Row]:
    """Repeat what befalls simulators under an interpreter that has numpy alone."""
    make_bare_python(folder)
    rows = [
        kill_workers(folder, 12, seed),
        stop_workers(folder, 4, seed),
        raise_in_simulators(folder, 20, seed),
        poison(folder, 60, seed),
    ]
    return [replace(row, injected=f"simulators under another interpreter: {row.injected}") for row in rows]


def _runs(folder: Path, seed: int) -> list[Row]:
    return [poison(folder, 60, seed), delay(folder, 30, seed), crash_collector(folder, [1, 20, 50], seed)]


def _disk(folder: Path, seed: int) -> list[Row]:
    return fill_disk(folder / "disk")


def _cuts(folder: Path, seed: int) -> list[Row]:
    uncut = folder / "uncut"
    start_s = run_uncut(uncut)
    lanes = [Lane(folder / f"lane_{index}", uncut, start_s) for index in range(NUM_LANES)]
    cuts = draw_cuts(NUM_CUTS, seed, start_s)
    with ThreadPoolExecutor(NUM_LANES) as pool:
        list(pool.map(Lane.cut_often, lanes, [cuts[index::NUM_LANES] for index in range(NUM_LANES)]))
    return report_cuts(lanes)


PARTS: dict[str, Part] = {
    "weights": _weights,
    "ring": _ring,
    "lag": _lag,
    "workers": _workers,
    "runs": _runs,
    "elsewhere": _elsewhere,
    "disk": _disk,
    "cuts": _cuts,
}
# Parts of a line run side by side, one after another within a lane.
STAGES = ((("weights", "ring", "disk"), ("lag",)), (("workers",), ("runs", "elsewhere")), (("cuts",),))


def run_parts(names: list[str], folder: Path, seed: int) -> list[Row]:
    """Run parts in their stages and return their rows in the order of `PARTS`; a part that breaks is a failed row."""
    found: dict[str, list[Row]] = {}

    def run_lane(lane: tuple[str, ...]) -> None:
        for name in lane:
            if name in names:
                found[name] = _run_part(name, folder / name, seed)

    before = shared_memory()
    for stage in STAGES:
        with ThreadPoolExecutor(NUM_LANES) as pool:
            list(pool.map(run_lane, stage))
    return [row for name in names for row in found[name]] + [check_nothing_is_left(before)]


def _run_part(name: str, folder: Path, seed: int) -> list[Row]:
    start = time.monotonic()
    folder.mkdir(parents=True)
    try:
        rows = PARTS[name](folder, seed)
    except Exception as error:  # a part that breaks is a failed one, and does not hide the others
        rows = [Row(name, 0, "-", "-", (f"the part broke: {type(error).__name__}: {error}",))]
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    for row in rows:
        print(f"  {row.to_markdown()}", flush=True)
    return rows


def main() -> int:
    """Run the parts that were asked for, write the page after all of them, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="run only this part and write no page")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is injected")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the page goes")
    arguments = parser.parse_args()
    names = [name for name in PARTS if name in (arguments.part or PARTS)]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="asyncflow_stress_") as folder:
        rows = run_parts(names, Path(folder), arguments.seed)
    num_failed = sum(bool(row.failures) for row in rows)
    if not arguments.part:
        page(rows, arguments.seed, (time.monotonic() - start) / 60).write(arguments.page)
        print(f"wrote {arguments.page.name}" + (f", WHICH SAYS THAT {num_failed} ROWS FAILED" if num_failed else ""))
    print(f"{len(rows) - num_failed} of {len(rows)} rows held, {time.monotonic() - start:.0f} s")
    return 1 if num_failed else 0
