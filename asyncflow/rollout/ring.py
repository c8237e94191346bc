"""RolloutRing: a preallocated ring of rollouts on the training device, and its hand-off between two threads.

A slot goes FREE -> WRITING -> READY -> TRAINING -> FREE. Every wait is on one `Condition`; nothing polls. Writes go in
place to (slot, t, environments). Always true, in decisions: `collected = trained + in_flight + dropped + invalid`.

Shapes: S slots, T decisions, N environments, M true final observations that one rollout can hold.
"""

from __future__ import annotations

import enum
import threading
import weakref
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
    """State of a slot, which says who owns it: nobody, the collector, nobody (but it is full), the trainer."""

    FREE = enum.auto()
    WRITING = enum.auto()
    READY = enum.auto()
    TRAINING = enum.auto()


@dataclass(frozen=True)
class RolloutInfo:
    """Facts about a rollout besides its decisions.

    Attributes:
        policy_version: Updates that the policy that acted had seen.
        episodes: Episodes that ended within it, and in rollouts that were dropped before it, in their order.
        seconds: What collecting it took, by stage.
        faults: What was survived while it was collected, and in rollouts that were dropped before it.
        journal: What rebuilds the episodes that are open at its end, so that the next rollout can be collected again.
        num_tasks: Tasks over which the environments are spread, in turn.
    """

    policy_version: int
    episodes: tuple[Episode, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    journal: EpisodeJournal | None = None
    num_tasks: int = 1


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


class RolloutSlot:
    """One place of the ring. The collector gets it from `begin_rollout`, fills it with a rollout, and hands it over.

    All public methods are the collector's and are called while the slot is WRITING; none of them waits. Groups of
    environments may be written in any order: disjoint environments are disjoint memory.

    Attributes:
        position: Where in the ring it lies.
        index: Number of the rollout in it, 0 for the first of a run.
        num_written: Decisions of which the outcome was written.
        num_invalid: Those among them that are not to be trained on.
    """

    def __init__(self, ring: RolloutRing, position: int) -> None:
        """Start FREE, at the ring's end of the queue."""
        self.position, self.index = position, -1
        self.num_written = self.num_invalid = 0
        self._ring = weakref.proxy(ring)  # a reference would keep the memory until Python looks for cycles
        self._state, self._info = SlotState.FREE, RolloutInfo(-1)
        memory = ring.memory[position]
        self._data, self._obs = dict(leaves(memory["data"])), dict(leaves(memory["obs"]))
        self._final_obs = memory["final_obs"]  # [max_truncations or more, N]
        self._num_finals = [0] * ring.plan.num_envs  # rows of that table that were written, by environment
        self._episode_starts = [0] * ring.plan.num_envs  # the open episode's first decision in this slot
        self._event = record_event(ring.device)

    def add(self, t: int, env_ids: range, obs: TensorDictBase, decision: TensorDictBase | Mapping[str, Tensor]) -> None:
        """Write decision `t` of `env_ids`, [n], and the observations it was made on, [n]."""
        self._write_obs(t, env_ids, obs)
        self._write(t, env_ids, decision)

    def add_outcome(self, t: int, env_ids: range, outcome: Mapping[str, Tensor]) -> None:
        """Write what decision `t` of `env_ids` led to, each [n], and enter these decisions into the books.

        Raises:
            BufferClosed: The ring was closed; this is where a collector in mid-rollout learns of it.
            AsyncflowError: The rollout was handed over already.
        """
        self._write(t, env_ids, outcome)
        self._ring._count(self, len(env_ids))

    def add_bootstrap_obs(self, env_ids: range, obs: TensorDictBase) -> None:
        """Write the observations [n] that follow the rollout's last decision, row T."""
        self._write_obs(self._ring.plan.num_steps, env_ids, obs)

    def add_final_obs(self, env_id: int, obs: TensorDictBase) -> int:
        """Write the true final observation, [], of a truncated episode into the side table and return its row there.

        The table grows where environments cut more episodes than their horizon does.
        """
        row, old = self._num_finals[env_id], self._final_obs
        if row == len(old):
            num_rows = min(2 * row + 1, self._ring.plan.num_steps)
            self._final_obs = allocate_rows(self._ring.plan.obs, (num_rows,), self._ring.device)
            self._final_obs[:row] = old
        for name, value in leaves(obs):
            self._final_obs.get(name)[row, env_id] = value
        self._num_finals[env_id] += 1
        return row

    def end_episode(self, t: int, env_id: int) -> None:
        """Note that an environment's episode ended with decision `t`."""
        self._episode_starts[env_id] = t + 1

    def break_episode(self, t: int, env_id: int) -> None:
        """End an environment's episode at `t` and mark all its decisions in this slot as not to be trained on."""
        start = self._episode_starts[env_id]
        self._data["valid"][start : t + 1, env_id] = False
        self.num_invalid += t + 1 - start
        self.end_episode(t, env_id)

    def finish(self, info: RolloutInfo) -> None:
        """Hand the rollout to the trainer: WRITING -> READY. Wakes `take`.

        The trainer's reads come after the caller's writes by an event recorded here.

        Raises:
            AsyncflowError: Not every decision of the slot was written.
        """
        expected = self._ring.plan.num_decisions
        if self.num_written != expected:
            raise AsyncflowError(f"rollout {self.index}: {self.num_written} of {expected} decisions were written")
        self._info, self._event = info, record_event(self._ring.device)
        self._ring._hand_over(self)

    def _begin(self, index: int) -> None:
        self._state, self.index, self.num_written, self.num_invalid = SlotState.WRITING, index, 0, 0
        self._num_finals = [0] * self._ring.plan.num_envs
        self._episode_starts = [0] * self._ring.plan.num_envs

    def _write(self, t: int, env_ids: range, fields: TensorDictBase | Mapping[str, Tensor]) -> None:
        rows = as_slice(env_ids)
        for name, value in fields.items():
            self._data[name][t, rows] = value

    def _write_obs(self, t: int, env_ids: range, obs: TensorDictBase) -> None:
        rows = as_slice(env_ids)
        for name, value in leaves(obs):
            self._obs[name][t, rows] = value

    def _lend(self) -> Rollout:
        """Return views of all that was written."""
        memory = self._ring.memory[self.position]
        num_rows = max(*self._num_finals, self._ring.plan.max_truncations)
        finals = self._final_obs[:num_rows]
        return Rollout(self.index, self.position, self._info, memory["data"], memory["obs"], finals)


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
        self.memory = plan.allocate(device)  # [S] as `RingPlan.allocate` says
        self._slots = [RolloutSlot(self, position) for position in range(plan.num_slots)]
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

    def begin_rollout(self) -> RolloutSlot:
        """Return a slot for the next rollout: FREE -> WRITING.

        Called by the collector. Waits for a FREE slot, or when overwriting for a FREE or READY one; woken by
        `release` or `close`. Later writes on the caller's stream come after the trainer's last read.

        Raises:
            BufferClosed: `close` was called.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._find_writable() is not None)
            self._check_open()
            slot = self._find_writable()
            assert slot is not None  # what the wait was for
            if slot._state is SlotState.READY:
                self._drop(slot)
            wait_event(slot._event, self.device)
            slot._begin(self._num_started)
            self._num_started += 1
            return slot

    def _drop(self, slot: RolloutSlot) -> None:
        self._books["dropped"] += slot.num_written
        self._dropped_faults += slot._info.faults
        self._dropped_episodes += slot._info.episodes

    def _count(self, slot: RolloutSlot, num_decisions: int) -> None:
        """Enter executed decisions into the books."""
        with self._changed:
            self._check_open()
            if slot._state is not SlotState.WRITING:
                raise AsyncflowError(f"rollout {slot.index} was handed over; `begin_rollout` lends the next slot")
            slot.num_written += num_decisions
            self._books["collected"] += num_decisions

    def _hand_over(self, slot: RolloutSlot) -> None:
        """Make a slot READY; it tells, too, of what happened in rollouts that were dropped before it."""
        with self._changed:
            faults, episodes = self._dropped_faults + slot._info.faults, self._dropped_episodes + slot._info.episodes
            slot._info = replace(slot._info, faults=faults, episodes=episodes)
            self._dropped_faults, self._dropped_episodes = (), ()
            slot._state = SlotState.READY
            self._changed.notify_all()

    # Trainer's side.

    def take(self) -> Rollout:
        """Return the oldest READY rollout: READY -> TRAINING.

        Called by the trainer. Waits for one; woken by a slot's `finish` or `close`.

        Raises:
            BufferClosed: `close` was called.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._find_oldest_ready() is not None)
            self._check_open()
            slot = self._find_oldest_ready()
            assert slot is not None  # what the wait was for
            slot._state = SlotState.TRAINING
        wait_event(slot._event, self.device)
        return slot._lend()

    def take_all(self, is_waiting: bool = False) -> list[Rollout]:
        """Return every READY rollout, oldest first: READY -> TRAINING, all at once, so that none in between is missing.

        Called by the trainer. Waits until the ring is full if `is_waiting`, else never; woken by a slot's `finish` or
        `close`.

        Raises:
            BufferClosed: `close` was called.
        """
        with self._changed:
            if is_waiting:
                self._changed.wait_for(lambda: self._is_closed or self.is_full)
            self._check_open()
            ready = sorted(self._ready(), key=lambda slot: slot.index)
            for slot in ready:
                slot._state = SlotState.TRAINING
        for slot in ready:
            wait_event(slot._event, self.device)
        return [slot._lend() for slot in ready]

    def drop_all(self) -> None:
        """Give the slots of all READY rollouts back and count them as dropped. Called by the trainer; never waits."""
        with self._changed:
            for slot in sorted(self._ready(), key=lambda slot: slot.index):
                self._drop(slot)
                slot._state, slot.num_written = SlotState.FREE, 0
            self._changed.notify_all()

    def release(self, rollout: Rollout) -> None:
        """Give a trained rollout's slot back: TRAINING -> FREE. Called by the trainer; wakes `begin_rollout`."""
        num_valid = int(rollout.data["valid"].sum())  # sync: once per update, after the metrics were fetched
        slot = self._slots[rollout.slot]
        slot._event = record_event(self.device)
        with self._changed:
            self._books["trained"] += num_valid
            self._books["invalid"] += slot.num_written - num_valid
            slot._state, slot.num_written = SlotState.FREE, 0
            self._changed.notify_all()

    # Either side.

    @property
    def num_ready(self) -> int:
        """Rollouts that wait to be trained on. Any thread; never waits."""
        return len(self._ready())

    @property
    def is_full(self) -> bool:
        """Return whether every slot holds a rollout that waits to be trained on. Any thread; never waits."""
        return self.num_ready == self.plan.num_slots

    def books(self) -> dict[str, int]:
        """Return decisions `collected`, `trained`, `dropped`, `invalid`, `in_flight`. Any thread; never waits.

        Raises:
            AsyncflowError: They do not balance, so a decision was lost or counted twice.
        """
        with self._changed:
            books = dict(self._books)
            books["in_flight"] = sum(slot.num_written for slot in self._slots if slot._state is not SlotState.FREE)
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

    def _ready(self) -> list[RolloutSlot]:
        return [slot for slot in self._slots if slot._state is SlotState.READY]

    def _find_oldest(self, state: SlotState) -> RolloutSlot | None:
        matching = [slot for slot in self._slots if slot._state is state]
        return min(matching, key=lambda slot: slot.index, default=None)

    def _find_oldest_ready(self) -> RolloutSlot | None:
        return self._find_oldest(SlotState.READY)

    def _find_writable(self) -> RolloutSlot | None:
        free = self._find_oldest(SlotState.FREE)
        return self._find_oldest_ready() if free is None and self._is_overwriting else free
