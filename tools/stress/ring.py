"""Rollouts through a small ring, collector and trainer delayed at random; every row carries ticket and checksum.

Shapes: T decisions, N environments.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from asyncflow.rollout.plan import RingPlan
from asyncflow.rollout.ring import Rollout, RolloutInfo, RolloutRing, RolloutSlot
from tools.stress.report import Checks, Row

NUM_STEPS, NUM_ENVS = 2, 4
SIZE = NUM_STEPS * NUM_ENVS
_FACTOR = -7046029254386353131  # odd, so that a checksum belongs to one ticket; products wrap
_PHASE = 500  # rollouts after which the other side is the slow one
_TICKETS = torch.arange(SIZE).view(NUM_STEPS, NUM_ENVS)


@dataclass(frozen=True)
class RingKind:
    """One way of using the ring."""

    share: float
    num_slots: int
    num_groups: int
    is_overwriting: bool = False

    @property
    def title(self) -> str:
        """What the table says."""
        groups = "" if self.num_groups == 1 else f", {self.num_groups} groups"
        return f"{self.num_slots} slots{groups}, on_full: {'overwrite' if self.is_overwriting else 'block'}"


KINDS = (
    RingKind(0.3, num_slots=2, num_groups=1),
    RingKind(0.3, num_slots=3, num_groups=2),
    RingKind(0.2, num_slots=3, num_groups=1, is_overwriting=True),
    RingKind(0.2, num_slots=2, num_groups=2, is_overwriting=True),
)


class RingRace:
    """One collector thread and one trainer, this thread, on one ring."""

    def __init__(self, kind: RingKind, num_rollouts: int, seed: int) -> None:
        self._num_rollouts, self._seed = num_rollouts, seed
        self._groups = [range(g, NUM_ENVS, kind.num_groups) for g in range(kind.num_groups)]
        self._buffer = RolloutRing(_plan(kind.num_slots), torch.device("cpu"), kind.is_overwriting)
        self._is_overwriting = kind.is_overwriting
        self._trained = self._invalid = 0
        self._next = 0
        self._dropped = 0
        self.checks = Checks()

    def run(self) -> dict[str, int]:
        """Pass all rollouts and return the books."""
        collector = threading.Thread(target=self._collect, name="collector", daemon=True)
        collector.start()
        delays = random.Random(self._seed)
        while self._is_open(self._buffer.books()):
            rollout = self._buffer.take()
            self._check_rollout(rollout)
            _pause(delays, is_slow=rollout.index // _PHASE % 2 == 0)
            self._check_rows(rollout)  # again: nobody wrote into it while it was trained
            self._buffer.release(rollout)
            self._check_books()
        collector.join(60)
        self.checks.expect(not collector.is_alive(), "the collector did not end")
        self._dropped += (self._num_rollouts - self._next) * SIZE
        self._check_books(is_over=True)
        return self._buffer.books()

    def _is_open(self, books: dict[str, int]) -> bool:
        return books["collected"] < self._num_rollouts * SIZE or books["in_flight"] > 0

    def _collect(self) -> None:
        delays = random.Random(self._seed + 1)
        for _ in range(self._num_rollouts):
            slot = self._buffer.begin_rollout()
            tickets, is_valid = _TICKETS + slot.index * SIZE, validity(self._seed, slot.index)
            for t in range(NUM_STEPS):
                for group in self._groups:
                    _write(slot, t, group, tickets[t, group.start :: group.step])
                _pause(delays, is_slow=slot.index // _PHASE % 2 == 1)
            for group in self._groups:
                last = tickets[-1, group.start :: group.step] + NUM_ENVS
                slot.add_bootstrap_obs(group, _obs(last))
            for env in (~is_valid).nonzero().flatten().tolist():
                slot.break_episode(NUM_STEPS - 1, env)
            slot.finish(RolloutInfo(policy_version=slot.index))

    def _check_rollout(self, rollout: Rollout) -> None:
        """Check order and contents; count what was skipped."""
        in_order = rollout.index >= self._next if self._is_overwriting else rollout.index == self._next
        self.checks.expect(in_order, f"rollout {rollout.index} came where {self._next} was due")
        self.checks.expect(rollout.policy_version == rollout.index, f"rollout {rollout.index}: another one's info")
        self._dropped += (rollout.index - self._next) * SIZE
        self._next = rollout.index + 1
        self._check_rows(rollout)
        num_valid = int(validity(self._seed, rollout.index).sum()) * NUM_STEPS
        self._trained += num_valid
        self._invalid += SIZE - num_valid

    def _check_rows(self, rollout: Rollout) -> None:
        tickets, data = _TICKETS + rollout.index * SIZE, rollout.data
        rows = torch.cat([tickets, tickets[-1:] + NUM_ENVS])
        is_whole = (
            torch.equal(data["ticket"], tickets)
            and torch.equal(data["checksum"], tickets * _FACTOR)
            and torch.equal(rollout.obs["state"], _obs(rows)["state"])
            and torch.equal(data["valid"], validity(self._seed, rollout.index).expand(NUM_STEPS, -1))
        )
        self.checks.expect(is_whole, f"rollout {rollout.index} holds other rows than were written")

    def _check_books(self, is_over: bool = False) -> None:
        """Compare with what this side counted; a rollout that was just dropped is seen at the next take only."""
        books = self._buffer.books()  # raises where they do not balance
        same = books["trained"] == self._trained and books["invalid"] == self._invalid
        dropped = books["dropped"] == self._dropped if is_over else books["dropped"] >= self._dropped
        self.checks.expect(same and dropped, f"rollout {self._next - 1}: the books say {books}")


def _write(slot: RolloutSlot, t: int, group: range, tickets: Tensor) -> None:
    slot.add(t, group, _obs(tickets), {"ticket": tickets, "checksum": tickets * _FACTOR})
    slot.add_outcome(t, group, {"valid": torch.ones(len(group), dtype=torch.bool)})


def validity(seed: int, index: int) -> Tensor:
    """Return which environments of a rollout are valid, [N]: one in eight rollouts has an invalid one."""
    is_valid = torch.ones(NUM_ENVS, dtype=torch.bool)
    draw = (index * 0x9E3779B1 + seed) >> 7
    if draw % 8 == 0:
        is_valid[draw // 8 % NUM_ENVS] = False
    return is_valid


def _plan(num_slots: int) -> RingPlan:
    fields = {name: torch.zeros(NUM_ENVS, dtype=torch.int64) for name in ("ticket", "checksum")}
    valid = {"valid": torch.zeros(NUM_ENVS, dtype=torch.bool)}
    return RingPlan(TensorDict(fields | valid, [NUM_ENVS]), _obs(_TICKETS[0]), num_slots, NUM_STEPS, 1)


def _obs(tickets: Tensor) -> TensorDict:
    """Return observations that a float32 holds exactly, [..., N]."""
    return TensorDict({"state": (tickets % 2**24).float().unsqueeze(-1)}, tickets.shape)


def _pause(delays: random.Random, is_slow: bool) -> None:
    if delays.random() < (0.2 if is_slow else 0.02):
        time.sleep(delays.random() * 5e-4)


def race_through_ring(num_rollouts: int, seed: int) -> list[Row]:
    """Pass `num_rollouts` through the ring, in all kinds together."""
    return [_race_kind(kind, round(num_rollouts * kind.share), seed + i) for i, kind in enumerate(KINDS)]


def _race_kind(kind: RingKind, num_rollouts: int, seed: int) -> Row:
    race = RingRace(kind, num_rollouts, seed)
    books = race.run()
    lost = f"{books['dropped']:,} decisions dropped and counted" if kind.is_overwriting else "nothing"
    return Row(
        f"rollouts through the ring, both threads delayed: {kind.title}",
        num_rollouts,
        f"{lost}; {books['invalid']:,} of {books['collected']:,} marked invalid and counted",
        "in order, once, whole, also after training; the books at every release",
        tuple(race.checks.failures),
    )
