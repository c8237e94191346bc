"""Train for an hour and watch whether anything grows: memory, threads, descriptors, `/dev/shm`, processes.

    python -m tools.soak --task toy --minutes 60 --out runs/soak
    python -m tools.soak --task lift --minutes 20 --out runs/soak
    python -m tools.soak --page

Owns the run under watch and its samples, read from `/proc`. It must not know what the samples mean: `soak_report` does.
Needs a quiet machine: `/dev/shm` belongs to all processes, and a page that several of them map counts as a share of it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from asyncflow.signals import EXIT_INTERRUPTED
from tools.bench.common.report import (
    REPOSITORY,
    conclude,
    describe_command,
    describe_machine,
    describe_software,
    set_aside,
)
from tools.soak import report as soak_report
from tools.soak.report import COLUMNS, Sample

PAGES = REPOSITORY / "docs" / "benchmarks"
SHARED_MEMORY = Path("/dev/shm")
STOP_TIMEOUT_S = 180.0  # an update, an evaluation's decision and a checkpoint
SETTLE_TIMEOUT_S = 30.0  # what a stranger has in /dev/shm may leave meanwhile, too
# Updates between checkpoints; Lift's divides the interval of its evaluations, whose best ones are saved as well.
SAVE_INTERVALS = {"toy": 100, "lift": 5}
# Step sizes are small: at those of the preset the Gaussian's std collapses after thousands of updates, long after the
# task is solved, and the run ends as diverged.
ARGUMENTS = {
    "toy": ["--task", "Toy", "trainer.eval_interval=0", "algorithm.learning_rate=1e-5"],
    "lift": ["--task", "Lift", "algorithm.lr_schedule=constant"],
}
ENDLESS = "trainer.total_updates=1000000000"


# What /proc says.


def session_processes(session: int) -> Iterator[Path]:
    """Yield the `/proc` folders of a session's processes; whoever starts processes cannot lose one by ending first."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == session:
            yield folder


def read_memory(folder: Path) -> tuple[int, int]:
    """Return resident and proportional bytes of a process; the resident ones twice where the kernel has no other."""
    rollup = folder / "smaps_rollup"
    lines = (rollup if rollup.exists() else folder / "status").read_text().splitlines()
    sizes = {line.partition(":")[0]: 1024 * int(line.split()[-2]) for line in lines if line.endswith(" kB")}
    resident = sizes["Rss"] if "Rss" in sizes else sizes["VmRSS"]
    return resident, sizes.get("Pss", resident)


def count_process(folder: Path) -> Sample:
    """Return memory, threads and descriptors of a process; zeros if it has ended."""
    try:
        resident, proportional = read_memory(folder)
        threads, descriptors = (len(os.listdir(folder / name)) for name in ("task", "fd"))
    except (OSError, KeyError):  # a zombie has neither memory nor descriptors
        return dict.fromkeys(("rss_bytes", "pss_bytes", "threads", "descriptors"), 0)
    return {"rss_bytes": resident, "pss_bytes": proportional, "threads": threads, "descriptors": descriptors}


def count_shared_memory() -> Sample:
    """Return the bytes in use in `/dev/shm`, files without a name included, and the number of names."""
    stat = os.statvfs(SHARED_MEMORY)
    used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize
    return {"shm_bytes": used, "shm_entries": len(os.listdir(SHARED_MEMORY))}


def take_sample(main: int, before: Sample) -> Sample:
    """Return one row: the main process, the sum of all others of its session, and what `/dev/shm` grew by."""
    counts = {int(folder.name): count_process(folder) for folder in session_processes(main)}
    row: Sample = {"processes": len(counts)}
    own = counts.pop(main, count_process(Path(f"/proc/{main}")))
    for name, value in own.items():
        row |= {f"main_{name}": value, f"workers_{name}": sum(each[name] for each in counts.values())}
    return row | {name: value - before[name] for name, value in count_shared_memory().items()}


# The run.


def start_run(options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Start the training as the leader of a session of its own; its output goes to a log."""
    set_aside(run_folder(options))  # what an earlier call left
    options.out.mkdir(parents=True, exist_ok=True)
    interval = f"trainer.save_interval={SAVE_INTERVALS[options.task]}"
    flags = ["--buffer-type", "vla", "--logger", "tensorboard", "--out", str(run_folder(options))]
    command = [sys.executable, "-m", "asyncflow", "train", *flags, *ARGUMENTS[options.task], ENDLESS, interval]
    with log_path(options).open("w") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def run_folder(options: argparse.Namespace) -> Path:
    """Return the folder of the run under watch."""
    return Path(options.out / options.task)


def log_path(options: argparse.Namespace) -> Path:
    """Return the file of what the run prints."""
    return Path(options.out / f"{options.task}.log")


def soak(options: argparse.Namespace) -> None:
    """Run, sample, stop, check, and copy the samples with what they were taken on to the data.

    Raises:
        SystemExit: The run ended by itself, did not end as asked, or left something behind.
    """
    samples, before = options.out / f"soak_{options.task}.csv", count_shared_memory()
    process = start_run(options)
    try:
        watch(process, options, samples, before)
        stop(process, options)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    left = wait_until_nothing_left(process.pid, before)
    options.data.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(samples, options.data / samples.name)
    facts = describe_run(options) | {"left": left}
    (options.data / f"soak_{options.task}.json").write_text(f"{json.dumps(facts, indent=2)}\n")
    print(f"{options.task}: {facts['updates']} updates, {facts['env_steps']} env steps")
    if left:
        raise SystemExit(f"{options.task}: left behind: {', '.join(left)}")


def watch(process: subprocess.Popen[bytes], options: argparse.Namespace, samples: Path, before: Sample) -> None:
    """Write a row every few seconds, at once, until the time is over.

    Raises:
        SystemExit: The run ended by itself.
    """
    start = time.perf_counter()
    with samples.open("w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        while (seconds := time.perf_counter() - start) < 60 * options.minutes:
            writer.writerow(take_sample(process.pid, before) | {"seconds": f"{seconds:.2f}"})
            try:
                process.wait(options.period)
            except subprocess.TimeoutExpired:
                continue
            fail(f"ended by itself after {seconds:.0f} s with exit code {process.returncode}", options)


def stop(process: subprocess.Popen[bytes], options: argparse.Namespace) -> None:
    """Send what Ctrl-C sends, to the whole group as a terminal does, and wait for the end.

    Raises:
        SystemExit: The run did not end, or not with the exit code of an interrupted one.
    """
    os.killpg(process.pid, signal.SIGINT)
    try:
        code = process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        fail(f"still running {STOP_TIMEOUT_S:.0f} s after SIGINT", options)
    if code != EXIT_INTERRUPTED:
        fail(f"ended with exit code {code} after SIGINT, expected {EXIT_INTERRUPTED}", options)


def fail(what: str, options: argparse.Namespace) -> NoReturn:
    """End with the last lines of the run's log.

    Raises:
        SystemExit: Always.
    """
    raise SystemExit(f"{options.task}: {what}; {log_path(options)} ends:\n{log_path(options).read_text()[-4000:]}")


def wait_until_nothing_left(session: int, before: Sample) -> list[str]:
    """Return what is left of the run a moment after its end, when its last helper processes have gone as well."""
    end = time.perf_counter() + SETTLE_TIMEOUT_S
    while (left := find_left(session, before)) and time.perf_counter() < end:
        time.sleep(0.2)
    return left


def find_left(session: int, before: Sample) -> list[str]:
    """Return what is left of a session, and what there is more of in `/dev/shm`."""
    left = [f"process {folder.name}" for folder in session_processes(session)]
    grown = {name: value - before[name] for name, value in count_shared_memory().items()}
    return left + [f"{name} {value:+}" for name, value in grown.items() if value > 0]


def describe_run(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the run did, and the setting that the page has to name.

    Raises:
        SystemExit: It did nothing.
    """
    rows = (run_folder(options) / "metrics.jsonl").read_text().splitlines()
    if not rows:
        fail("finished no update", options)
    row, interval = json.loads(rows[-1]), SAVE_INTERVALS[options.task]
    updates = row["updates"]
    last = (run_folder(options) / "checkpoints" / "last").resolve().name
    return {
        "minutes": options.minutes,
        "updates": updates,
        "env_steps": row["env_steps"],
        "worker_restarts": int(row["health/worker_restarts"]),
        "save_interval": interval,
        "checkpoints": -(-updates // interval),  # one more at the end, unless one was due then
        "last_checkpoint": last,
        "command": describe_command(),
        "machine": describe_machine(),
        "software": describe_software(),
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", choices=ARGUMENTS, help="what to train; then the samples are copied to the data")
    what.add_argument("--page", action="store_true", help="write soak.md and soak.png from the data")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long")
    parser.add_argument("--period", type=float, default=5.0, help="seconds between samples")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="folder of the run folders, logs, samples")
    parser.add_argument("--data", type=Path, default=PAGES / "data", help="folder of the tables")
    parser.add_argument("--pages", type=Path, default=PAGES, help="folder of the page and the picture")
    parser.add_argument("--warmup", type=float, default=5.0, help="minutes at the start that no slope is taken of")
    return parser.parse_args()


def main() -> int:
    """Soak, or write the page and say whether anything grows."""
    options = parse_arguments()
    if options.page:
        return conclude(soak_report.write_page(options.data, options.pages, options.warmup, list(ARGUMENTS)))
    soak(options)
    return 0
