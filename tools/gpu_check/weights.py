"""Torn-weight hunt on a device: as in a run, the copy of a lease may still be under way there when the lease is over.

On a CUDA device publishing and reading are made slow on the device itself, so that the host runs ahead of both copies
and only the publisher's events keep them apart. The hunt is therefore repeated without the events' waits: it has to
find torn weights then.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn

from asyncflow.kernels import copy_each
from asyncflow.rollout import weights
from asyncflow.rollout.streams import collector_stream
from asyncflow.rollout.weights import WeightPublisher, changing_tensors, make_acting_copy
from tools.bench.common.report import Finding
from tools.stress.weights import LAGS, Hunt, Versioned

MAX_STALL_CYCLES = 1_000_000  # half a millisecond of an H100
NUM_WITHOUT_EVENTS = 40


class StallingPolicy(Versioned):
    """A policy of 64 MiB, whose weights change late on the device."""

    def __init__(self, device: torch.device, seed: int, num_weights: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in (num_weights, 64, 3_000))
        self.to(device)
        self._device, self._delays = device, random.Random(seed)

    def fill(self, version: int) -> None:
        """Become a version once the one before is published; the device does it later."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # sync: else the device's queue would only grow
        stall(self._device, self._delays)
        super().fill(version)
        stall(self._device, self._delays)


class DeviceHunt(Hunt):
    """One race in which the reader copies its lease on a stream of its own, late, and looks at the copy."""

    def __init__(self, device: torch.device, lag: int, num_leases: int, is_exact: bool, num_weights: int) -> None:
        super().__init__(lag, num_leases, seed=lag, is_exact=is_exact)
        self._device = device
        self._policy = StallingPolicy(device, lag, num_weights)
        self._publisher = WeightPublisher(self._policy, lag)
        self._targets = list(changing_tensors(make_acting_copy(self._policy)).values())
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # sync: the copies above were made on this thread's stream

    def _read(self) -> None:
        with collector_stream(self._device):
            super()._read()

    def _lease(self, wanted: int | None, delays: random.Random) -> None:
        newest = self._publisher.newest
        with self._publisher.lease(wanted) as (version, tensors), torch.no_grad():
            stall(self._device, delays)
            copy_each(self._targets, tensors)
        values = {float(x) for target in self._targets for x in (target.min(), target.max())}
        self._judge(version, values, wanted, newest)


def stall(device: torch.device, delays: random.Random) -> None:
    """Keep the calling thread's stream busy for a while, though not the thread."""
    if device.type == "cuda" and delays.random() < 0.5:
        torch.cuda._sleep(int(delays.random() * MAX_STALL_CYCLES))


def hunt_on_device(device: torch.device, num_leases: int, num_weights: int) -> Iterator[Finding]:
    """Race for every lag, with the exact version and with the newest; on a GPU also without the events."""
    for is_exact in (True, False):
        hunts = [DeviceHunt(device, lag, num_leases, is_exact, num_weights) for lag in LAGS]
        failures = [failure for hunt in hunts for failure in _race(hunt)]
        num_leased = num_leases * len(hunts)
        found = f"{len(failures)} of {num_leased} leases, {sum(hunt.num_published for hunt in hunts)} versions"
        yield Finding(
            f"leases that are torn or of another version, L = 0 to 4, {'one version' if is_exact else 'the newest'}",
            found + (f": {failures[0]}" if failures else ""),
            "0",
            not failures,
        )
    if device.type == "cuda":
        yield _hunt_without_events(device, num_weights)


def _race(hunt: DeviceHunt) -> list[str]:
    hunt.run()
    return hunt.checks.failures


def _hunt_without_events(device: torch.device, num_weights: int) -> Finding:
    with _without_event_waits():
        failures = _race(DeviceHunt(device, 0, NUM_WITHOUT_EVENTS, False, num_weights))
    torch.cuda.synchronize(device)  # sync: nothing of this hunt may reach into the next check
    what = "the same without the events' waits, so that the hunt has something to find"
    return Finding(what, f"{'at least ' if len(failures) > 4 else ''}{len(failures)} torn", "> 0", bool(failures))


@contextmanager
def _without_event_waits() -> Iterator[None]:
    with mock.patch.object(weights, "wait_event"):
        yield
