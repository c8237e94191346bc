"""Train both libraries on every task and seed, judge them by the same episodes, and write docs/benchmarks/gym.md.

    python -m tools.bench.gym --seeds 5      # needs a network once: it installs stable-baselines3
    python -m tools.bench.gym --page-only    # writes the page from what is there

stable-baselines3 runs in `.venv-peers`, the environment of `tools.bench.peers`, which is installed where it is missing.
Seeds that are finished are skipped: each leaves a JSON file, which counts while its settings are those of `setting`.
Returns do not depend on how fast the machine is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tools.bench.common.report import REPOSITORY, conclude, describe_command, describe_machine, describe_software
from tools.bench.gym.page import LEARNERS, SB3, collect, judge, write_page
from tools.bench.gym.setting import STD, TASKS
from tools.bench.peers.setup import PYTHON, install

PAGE = REPOSITORY / "docs" / "benchmarks" / "gym.md"
DATA = PAGE.parent / "data" / "gym"


def record_of(task: str, learner: str, seed: int) -> Path:
    """Return the file that a finished seed leaves."""
    return DATA / f"{task}_{learner.replace(' ', '_')}_seed{seed}.json"


def is_finished(task: str, learner: str, seed: int) -> bool:
    """Return whether a seed was trained with today's settings."""
    path = record_of(task, learner, seed)
    record = json.loads(path.read_text()) if path.exists() else {}
    return record.get("setting") == asdict(TASKS[task]) and record.get("std") == STD


def newest_commit() -> str:
    """Return the newest commit that changed the package, which is what is measured."""
    words = ["git", "-C", str(REPOSITORY), "log", "-1", "--format=%H", "--", "asyncflow", "configs"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def measure(task: str, learner: str, seeds: Sequence[int], out: Path) -> None:
    """Train and judge the seeds of one learner that are missing, in one process of its own environment."""
    missing = [seed for seed in seeds if not is_finished(task, learner, seed)]
    if not missing:
        return
    folder = out / f"{task}_{learner.replace(' ', '_')}"
    folder.mkdir(parents=True, exist_ok=True)
    if learner == SB3:
        install()
        words = [str(PYTHON), "-m", "tools.bench.gym.sb3"]
    else:
        words = [sys.executable, "-m", "tools.bench.gym.own", "--mode", learner.split()[1]]
    words += [task, *map(str, missing), "--out", str(folder.resolve())]
    subprocess.run(words, check=True, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"})
    DATA.mkdir(parents=True, exist_ok=True)
    software = describe_software() | {"commit": newest_commit()}
    for seed in missing:
        result = json.loads((folder / f"{seed}.json").read_text())
        record = {"task": task, "learner": learner, "seed": seed}
        record |= {"setting": asdict(TASKS[task]), "std": STD}
        record |= {"machine": describe_machine(), "software": software, "command": describe_command()}
        record |= {"peers": result.pop("peers", {}), "result": result}
        record_of(task, learner, seed).write_text(json.dumps(record, indent=1) + "\n")


def main() -> int:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--learners", nargs="+", choices=LEARNERS, default=list(LEARNERS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/gym"), help="run folders, which may be thrown away")
    parser.add_argument("--page-only", action="store_true")
    options = parser.parse_args()
    for task in options.tasks if not options.page_only else ():
        for learner in options.learners:
            measure(task, learner, range(options.seeds), options.out)
    records = [json.loads(path.read_text()) for path in sorted(DATA.glob("*.json"))]
    PAGE.write_text(write_page(records))
    return conclude(judge(collect(records)))


if __name__ == "__main__":
    sys.exit(main())
