"""What simulators' processes hold and how long they take to start; a part of `tools.bench.core`."""

from __future__ import annotations

import re
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from asyncflow.config.sections import EnvConfig
from asyncflow.envs import make_vec_env
from asyncflow.envs.server import running_servers, running_workers
from tools.bench.common.report import REPORTED, Finding, Part, isolated
from tools.bench.core.settings import Settings

NUM_WORKERS, PER_WORKER = 2, (1, 8)
MIB = 2**20

NOTE = (
    "Processes: Lift, {num_workers} workers. Memory is the proportional set size: a page that n processes map counts a "
    "1/n to each. A first set of environments starts the server, which imports the simulator's packages; a second one "
    "in the same program forks from it."
)


class Processes(NamedTuple):
    """One measurement.

    Attributes:
        first_s: Seconds to build the first environments of a program.
        again_s: Seconds to build as many a second time.
        server_mib: What the server holds.
        worker_mib: What a worker holds, on average.
    """

    first_s: float
    again_s: float
    server_mib: float
    worker_mib: float


def measure_processes(num_envs: int, seed: int) -> Processes:
    """Build environments twice, and look at the processes."""
    config, seconds = EnvConfig(task="Lift", num_workers=NUM_WORKERS), []
    for _ in range(2):
        start = time.perf_counter()
        env = make_vec_env(config, 4, num_envs, seed)
        seconds.append(time.perf_counter() - start)
        (server,) = map(proportional_mib, running_servers())
        workers = statistics.mean(map(proportional_mib, running_workers()))
        env.close()
    return Processes(seconds[0], seconds[1], server, workers)


def proportional_mib(process: int) -> float:
    """Return the proportional set size of a process, MiB."""
    found = re.search(r"^Pss:\s*(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 / MIB if found else 0.0


def bench_processes(settings: Settings) -> Part:
    """Measure with one simulator a worker, and with more."""
    few, many = (isolated(measure_processes, NUM_WORKERS * each, settings.seed) for each in PER_WORKER)
    per_simulator = (many.worker_mib - few.worker_mib) / (PER_WORKER[1] - PER_WORKER[0])
    figures = {
        "MiB of a worker before its first simulator": few.worker_mib - per_simulator,
        "MiB of each simulator": per_simulator,
        "MiB of the server": many.server_mib,
        f"seconds to build {NUM_WORKERS} environments, the first of a program": few.first_s,
        f"seconds to build {NUM_WORKERS} environments once more": few.again_s,
        f"seconds to build {NUM_WORKERS * PER_WORKER[1]} environments, the first of a program": many.first_s,
    }
    findings = [Finding(what, f"{value:.1f}", REPORTED, True) for what, value in figures.items()]
    return Part(findings, [NOTE.format(num_workers=NUM_WORKERS)])
