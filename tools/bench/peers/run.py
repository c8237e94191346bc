"""Compare asyncflow with stable-baselines3, rsl_rl, CleanRL's shape and TorchRL, and write `docs/benchmarks/peers.md`.

    python -m tools.bench.peers                 # everything, on a quiet machine; eight minutes
    python -m tools.bench.peers --part update   # parts, each on its own
    python -m tools.bench.peers --page          # the page again, from what is there

The peers live in `.venv-peers`, which the first call makes and a second leaves as it is. Every claim is a ratio within
one run; what is compared takes turns. A finished part leaves a JSON among the page's data, and is skipped by the next
call; remove the file to measure it anew. `--out FOLDER` keeps page and data of its own, for a look at another machine.
A missed target exits with 1.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from tools.bench.common.parts import FindingParts
from tools.bench.common.records import choose_place
from tools.bench.common.report import Part
from tools.bench.peers.settings import Settings
from tools.bench.peers.setup import describe_peers, enter_environment


def _update(settings: Settings) -> Part:
    from tools.bench.peers.update import bench_update  # noqa: PLC0415  exists in the environment of the peers alone

    return bench_update(settings)


def _end_to_end(settings: Settings) -> Part:
    from tools.bench.peers.end_to_end import bench_end_to_end  # noqa: PLC0415

    return replace(bench_end_to_end(settings), setting=[f"Peers: {describe_peers()}"])


PEERS = FindingParts("peers", "Beside other libraries", {"update": _update, "end_to_end": _end_to_end})


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PEERS.parts, default=list(PEERS.parts), help="what to measure")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--out", type=Path, help="folder for page and data, instead of the documentation's")
    parser.add_argument(
        "--turns", type=int, default=Settings.turns, help="update: turns of the large rollout; five times the small"
    )
    parser.add_argument("--repeats", type=int, default=Settings.repeats, help="end_to_end: runs of each contender")
    parser.add_argument("--updates", type=int, default=Settings.updates, help="end_to_end: updates measured in a run")
    parser.add_argument("--rollout", type=int, default=Settings.rollout, help="end_to_end: decisions of a rollout")
    return parser.parse_args()


def main() -> int:
    """Measure, write, and say which targets were missed."""
    options = parse_arguments()
    if not options.page:
        enter_environment()
    settings = Settings(options.turns, options.repeats, options.updates, options.rollout)
    place = choose_place(PEERS.name, options.out or Path(), options.out is not None)
    return PEERS.run([] if options.page else options.part, settings, place)
