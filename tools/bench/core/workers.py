"""Compare the workers with as many processes that only step bare robosuite; a part of `tools.bench.core`."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asyncflow.config.sections import EnvConfig
from asyncflow.config.task_table import TASKS
from asyncflow.envs import make_vec_env
from asyncflow.envs.base import VecEnv
from asyncflow.seeding import derive_seed
from asyncflow.simulators.robosuite.simulator import build_env_meta, quiet
from tools.bench.common.report import REPORTED, Finding, Part, Turns, count_cores, isolated, take_turns, with_range
from tools.bench.core.settings import Settings

NUM_ENVS, CHUNK_LENGTH, HORIZON = 16, 4, 120
NUM_CHUNKS = 500  # drawn beforehand and repeated, so that drawing them takes no time
MIN_WORKER_RATIO, MIN_ELSEWHERE_RATIO = 0.95, 0.98

WORKERS_NOTE = (
    f"Workers: Lift, {NUM_ENVS} environments in {{cores}} processes, chunks of {CHUNK_LENGTH} random actions, warm-up "
    "left out: {workers:.0f} env steps/s with `env.fast_step` off, {fast:.0f} with it. Bare: {cores} processes "
    f"that only call `step` and, every {HORIZON} steps, `reset` of `robosuite.make` with the arguments of robomimic's "
    "wrapper. With as many simulators, taken in turn as the workers do: {bare:.0f} env steps/s; the difference is the "
    "machinery (messages, observations, success, waiting for the slowest). With one simulator each: {single:.0f} env "
    f"steps/s; the caches then hold one simulator instead of several, which nothing that collects from {NUM_ENVS} "
    "environments can have. Turns of {block_s:g} s: workers, fast, elsewhere, bare, single, and back. "
    "Elsewhere: this interpreter once more, as `env.python`: a server of its own, simulators by their names."
)


class BareProcesses:
    """Processes that each step bare robosuite simulators, and nothing else, for as long as they are told."""

    def __init__(self, num_processes: int, seed: int) -> None:
        """Start them with as many simulators as a worker has; waits until all are constructed."""
        context, blocks = get_context("spawn"), split_envs(num_processes)
        self.num_simulators = len(blocks[-1])  # the largest
        self._connections = []
        for block in blocks:
            connection, child = context.Pipe()
            context.Process(target=serve_bare, args=(child, block, seed), daemon=True).start()
            child.close()
            self._connections.append(connection)
        for connection in self._connections:
            connection.recv()

    def measure(self, num_simulators: int, duration_s: float) -> float:
        """Step the first simulators of every process in turn; return env steps per second of all processes."""
        for connection in self._connections:
            connection.send((num_simulators, duration_s))
        return float(sum(connection.recv() for connection in self._connections))

    def close(self) -> None:
        """Let the processes leave."""
        for connection in self._connections:
            connection.close()


def count_workers() -> int:
    """Return how many processes simulators are split over, as asyncflow does: one a core, and none without any."""
    return min(count_cores(), NUM_ENVS)


def split_envs(num_processes: int) -> list[range]:
    """Return the environments of each process, in blocks as even as they can be; the last one is the largest."""
    return [range(i * NUM_ENVS // num_processes, (i + 1) * NUM_ENVS // num_processes) for i in range(num_processes)]


def serve_bare(connection: Connection, env_ids: range, seed: int) -> None:
    """Run one process of `BareProcesses`."""
    simulators = [make_bare(derive_seed(seed, "simulator", env)) for env in env_ids]
    chunks = draw_chunks(seed, env_ids.start, simulators[0].action_dim)
    for simulator in simulators:
        simulator.reset()  # here, as that of the workers is not timed either
    connection.send("ready")
    while True:
        try:
            num_simulators, duration_s = connection.recv()
        except EOFError:
            return
        connection.send(step_bare(simulators[:num_simulators], chunks, duration_s))


def make_bare(seed: int) -> Any:
    """Return robosuite's Lift with the arguments that robomimic's wrapper passes."""
    with quiet():
        import robosuite  # noqa: PLC0415  seconds, and only these processes need it

        off = dict.fromkeys(("has_renderer", "has_offscreen_renderer", "use_camera_obs", "camera_depths"), False)
        arguments = build_env_meta(TASKS["Lift"])["env_kwargs"] | off | {"ignore_done": True, "use_object_obs": True}
        return robosuite.make("Lift", **arguments, seed=seed, hard_reset=False)


def draw_chunks(seed: int, index: int, action_dim: int, num_envs: int = 1) -> NDArray[np.float32]:
    """Return random chunks, [NUM_CHUNKS, num_envs, H, A] in [-0.5, 0.5]."""
    rng = np.random.default_rng(derive_seed(seed, "bench_actions", index))
    return rng.uniform(-0.5, 0.5, (NUM_CHUNKS, num_envs, CHUNK_LENGTH, action_dim)).astype(np.float32)


def step_bare(simulators: list[Any], chunks: NDArray[np.float32], duration_s: float) -> float:
    """Execute a chunk in each simulator in turn, reset at the horizon; return env steps per second.

    Episodes go on from one call to the next, as those of the workers do.
    """
    num_steps, start = 0, time.perf_counter()
    for turn, chunk in enumerate(itertools.cycle(chunks[:, 0])):
        simulator = simulators[turn % len(simulators)]
        if simulator.timestep >= HORIZON:
            simulator.reset()
        for action in chunk:
            simulator.step(action)
        num_steps += CHUNK_LENGTH
        if time.perf_counter() - start >= duration_s:
            break
    return num_steps / (time.perf_counter() - start)


def step_workers(env: VecEnv, chunks: torch.Tensor, duration_s: float) -> float:
    """Execute chunks in all environments; return env steps per second."""
    everyone, num_steps, start = range(env.num_envs), 0, time.perf_counter()
    for chunk in itertools.cycle(chunks):
        env.step_async(chunk, everyone)
        num_steps += int(env.step_wait(everyone).executed.sum())
        if time.perf_counter() - start >= duration_s:
            break
    return num_steps / (time.perf_counter() - start)


def measure_workers(num_processes: int, repeats: int, block_s: float, seed: int) -> dict[str, list[float]]:
    """Return env steps/s, two turns a repeat.

    Of `workers`, of `fast` ones, of those `elsewhere`, of as many `bare` simulators, and of `single` ones.
    """
    config = EnvConfig(task="Lift", horizon=HORIZON, num_workers=num_processes, fast_step=False)
    fast = config.model_copy(update={"fast_step": True})
    configs = {"workers": config, "fast": fast, "elsewhere": fast.model_copy(update={"python": sys.executable})}
    envs = {name: make_vec_env(each, CHUNK_LENGTH, NUM_ENVS, seed) for name, each in configs.items()}
    bare = BareProcesses(num_processes, seed)
    for env in envs.values():
        env.reset(seed)
    chunks = torch.from_numpy(draw_chunks(seed, 0, envs["workers"].spec.action_dim, NUM_ENVS))
    turns: Turns = {
        **{name: partial(step_workers, env, chunks) for name, env in envs.items()},
        "bare": partial(bare.measure, bare.num_simulators),
        "single": partial(bare.measure, 1),
    }
    rates = take_turns(turns, repeats, block_s)
    bare.close()
    for env in envs.values():
        env.close()
    return rates


def bench_workers(settings: Settings) -> Part:
    """Compare the workers with bare robosuite processes."""
    cores = count_workers()
    rates = isolated(measure_workers, cores, settings.repeats, settings.block_s, settings.seed)
    means = {name: statistics.mean(values) for name, values in rates.items()}
    findings = [
        compare(rates, "workers", "bare", "`env.fast_step` off, as many simulators"),
        compare(rates, "workers", "single", "`env.fast_step` off, one simulator each"),
        replace(
            compare(rates, "fast", "bare", "with `env.fast_step`, as many simulators"), target=REPORTED, is_met=True
        ),
        compare_interpreters(rates),
    ]
    note = WORKERS_NOTE.format(cores=cores, block_s=settings.block_s, **means)
    return Part(findings, [note])


def compare_interpreters(rates: dict[str, list[float]]) -> Finding:
    """Return the rate of workers that `env.python` starts over that of the parent's own, turn by turn."""
    ratios = [a / b for a, b in zip(rates["elsewhere"], rates["fast"], strict=True)]
    what = "env steps/s of workers under another interpreter (`env.python`), with `env.fast_step`, over this one's"
    is_met = statistics.mean(ratios) >= MIN_ELSEWHERE_RATIO
    return Finding(what, with_range(ratios), f">= {MIN_ELSEWHERE_RATIO}", is_met)


def compare(rates: dict[str, list[float]], ours: str, bare: str, meaning: str) -> Finding:
    """Return workers' rate over that of bare processes, turn by turn."""
    ratios = [a / b for a, b in zip(rates[ours], rates[bare], strict=True)]
    what = f"workers' env steps/s over bare robosuite processes, {meaning}"
    return Finding(what, with_range(ratios), f">= {MIN_WORKER_RATIO}", statistics.mean(ratios) >= MIN_WORKER_RATIO)
