"""Torn-weight hunt: a publisher and a slow reader race over snapshots that are filled with their version number."""

from __future__ import annotations

import random
import threading
import time

import torch
from torch import nn

from asyncflow.rollout.weights import WeightPublisher, changing_tensors
from tools.stress.report import Checks, Row

LAGS = range(5)
_TIMEOUT_S = 60.0


class Versioned(nn.Module):
    """A policy whose every changing number is its version."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in (20_000, 64, 3_000))
        self.register_buffer("noise_level", torch.zeros(3))

    def fill(self, version: int) -> None:
        """Become a version."""
        with torch.no_grad():
            for tensor in changing_tensors(self).values():
                tensor.fill_(version)


class Hunt:
    """One race: this thread publishes, another leases and reads slowly.

    With an exact lag, rollout n leases version max(0, n - L) and version v is published once rollout v - 1 was
    collected, as in a run. Otherwise the newest is leased, and nothing paces the publisher.
    """

    def __init__(self, lag: int, num_leases: int, seed: int, is_exact: bool) -> None:
        self._lag, self._num_leases, self._is_exact = lag, num_leases, is_exact
        self._seed = seed
        self._policy = Versioned()
        self._publisher = WeightPublisher(self._policy, lag)
        self._collected = threading.Semaphore(0)
        self._is_done = threading.Event()
        self._last = 0
        self.checks = Checks()
        self.num_published = 0

    def run(self) -> None:
        """Race until all leases are read."""
        reader = threading.Thread(target=self._read, name="reader", daemon=True)
        reader.start()
        delays = random.Random(self._seed)
        while not self._is_done.is_set():
            if self._is_exact and not self._collected.acquire(timeout=_TIMEOUT_S):
                self.checks.expect(False, f"L = {self._lag}: the reader is stuck")
                break
            self.num_published += 1
            self._policy.fill(self.num_published)
            self._publisher.publish(self.num_published)
            _pause(delays)
        self._publisher.close()
        reader.join(_TIMEOUT_S)
        self.checks.expect(not reader.is_alive(), f"L = {self._lag}: the reader did not end")

    def _read(self) -> None:
        delays = random.Random(self._seed + 1)
        for rollout in range(self._num_leases):
            wanted = max(0, rollout - self._lag) if self._is_exact else None
            self._lease(wanted, delays)
            self._collected.release()
            _pause(delays)
        self._is_done.set()
        self._collected.release()

    def _lease(self, wanted: int | None, delays: random.Random) -> None:
        """Read one lease tensor by tensor, with pauses; the first one again at the end."""
        newest = self._publisher.newest
        with self._publisher.lease(wanted) as (version, tensors):
            values = set()
            for tensor in (*tensors, tensors[0]):
                values |= {float(tensor.min()), float(tensor.max())}
                _pause(delays)
        self._judge(version, values, wanted, newest)

    def _judge(self, version: int, values: set[float], wanted: int | None, newest: int) -> None:
        """Check a lease: its version's numbers alone, and of the right version; `newest` was there before it."""
        self.checks.expect(values == {float(version)}, f"L = {self._lag}: torn: version {version} holds {values}")
        oldest = max(newest, self._last) if wanted is None else wanted
        is_right = version >= oldest if wanted is None else version == wanted
        self.checks.expect(is_right, f"L = {self._lag}: got version {version}, wanted {wanted or oldest}")
        self._last = version


def _pause(delays: random.Random) -> None:
    if delays.random() < 0.1:
        time.sleep(delays.random() * 5e-4)


def hunt_torn_weights(num_leases: int, seed: int) -> list[Row]:
    """Race `num_leases` times for each lag, with the exact version and with the newest."""
    return [_hunt_kind(num_leases, seed, is_exact) for is_exact in (True, False)]


def _hunt_kind(num_leases: int, seed: int, is_exact: bool) -> Row:
    hunts = [Hunt(lag, num_leases, seed + lag, is_exact) for lag in LAGS]
    for hunt in hunts:
        hunt.run()
    failures = tuple(failure for hunt in hunts for failure in hunt.checks.failures)
    num_published = sum(hunt.num_published for hunt in hunts)
    return Row(
        f"publisher and slow reader race, L = 0 to 4, the reader wants {'one version' if is_exact else 'the newest'}",
        num_leases * len(hunts),
        f"nothing; {num_published:,} versions published",
        "no lease torn, each of the right version",
        failures,
    )
