"""RolloutRing: a preallocated ring of rollouts on the training device, and its hand-off between two threads.

A slot goes FREE -> WRITING -> READY -> TRAINING -> FREE. Every wait is on one `Condition`; nothing polls. Writes go in
place to (slot, t, environments). Always true, in decisions: `collected = trained + in_flight + dropped + invalid`.

Shapes: S slots, T decisions, N environments, M true final observations that one rollout can hold.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from asyncflow.envs.base import Fault, as_slice
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.errors import AsyncflowError
from asyncflow.rollout.episodes import Episode
from asyncflow.rollout.plan import RingPlan, allocate_rows, leaves
from asyncflow.rollout.streams import record_event, wait_event


class BufferClosed(AsyncflowError):
    """The buffer was closed while a thread used it."""


class SlotState(enum.Enum):
    """Who owns a slot: nobody, the collector, nobody but it is full, the trainer."""

    FREE = enum.auto()
    WRITING = enum.auto()
    READY = enum.auto()
    TRAINING = enum.auto()


@dataclass(frozen=True)
class RolloutInfo:
    """What is known of a rollout besides its decisions.

    Attributes:
        policy_version: Updates that the policy that acted had seen.
        episodes: Episodes that ended within it, and in rollouts that were dropped before it, in their order.
        seconds: What collecting it took, by stage.
        faults: What was survived while it was collected, and in rollouts that were dropped before it.
        journal: What rebuilds the episodes that are open at its end, so that the next rollout can be collected again.
    """

    policy_version: int
    episodes: tuple[Episode, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    journal: EpisodeJournal | None = None


@dataclass(frozen=True)
class Rollout:
    """A finished rollout, lent to the trainer until it is released.

    Attributes:
        index: 0 for the first rollout of a run.
        slot: Where it lies in the ring.
        info: What is known of it besides the decisions.
        data: [T, N] view of the ring.
        obs: [T+1, N] view; the last row is the bootstrap.
        final_obs: [max_truncations or more, N] view; `data["final_index"]` addresses its rows.
    """

    index: int
    slot: int
    info: RolloutInfo
    data: TensorDict
    obs: TensorDict
    final_obs: TensorDict

    @property
    def policy_version(self) -> int:
        """Updates that the policy that acted had seen."""
        return self.info.policy_version


@dataclass
class _Slot:
    state: SlotState = SlotState.FREE
    index: int = -1
    num_written: int = 0
    num_finals: int = 0  # rows of the side table that were written
    event: torch.cuda.Event | None = None
    info: RolloutInfo = RolloutInfo(-1)


class RolloutRing:
    """Ring of rollouts between one collector and one trainer, which may be the same thread."""

    def __init__(self, plan: RingPlan, device: torch.device, is_overwriting: bool = False) -> None:
        """Allocate the ring once.

        Args:
            plan: Shapes.
            device: The training device.
            is_overwriting: Without a FREE slot, recycle the oldest READY one instead of waiting.
        """
        self.plan = plan
        self.device = device
        self._is_overwriting = is_overwriting
        self._ring = plan.allocate(device)
        self._data = dict(leaves(self._ring["data"]))
        self._obs = dict(leaves(self._ring["obs"]))
        self._final_obs = list(self._ring["final_obs"].unbind(0))  # of each slot: [max_truncations or more, N]
        self._slots = [_Slot(event=record_event(device)) for _ in range(plan.num_slots)]
        self._changed = threading.Condition()
        self._is_closed = False
        self._num_started = 0
        self._dropped_faults: tuple[Fault, ...] = ()
        self._dropped_episodes: tuple[Episode, ...] = ()
        self._books = {"collected": 0, "trained": 0, "dropped": 0, "invalid": 0}

    def restore(self, next_rollout: int, books: Mapping[str, int]) -> None:
        """Go on from a run that was cut. Called before anything else.

        Args:
            next_rollout: Number of the first rollout that is begun.
            books: As `settled_books` returned them.
        """
        self._num_started = next_rollout
        self._books = {name: books[name] for name in self._books}

    # Collector's side.

    def begin_rollout(self) -> tuple[int, int]:
        """Take a slot for the next rollout and return (rollout index, slot).

        Called by the collector. Waits for a FREE slot, or when overwriting for a FREE or READY one; woken by
        `release` or `close`. Later writes on the caller's stream come after the trainer's last read.

        Raises:
            BufferClosed: `close` was called.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._find_writable() is not None)
            self._check_open()
            position = self._find_writable()
            assert position is not None  # what the wait was for
            slot = self._slots[position]
            if slot.state is SlotState.READY:
                self._books["dropped"] += slot.num_written
                self._dropped_faults += slot.info.faults
                self._dropped_episodes += slot.info.episodes
            wait_event(slot.event, self.device)
            self._slots[position] = _Slot(SlotState.WRITING, self._num_started)
            self._num_started += 1
            return self._slots[position].index, position

    def write(self, slot: int, t: int, env_ids: range, fields: TensorDictBase | Mapping[str, Tensor]) -> None:
        """Copy fields, [n, ...], of decision `t` of `env_ids` into the ring. Called by the collector; never waits."""
        rows = as_slice(env_ids)
        for name, value in fields.items():
            self._data[name][slot, t, rows] = value

    def write_obs(self, slot: int, t: int, env_ids: range, obs: TensorDictBase) -> None:
        """Copy observations [n] that decision `t` is made on; t = T is the bootstrap row. Called by the collector."""
        rows = as_slice(env_ids)
        for name, value in leaves(obs):
            self._obs[name][slot, t, rows] = value

    def write_final_obs(self, slot: int, row: int, env_id: int, obs: TensorDictBase) -> None:
        """Copy the true final observation, [], of a truncated episode into the side table. Called by the collector.

        It grows where environments cut more episodes than their horizon does.
        """
        old = table = self._final_obs[slot]
        if row == len(table):
            table = self._final_obs[slot] = allocate_rows(
                self.plan.obs, (min(2 * row, self.plan.num_steps),), self.device
            )
            table[:row] = old
        self._slots[slot].num_finals = max(self._slots[slot].num_finals, row + 1)
        for name, value in leaves(obs):
            table.get(name)[row, env_id] = value

    def invalidate(self, slot: int, steps: range, env_id: int) -> None:
        """Mark written decisions as not to be trained on. Called by the collector; never waits."""
        self._data["valid"][slot, as_slice(steps), env_id] = False

    def count(self, slot: int, num_decisions: int) -> None:
        """Enter executed decisions into the books. Called by the collector; never waits.

        Raises:
            BufferClosed: `close` was called; this is where a collector in mid-rollout learns of it.
        """
        with self._changed:
            self._check_open()
            self._slots[slot].num_written += num_decisions
            self._books["collected"] += num_decisions

    def finish_rollout(self, slot: int, info: RolloutInfo) -> None:
        """Hand a written slot to the trainer: WRITING -> READY. Called by the collector; wakes `take`.

        The trainer's reads come after the caller's writes by an event recorded here.

        Raises:
            AsyncflowError: Not every decision of the slot was counted.
        """
        entry = self._slots[slot]
        expected = self.plan.num_steps * self.plan.num_envs
        if entry.num_written != expected:
            raise AsyncflowError(f"rollout {entry.index}: {entry.num_written} of {expected} decisions were written")
        faults, episodes = self._dropped_faults + info.faults, self._dropped_episodes + info.episodes
        entry.info = replace(info, faults=faults, episodes=episodes)
        self._dropped_faults, self._dropped_episodes = (), ()
        entry.event = record_event(self.device)
        with self._changed:
            entry.state = SlotState.READY
            self._changed.notify_all()

    # Trainer's side.

    def take(self) -> Rollout:
        """Return the oldest READY rollout: READY -> TRAINING.

        Called by the trainer. Waits for one; woken by `finish_rollout` or `close`.

        Raises:
            BufferClosed: `close` was called.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._find_oldest_ready() is not None)
            self._check_open()
            position = self._find_oldest_ready()
            assert position is not None  # what the wait was for
            slot = self._slots[position]
            slot.state = SlotState.TRAINING
        wait_event(slot.event, self.device)
        views = self._ring[position]
        final_obs = self._final_obs[position][: max(slot.num_finals, self.plan.max_truncations)]
        return Rollout(slot.index, position, slot.info, views["data"], views["obs"], final_obs)

    def release(self, rollout: Rollout) -> None:
        """Give a trained rollout's slot back: TRAINING -> FREE. Called by the trainer; wakes `begin_rollout`."""
        num_valid = int(rollout.data["valid"].sum())  # sync: once per update, after the metrics were fetched
        slot = self._slots[rollout.slot]
        slot.event = record_event(self.device)
        with self._changed:
            self._books["trained"] += num_valid
            self._books["invalid"] += slot.num_written - num_valid
            slot.state, slot.num_written = SlotState.FREE, 0
            self._changed.notify_all()

    # Either side.

    def books(self) -> dict[str, int]:
        """Return decisions `collected`, `trained`, `dropped`, `invalid`, `in_flight`. Any thread; never waits.

        Raises:
            AsyncflowError: They do not balance, so a decision was lost or counted twice.
        """
        with self._changed:
            books = dict(self._books)
            books["in_flight"] = sum(slot.num_written for slot in self._slots if slot.state is not SlotState.FREE)
        if books["collected"] != sum(books[k] for k in ("trained", "dropped", "invalid", "in_flight")):
            raise AsyncflowError(f"the buffer's books do not balance: {books}")
        return books

    def settled_books(self) -> dict[str, int]:
        """Return the books without what is in flight, which a resumed run collects again. Any thread; never waits."""
        books = self.books()
        return books | {"collected": books["collected"] - books["in_flight"], "in_flight": 0}

    def close(self) -> None:
        """Wake every waiting thread with `BufferClosed`. Any thread, a signal handler too; may be called twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._is_closed:
            raise BufferClosed("the buffer is closed")

    def _find_oldest(self, state: SlotState) -> int | None:
        matching = [i for i, slot in enumerate(self._slots) if slot.state is state]
        return min(matching, key=lambda i: self._slots[i].index, default=None)

    def _find_oldest_ready(self) -> int | None:
        return self._find_oldest(SlotState.READY)

    def _find_writable(self) -> int | None:
        free = self._find_oldest(SlotState.FREE)
        return self._find_oldest_ready() if free is None and self._is_overwriting else free
