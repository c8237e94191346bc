"""`asyncflow` that halts at a place until a signal comes: `held_run.py PLACE COUNT ENVIRONMENT ARGUMENTS...`.

PLACE is a function, as `module:name`, COUNT which of its calls is held before it begins. ENVIRONMENT is `own`, the
task's, `fake`, worker processes with simulators that take no time, or `stuck`, with some whose construction never ends.
Workers import this file, too.
"""

import functools
import importlib
import itertools
import os
import select
import signal
import sys
import threading
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent / "envs"))
from fake_simulator import ACTION_DIM, FakeSimulator


class HarmlessSimulator(FakeSimulator):
    """The fake, deaf to what it is told."""

    def step(self, action):
        return super().step(np.zeros(ACTION_DIM))


class StuckSimulator:
    """One whose construction never ends."""

    def __init__(self, seed):
        threading.Event().wait()


def hold_at(place, count):
    """Print a line before the call number `count` of `place`, and let it begin after a signal has come."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, calls = getattr(owner, name), itertools.count(1)
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)

    def hold(*args, **kwargs):
        if next(calls) == count:
            print("held", flush=True)
            while not (signal.sigpending() or select.select([woken], [], [], 0.01)[0]):
                pass  # a blocked signal wakes nobody, hence the short waits
        return original(*args, **kwargs)

    setattr(owner, name, hold)


def simulate_with(make_simulator):
    """Let every run simulate in worker processes, without robosuite."""
    from asyncflow import build  # noqa: PLC0415  not in the workers
    from asyncflow.envs.workers import WorkerVecEnv  # noqa: PLC0415

    def make(config, chunk_length, num_envs, seed):
        return WorkerVecEnv(make_simulator, config, num_envs, chunk_length, seed)

    build.make_vec_env = make


if __name__ == "__main__":
    place, count, environment, *sys.argv[1:] = sys.argv[1:]
    hold_at(place, int(count))
    if environment != "own":
        simulate_with({"fake": HarmlessSimulator, "stuck": StuckSimulator}[environment])
    from asyncflow.cli import main

    main()
