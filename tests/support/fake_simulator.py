"""A simulator of four numbers for tests; its actions decide what happens to it.

Worker processes import this file, so it imports little: a test file would cost them a second.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np

from asyncflow.simulators.spec import EnvSpec

SUCCEED, RAISE, HANG, DIE, NAN_REWARD, NAN_OBS = range(6)  # action dimensions; above 0.5 they take effect
ACTION_DIM = 6
HORIZON = 10


def die() -> NoReturn:
    os._exit(3)


class FakeSimulator:
    """State: what its seed draws, its constructor seed's draw, steps in the episode, sum of the actions so far."""

    def __init__(self, seed: int) -> None:
        self.spec = EnvSpec({"state": (4,)}, action_dim=ACTION_DIM, horizon=HORIZON)
        self.state = np.zeros(4)
        self.state[1] = np.random.default_rng(seed).uniform()

    def reset(self, seed: int) -> None:
        self.state[[0, 2, 3]] = np.random.default_rng(seed).uniform(), 0, 0

    def step(self, action):
        flags = action > 0.5
        if flags[RAISE]:
            raise ArithmeticError("the fake was told to raise")
        if flags[HANG]:
            threading.Event().wait()
        if flags[DIE]:
            die()
        self.state[2] += 1
        self.state[3] = np.nan if flags[NAN_OBS] else 0.5 * self.state[3] + action.sum()
        return np.nan if flags[NAN_REWARD] else 0.25, bool(flags[SUCCEED])  # positive without success: shaped

    def observe(self):
        return self.state.astype(np.float32)


class HarmlessSimulator(FakeSimulator):
    """The fake, deaf to what it is told."""

    def step(self, action):
        return super().step(np.zeros(ACTION_DIM))


class MortalSimulator(FakeSimulator):
    """The fake, deaf to what it is told, whose process dies in the third chunk of one episode."""

    def __init__(self, doomed_episode: int, seed: int) -> None:
        super().__init__(seed)
        self.doomed_episode = doomed_episode

    def reset(self, seed: int) -> None:
        self.is_doomed = seed == self.doomed_episode
        super().reset(seed)

    def step(self, action):
        if self.is_doomed and self.state[2] == 4:
            die()
        return super().step(np.minimum(action, 0.5))


class RudeSimulator(FakeSimulator):
    """One that treats its process as its own."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        print("a banner")
        os.system("echo another one")
        os.chdir("/")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        threading.Thread(target=threading.Event().wait).start()
        sys.stdin.close()
        sys.stdout.close()


class ParentSimulator(FakeSimulator):
    """One that starts a process, which inherits the descriptors of its own and outlives it."""

    def __init__(self, log: Path, seed: int) -> None:
        super().__init__(seed)
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
        with log.open("a") as file:
            print(child.pid, file=file)


class PipingSimulator(FakeSimulator):
    """One whose own pipe breaks."""

    def reset(self, seed: int) -> None:
        raise BrokenPipeError("the renderer's pipe")


class StuckSimulator:
    """One whose construction never ends."""

    def __init__(self, seed: int) -> None:
        threading.Event().wait()


def make_unreliable(log: Path, fails: Callable[[int], bool], seed: int) -> FakeSimulator:
    """Construct a simulator unless `fails` is true of how many were constructed before."""
    with log.open("a") as file:
        file.write(".")
    if fails(log.stat().st_size - 1):
        raise OSError("no memory")
    return FakeSimulator(seed)


def is_second(count: int) -> bool:
    return count == 1


def hang_later(log: Path, seed: int) -> FakeSimulator:
    """Construct a simulator the first time, and wait for ever from then on."""
    if log.exists():
        threading.Event().wait()
    log.touch()
    return FakeSimulator(seed)


def make_nothing(seed: int):
    raise ValueError(f"no simulator from {seed}")
