"""Measure what the core costs and what asynchrony gains, and write `docs/benchmarks/core.md`.

    python -m tools.bench.core                                  # everything, on a quiet machine
    python -m tools.bench.core --only growth overlap --task Toy

Every claim is a ratio or a count within one run, so that the speed of the machine cancels; what is compared takes turns
(A B B A), so that its drift cancels too. Every measurement has a process of its own. A missed target exits with 1.
The page is written when all four parts ran on every task, or to the file that `--out` names.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asyncflow.config.presets import load_config
from asyncflow.config.sections import Config
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import load_policy_file, resolve_checkpoint
from asyncflow.rollout.plan import RingPlan, plan_ring
from asyncflow.rollout.ring import RolloutInfo, RolloutRing
from asyncflow.run.evaluate import EvalResult
from asyncflow.run.launch import train
from asyncflow.run.recorded import RecordedRun
from tools.bench.common.report import REPOSITORY, Finding, Part, finish, isolated, to_markdown, with_range
from tools.bench.core.workers import NUM_ENVS, bench_workers

PAGE = REPOSITORY / "docs" / "benchmarks" / "core.md"
PARTS = ("workers", "ring", "growth", "overlap")
MAX_ROW_US, MIN_SPEEDUP = 100.0, 1.8
MAX_GROWTH_BYTES = {"resident memory": 4096, "Python objects": 1024}  # per update; the former comes in pages of 4096
NUM_BLOCKS, T_95 = 10, 2.306  # of a run's second half, for the fit; Student's t for two fewer
NUM_WARMUP_UPDATES = 3  # critic warm-up, Adam's state, both lanes in step
SMALL_LIFT_ROLLOUT = 96  # decisions: a second of simulation instead of nine

GROWTH_NOTE = (
    "{kind}, {task}, vla: {first:.2f} MiB after the first update, {added:+.0f} KiB until update {last}; the slope is "
    "that of the second half, when allocators have filled their caches."
)
OVERLAP_NOTE = (
    "Overlap, {task}: {policy_s:.4f} s emulated per decision and {minibatch_s:.4f} s per minibatch, so that a rollout "
    "takes {collect_s:.2f} s and an update {update_s:.2f} s in `standard`. Decisions/s: {standard:.1f} standard, "
    "{vla:.1f} vla; the ceiling, sum over larger, is {ceiling:.3f}, of which {share:.0f} % were reached. Fresh "
    f"decisions only, no evaluation; the first {NUM_WARMUP_UPDATES} updates and the last are left out."
)


# The ring.


def make_flow_row() -> tuple[RingPlan, Any]:
    """Return the ring of the default Lift run and one decision of its policy."""
    config = load_config("lift")
    spec = load_policy_file(resolve_checkpoint(config.policy.checkpoint or "")).env_spec
    policy = make_policy(config.policy, spec, config.trainer.seed)
    plan = plan_ring(policy, spec, config.env.num_envs, config.num_steps, num_slots=2)
    with torch.no_grad():
        return plan, policy.sample_actions(plan.obs, "train", torch.zeros(plan.num_envs, policy.noise_size))


def measure_row_writes(num_writes: int) -> tuple[NDArray[np.float64], int]:
    """Return the microseconds of each write of one row and the row's bytes."""
    torch.set_num_threads(1)
    plan, decision = make_flow_row()
    ring, everyone = RolloutRing(plan, torch.device("cpu")), range(plan.num_envs)
    outcome: Any = dict(plan.fields.exclude(*decision.keys()).items())  # as the collector makes it
    microseconds = np.zeros(num_writes)
    for index in range(num_writes):
        t = index % plan.num_steps
        if t == 0:
            slot = ring.begin_rollout()
        start = time.perf_counter_ns()
        slot.add(t, everyone, plan.obs, decision)
        slot.add_outcome(t, everyone, outcome)
        microseconds[index] = (time.perf_counter_ns() - start) / 1000
        if t == plan.num_steps - 1:
            slot.finish(RolloutInfo(0))
            ring.release(ring.take())
    return microseconds, plan.obs.bytes() + plan.fields.bytes()


def bench_ring(options: argparse.Namespace) -> Part:
    """Time the writing of one decision of all environments."""
    microseconds, num_bytes = isolated(measure_row_writes, options.num_writes)
    median, high = np.median(microseconds), np.quantile(microseconds, 0.99)
    what = "microseconds to write one row of the ring, median"
    finding = Finding(what, f"{median:.1f} (99 %: {high:.1f})", f"< {MAX_ROW_US:g}", bool(median < MAX_ROW_US))
    note = (
        f"Ring: observation, decision and outcome of {NUM_ENVS} environments under the default flow policy, "
        f"{num_bytes} bytes in all, {len(microseconds)} writes over every row of both slots, CPU."
    )
    return Part([finding], [note])


# Runs of the loop, for the last two parts.


@dataclass
class Recorder:
    """Watches a run as a `Reporter` does and takes notes after each update, into memory allocated beforehand."""

    num_updates: int
    measures: dict[str, Callable[[dict[str, float]], float]]
    notes: dict[str, NDArray[np.float64]] = field(init=False)

    def __post_init__(self) -> None:
        self.notes = {name: np.zeros(self.num_updates) for name in self.measures}

    def start(self, config: Config, run_dir: Path, ring_bytes: int, device: str) -> None:
        """Nothing to do."""

    def update(self, row: dict[str, float]) -> None:
        """Measure."""
        for name, measure in self.measures.items():
            self.notes[name][int(row["updates"]) - 1] = measure(row)

    def evaluation(self, updates: int, result: EvalResult) -> None:
        """Nothing to do."""

    def notice(self, text: str) -> None:
        """Show it: a fault would spoil the measurement."""
        print(text, file=sys.stderr)

    def end(self, run_dir: Path, checkpoint: Path, row: dict[str, float], is_stopped: bool) -> None:
        """Nothing to do."""


@contextmanager
def run_config(task: str, num_updates: int, changes: dict[str, Any]) -> Iterator[Config]:
    """Yield the configuration of a run that neither evaluates nor keeps anything."""
    with tempfile.TemporaryDirectory() as folder:
        size = {"buffer.buffer_size": SMALL_LIFT_ROLLOUT} if task == "Lift" else {}
        quietly = {"trainer.eval_interval": 0, "trainer.save_interval": num_updates, "logging.logger": "none"}
        length = {"trainer.total_updates": num_updates, "trainer.device": "cpu", "logging.out": folder}
        yield load_config(task.lower(), size | quietly | length | changes)


def resident_bytes(_: dict[str, float]) -> float:
    """Return the current resident bytes of this process."""
    return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def traced_bytes(_: dict[str, float]) -> float:
    """Return the bytes of all living Python objects, arrays of numpy included, tensors not."""
    gc.collect()
    return float(tracemalloc.get_traced_memory()[0])


def ring_addresses(run: RecordedRun) -> list[int]:
    """Return where each field of the ring lies."""
    return [field.data_ptr() for field in run.trainer.channel.buffer.memory.values(True, True)]


def record_memory(task: str, num_updates: int, seed: int, is_tracing: bool) -> tuple[NDArray[np.float64], bool]:
    """Train asynchronously; return bytes after each update, [updates], and whether the ring stayed in its place."""
    recorder = Recorder(num_updates, {"bytes": traced_bytes if is_tracing else resident_bytes})
    before: list[int] = []
    if is_tracing:
        tracemalloc.start()
    with run_config(task, num_updates, {"trainer.buffer_type": "vla", "trainer.seed": seed}) as config:
        done = train(config, recorder, lambda built: before.extend(ring_addresses(built)))
    return recorder.notes["bytes"], ring_addresses(done) == before


def fit_growth(num_bytes: NDArray[np.float64]) -> tuple[float, float]:
    """Return the least-squares slope per update over a run's second half, and half of its 95 % interval.

    Allocators fill their caches for a while and then in steps, so neighbours are not independent: the fit is of block
    means. The last update is left out; the collector's thread has ended by then.
    """
    half = num_bytes[len(num_bytes) // 2 : -1]
    blocks = np.array([block.mean() for block in np.array_split(half, NUM_BLOCKS)])
    x = np.array([block.mean() for block in np.array_split(np.arange(len(half)), NUM_BLOCKS)])
    (slope, _), covariance = np.polyfit(x, blocks, 1, cov=True)
    return float(slope), T_95 * float(np.sqrt(covariance[0, 0]))


def describe_growth(kind: str, task: str, num_bytes: NDArray[np.float64]) -> tuple[Finding, str]:
    """Compare the growth per update with its limit, and say what all updates together added."""
    slope, half = fit_growth(num_bytes)
    measured = f"{slope:.0f} (95 %: {slope - half:.0f} to {slope + half:.0f})"
    limit, added = MAX_GROWTH_BYTES[kind], (num_bytes[-2] - num_bytes[0]) / 1024
    what = f"{kind}, bytes of growth per update, {task}"
    first, last = num_bytes[0] / 2**20, len(num_bytes) - 1
    note = GROWTH_NOTE.format(kind=kind.capitalize(), task=task, first=first, added=added, last=last)
    return Finding(what, measured, f"< {limit}, whole interval", slope + half < limit), note


def bench_growth(options: argparse.Namespace) -> Part:
    """Watch the memory of long runs."""
    part = Part([], [])
    for task in options.task:
        num_updates = max(options.growth_updates if task == "Toy" else options.growth_updates // 5, 3 * NUM_BLOCKS)
        for kind, is_tracing in (("resident memory", False), ("Python objects", True)):
            num_bytes, is_in_place = isolated(record_memory, task, num_updates, options.seed, is_tracing)
            finding, note = describe_growth(kind, task, num_bytes)
            part.findings.append(finding)
            part.notes.append(note)
        part.findings.append(Finding(f"ring in its place, {task}", "yes" if is_in_place else "no", "yes", is_in_place))
    return part


# Overlap.


@dataclass(frozen=True)
class Timing:
    """What one run took, in its steady part."""

    decisions_per_s: float
    collect_s: float
    update_s: float


def time_run(task: str, num_updates: int, changes: dict[str, Any]) -> Timing:
    """Train; the warm-up is left out, and the last update, during which nothing is collected any more."""
    names = ("decisions", "time/collect_s", "time/update_s")
    measures: dict[str, Callable[[dict[str, float]], float]] = {name: partial(read_metric, name) for name in names}
    recorder = Recorder(num_updates, measures | {"now": lambda _: time.perf_counter()})
    with run_config(task, num_updates, changes) as config:
        train(config, recorder)
    steady = {name: values[NUM_WARMUP_UPDATES - 1 : -1] for name, values in recorder.notes.items()}
    rate = (steady["decisions"][-1] - steady["decisions"][0]) / (steady["now"][-1] - steady["now"][0])
    collect_s, update_s = (float(steady[name][1:].mean()) for name in names[1:])
    return Timing(float(rate), collect_s, update_s)


def read_metric(name: str, row: dict[str, float]) -> float:
    """Return one metric of an update."""
    return row[name]


def calibrate(task: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the latencies with which collecting and training take equally long, at least half of it emulated."""
    base = {"trainer.buffer_type": "standard", "trainer.seed": options.seed}
    plain = isolated(time_run, task, NUM_WARMUP_UPDATES + 4, base)
    rollout_s = max(options.rollout_s, 2 * plain.collect_s, 2 * plain.update_s)
    with run_config(task, 1, base) as config:
        num_minibatches = config.algorithm.update_epochs * config.algorithm.num_minibatches
        return {
            "trainer.seed": options.seed,
            "policy.emulated_latency_s": (rollout_s - plain.collect_s) / config.num_steps,
            "algorithm.emulated_latency_s": (rollout_s - plain.update_s) / num_minibatches,
        }


def time_both(task: str, changes: dict[str, Any], options: argparse.Namespace) -> dict[str, list[Timing]]:
    """Return the timings of both modes, one standard and one vla run a pair, in turns."""
    timings: dict[str, list[Timing]] = {"standard": [], "vla": []}
    for repeat in range(2 * options.overlap_repeats):
        for mode in ("standard", "vla") if repeat % 2 == 0 else ("vla", "standard"):
            run = changes | {"trainer.buffer_type": mode}
            timings[mode].append(isolated(time_run, task, options.overlap_updates, run))
    return timings


def describe_overlap(task: str, timings: dict[str, list[Timing]], changes: dict[str, Any]) -> tuple[Finding, str]:
    """Compare both modes with each other and with the ceiling that their lanes set."""
    pairs = zip(timings["vla"], timings["standard"], strict=True)
    ratios = [vla.decisions_per_s / standard.decisions_per_s for vla, standard in pairs]
    rates = {mode: statistics.mean(run.decisions_per_s for run in runs) for mode, runs in timings.items()}
    collect_s = statistics.mean(run.collect_s for run in timings["standard"])
    update_s = statistics.mean(run.update_s for run in timings["standard"])
    ceiling, speedup = (collect_s + update_s) / max(collect_s, update_s), statistics.mean(ratios)
    note = OVERLAP_NOTE.format(
        task=task,
        policy_s=changes["policy.emulated_latency_s"],
        minibatch_s=changes["algorithm.emulated_latency_s"],
        collect_s=collect_s,
        update_s=update_s,
        ceiling=ceiling,
        share=100 * speedup / ceiling,
        **rates,
    )
    what = f"decisions/s of vla over standard, collecting and training equally long, {task}"
    return Finding(what, with_range(ratios), f">= {MIN_SPEEDUP}", speedup >= MIN_SPEEDUP), note


def bench_overlap(options: argparse.Namespace) -> Part:
    """Compare both modes where collecting and training take equally long."""
    part = Part([], [])
    for task in options.task:
        changes = calibrate(task, options)
        finding, note = describe_overlap(task, time_both(task, changes, options), changes)
        part.findings.append(finding)
        part.notes.append(note)
    return part


# The page.


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--task", nargs="+", choices=("Toy", "Lift"), default=["Toy", "Lift"], help="growth, overlap")
    parser.add_argument("--repeats", type=int, default=4, help="workers: pairs of turns")
    parser.add_argument("--block-s", type=float, default=8.0, help="workers: seconds of a turn")
    parser.add_argument("--num-writes", type=int, default=10_000, help="ring: rows written")
    parser.add_argument("--growth-updates", type=int, default=400, help="growth: updates of the toy; Lift: a fifth")
    parser.add_argument("--overlap-updates", type=int, default=14, help="overlap: updates of a run")
    parser.add_argument("--overlap-repeats", type=int, default=2, help="overlap: times standard, vla, vla, standard")
    parser.add_argument("--rollout-s", type=float, default=0.75, help="overlap: seconds of a rollout, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="page to write")
    return parser.parse_args()


def main() -> int:
    """Measure, print, write, and say which targets were missed."""
    options = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = "1"
    benches = {"workers": bench_workers, "ring": bench_ring, "growth": bench_growth, "overlap": bench_overlap}
    parts = []
    for name in options.only:
        print(f"measuring: {name}", file=sys.stderr, flush=True)
        parts.append(benches[name](options))
    is_whole = set(options.only) == set(PARTS) and set(options.task) == {"Toy", "Lift"}
    return finish(to_markdown("The core", parts), parts, options.out or (PAGE if is_whole else None))
