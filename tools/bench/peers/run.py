"""Compare asyncflow with stable-baselines3, rsl_rl, CleanRL's shape and TorchRL, and write `docs/benchmarks/peers.md`.

    python -m tools.bench.peers                 # everything, on a quiet machine; eight minutes
    python -m tools.bench.peers --only update

The peers live in `.venv-peers`, which the first call makes and a second leaves as it is. Every claim is a ratio within
one run; what is compared takes turns. The page is written when both parts ran, or to the file that `--out` names. A
missed target exits with 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.bench.common.report import REPOSITORY, Part, finish, to_markdown
from tools.bench.peers.setup import describe_peers, enter_environment

PAGE = REPOSITORY / "docs" / "benchmarks" / "peers.md"
PARTS = ("update", "end-to-end")


def measure(options: argparse.Namespace) -> list[Part]:
    """Run the parts asked for."""
    from tools.bench.peers.end_to_end import bench_end_to_end  # noqa: PLC0415  exists in the environment of the peers alone
    from tools.bench.peers.update import bench_update  # noqa: PLC0415

    benches = {"update": bench_update, "end-to-end": bench_end_to_end}
    return [benches[name](options) for name in options.only]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--turns", type=int, default=6, help="update: turns of the large rollout; five times the small")
    parser.add_argument("--repeats", type=int, default=2, help="end-to-end: runs of each contender")
    parser.add_argument("--updates", type=int, default=4, help="end-to-end: updates measured in a run")
    parser.add_argument("--rollout", type=int, default=480, help="end-to-end: decisions of a rollout")
    parser.add_argument("--out", type=Path, help="page to write")
    return parser.parse_args()


def main() -> int:
    """Measure, print, write, and say which targets were missed."""
    options = parse_arguments()
    enter_environment()
    parts = measure(options)
    page = to_markdown("Beside other libraries", parts, f"- Peers: {describe_peers()}\n")
    return finish(page, parts, options.out or (PAGE if set(options.only) == set(PARTS) else None))
