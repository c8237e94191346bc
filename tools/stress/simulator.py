"""A small simulator that is slow, poisons its numbers and raises, at steps that its episodes' seeds decide."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncflow.simulators.spec import EnvSpec

HORIZON, ACTION_DIM = 12, 2
_STEP_SIZE, _GOAL_RADIUS = 0.1, 0.25


@dataclass(frozen=True)
class FaultPlan:
    """What goes wrong in a command, as `stress.child` is told.

    Attributes:
        log: File to which every injected fault adds a line.
        seed: Of the delays; faults follow from the episodes' seeds.
        poison: Probability, per env step, of an observation or a reward that is not finite.
        raising: Probability, per env step, of an exception.
        delay_s: Longest pause in one of ten env steps and of the collector's waits.
        update_delay_s: Longest pause before an update.
        inference_s: Seconds that every decision takes longer.
        crash_at: The collector raises at its wait of this number, counted from 1; 0 for never.
    """

    log: str
    seed: int = 0
    poison: float = 0.0
    raising: float = 0.0
    delay_s: float = 0.0
    update_delay_s: float = 0.0
    inference_s: float = 0.0
    crash_at: int = 0

    def note(self, text: str) -> None:
        """Add a line to the log; one write, so that lines of several processes do not mix."""
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(descriptor, f"{text}\n".encode())
        os.close(descriptor)


def build(seed: int, plan: dict[str, Any]) -> FaultySimulator:
    """Return a simulator by a plan as JSON holds it."""
    return FaultySimulator(FaultPlan(**plan), seed)


class FaultySimulator:
    """Move in the plane to the origin; state: position, steps so far, and a number that the constructor's seed draws.

    A poisoned episode stays poisoned and has no second fault, so that each is one line of the log.
    """

    def __init__(self, plan: FaultPlan, seed: int) -> None:
        self.spec = EnvSpec({"state": (4,)}, ACTION_DIM, HORIZON)
        self._plan = plan
        self._state = np.zeros(4)
        self._state[3] = np.random.default_rng(seed).uniform()
        self._is_poisoned = False

    def reset(self, seed: int) -> None:
        """Start the episode that belongs to `seed`."""
        self._rng = np.random.default_rng(seed)
        self._state[:2], self._state[2] = self._rng.uniform(-1, 1, 2), 0.0
        self._is_poisoned = False

    def step(self, action: NDArray[Any]) -> tuple[float, bool]:
        """Move; go wrong where the episode's draws say so."""
        draws = self._rng.uniform(size=3)
        if draws[0] < 0.1:
            time.sleep(draws[0] * 10 * self._plan.delay_s)
        self._state[:2] += _STEP_SIZE * np.clip(action, -1, 1)
        self._state[2] += 1 / HORIZON
        if draws[1] < self._plan.raising and not self._is_poisoned:
            self._plan.note("raised")
            raise ArithmeticError("injected by the stress suite")
        if draws[1] > 1 - self._plan.poison and not self._is_poisoned:
            return self._poison(is_reward=draws[2] < 0.5), False
        is_solved = bool(np.hypot(*self._state[:2]) < _GOAL_RADIUS)
        return float(is_solved), is_solved

    def observe(self) -> NDArray[Any]:
        """Return the state."""
        return self._state.astype(np.float32)

    def render(self) -> dict[str, NDArray[Any]]:
        """Return nothing: there are no cameras."""
        return {}

    def _poison(self, is_reward: bool) -> float:
        self._is_poisoned = True
        self._plan.note("nonfinite")
        if is_reward:
            return float("inf")
        self._state[0] = np.nan
        return 0.0
