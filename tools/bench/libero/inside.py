"""Times one task, under the interpreter that has LIBERO: `python inside.py TASK BLOCKS CHUNKS`; prints JSON.

The benchmark's own loop and asyncflow's simulator play the same random actions from the same starts, without a renderer
and with one, in blocks that take turns, so that what else the machine does meets all four. The states in which they end
a block must be equal bit for bit.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

import numpy as np

from asyncflow.config.libero import ARM_KEYS, CAMERAS, list_tasks
from asyncflow.config.observations import Field
from asyncflow.config.simulator_settings import SimulatorSettings
from asyncflow.config.task_table import Task
from asyncflow.simulators.libero.scene import import_libero
from asyncflow.simulators.libero.simulator import LiberoSimulator
from asyncflow.simulators.robosuite.simulator import quiet

SIZE, CHUNK = 256, 10  # pixels, and env steps of a chunk, as published policies have them


def build_own(name: str, sees: bool) -> Any:
    """Return the benchmark's own environment; it renders two cameras at every step if it sees."""
    from libero.libero.envs.env_wrapper import ControlEnv, OffScreenRenderEnv  # noqa: PLC0415  seconds

    (task,) = list_tasks(name)
    with quiet():
        suite = import_libero()[task.suite]()
        file = suite.get_task_bddl_file_path(task.number)
        if sees:
            env = OffScreenRenderEnv(bddl_file_name=file, camera_heights=SIZE, camera_widths=SIZE)
        else:
            env = ControlEnv(bddl_file_name=file, has_offscreen_renderer=False, use_camera_obs=False)
    env.states = suite.get_task_init_states(task.number)
    return env


def build_simulator(name: str, sees: bool) -> LiberoSimulator:
    """Return asyncflow's simulator of the same."""
    (task,) = list_tasks(name)
    rendered = {f"images.{camera}": Field("images", (3, SIZE, SIZE), "uint8") for camera in CAMERAS if sees}
    own = Task(name, task.horizon, "", ARM_KEYS)
    settings = SimulatorSettings(own, task.horizon, ARM_KEYS, rendered=rendered, camera_size=(SIZE, SIZE))
    return LiberoSimulator(settings, seed=0, num_steps_wait=0)


def reset_own(env: Any, seed: int) -> None:
    """Begin the episode of a seed, as `LiberoSimulator.reset` does."""
    with quiet():
        env.seed(seed)
        env.reset()
    env.set_init_state(env.states[seed % len(env.states)])


def play(act: Callable[[Any], Any], look: Callable[[], Any], actions: Any) -> float:
    """Execute chunks of actions, [C, H, 7], and look after each; return milliseconds per env step."""
    start = time.perf_counter()
    for chunk in actions:
        for action in chunk:
            act(action)
        look()
    return 1e3 * (time.perf_counter() - start) / (len(actions) * CHUNK)


def measure(name: str, num_blocks: int, num_chunks: int) -> dict[str, list[float]]:
    """Return milliseconds per env step of each block, the first left out, of all four ways."""
    block_ms: dict[str, list[float]] = {}
    for sees, label in ((False, "blind"), (True, "seeing")):
        own, simulator = build_own(name, sees), build_simulator(name, sees)

        def look(simulator: LiberoSimulator = simulator, sees: bool = sees) -> None:
            simulator.observe()
            if sees:
                simulator.render()

        ways: dict[str, tuple[Any, Callable[[], Any]]] = {"own": (own.step, list), "asyncflow": (simulator.step, look)}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for block in range(num_blocks + 1):
            actions = np.random.default_rng(block).uniform(-1.0, 1.0, (num_chunks, CHUNK, 7))
            for way in sorted(ways, reverse=bool(block % 2)):
                if way == "own":
                    reset_own(own, block)
                else:
                    simulator.reset(block)
                times[way].append(play(*ways[way], actions))
            if not np.array_equal(own.get_sim_state(), simulator.simulator_state()):
                raise SystemExit(f"{name}: the two ways ended block {block} in different states")
        block_ms |= {f"{way}_{label}": values[1:] for way, values in times.items()}
    return block_ms


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
    sys.stdout.flush()
    os._exit(0)  # the benchmark frees its OpenGL contexts in an order that raises
