"""Train the preset `toy_language` on several seeds, told the goal and not, and write docs/benchmarks/language.md.

    python -m tools.bench.language --out runs/language     # trains what is not finished, then writes the page
    python -m tools.bench.language --page                  # writes the page alone

Every run evaluates itself, without exploration and on start states that training never sees. What it found is copied to
the data, a file a run, from which the page is made. The seeds are others than those that the preset was tuned on. It
measures learning and no seconds, so that neither runs side by side nor other work on the machine change anything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tools.bench.common.report import (
    REPOSITORY,
    conclude,
    describe_command,
    describe_machine,
    describe_software,
    set_aside,
)
from tools.bench.language.page import CONDITIONS, PAGES, judge, write_page

DATA = PAGES / "data" / "language"
ALWAYS = ("trainer.eval_episodes=200", "trainer.save_interval=100")


def train(folder: Path, condition: str, seed: int) -> dict[str, Any]:
    """Train one run in a process of its own, unless it is finished; return its record.

    Raises:
        SystemExit: The run failed.
    """
    arguments = ["--config", "toy_language", "--seed", str(seed), *ALWAYS, *CONDITIONS[condition]]
    marker = folder / "finished.json"
    if not marker.exists():
        set_aside(folder)  # what an interrupted call left
        command = [sys.executable, "-m", "asyncflow", "train", "--out", str(folder), "--logger", "none", *arguments]
        log = folder.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, stdout=output, stderr=output, check=False)
        if done.returncode:
            raise SystemExit(f"{folder.name} ended with exit code {done.returncode}:\n{log.read_text()[-2000:]}")
        marker.write_text(json.dumps({"arguments": arguments, "software": describe_software()}))
    found = json.loads(marker.read_text())
    if found["arguments"] != arguments:
        raise SystemExit(f"{folder} was trained with {' '.join(found['arguments'])}; choose another --out")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "condition": condition,
        "seed": seed,
        "command": f"asyncflow train {' '.join(arguments)}",
        "machine": describe_machine(),
        "software": found["software"],
        "curve": [_point(row) for row in rows if "eval/success_rate" in row],
    }


def keep(record: dict[str, Any]) -> None:
    """Write a run's record to the data, and print its success."""
    name = f"{record['condition']}_seed{record['seed']}"
    (DATA / f"{name}.json").write_text(json.dumps(record | {"tool": describe_command()}, indent=1) + "\n")
    print(f"{name}: {100 * record['curve'][-1]['success_rate']:.1f} %", flush=True)


def _point(row: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation: of all tasks together, and of each."""
    names = {"success_rate": "eval/success_rate", "episode_length": "eval/episode_length"}
    tasks = {
        name.removeprefix("eval/success_rate/"): x for name, x in row.items() if name.startswith("eval/success_rate/")
    }
    return {
        "updates": row["updates"],
        "env_steps": row["env_steps"],
        **{k: row[v] for k, v in names.items()},
        "tasks": tasks,
    }


def main() -> int:
    """Train what is missing and write the page; 1 if a finding is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "language", help="folder of the run folders")
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12])
    parser.add_argument("--side-by-side", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--page", action="store_true", help="write the page alone")
    options = parser.parse_args()
    DATA.mkdir(parents=True, exist_ok=True)
    wanted = [] if options.page else itertools.product(options.conditions, options.seeds)
    with ThreadPoolExecutor(options.side_by_side) as pool:
        runs = [pool.submit(train, options.out / f"{name}_seed{seed}", name, seed) for name, seed in wanted]
        for done in as_completed(runs):
            keep(done.result())
    records = [json.loads(path.read_text()) for path in sorted(DATA.glob("*.json"))]
    write_page(records)
    return conclude(judge(records))
