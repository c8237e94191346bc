"""RolloutBuffer: the ring in four methods, for loops of your own: `add`, `is_full`, `get`, `clear`.

Training uses the ring itself (`ring.RolloutRing`), whose slots hold whole rollouts. Here a slot holds what one `add`
brings, and memory is handed on in the same way: in place, in order, each row once.

Shapes: N environments, C rows of capacity.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from asyncflow.config.sections import BufferType
from asyncflow.errors import AsyncflowError
from asyncflow.rollout.plan import RingPlan, leaves
from asyncflow.rollout.ring import BufferClosed, RolloutInfo, RolloutRing

Rows = TensorDictBase | Mapping[str, Any]


class RolloutBuffer:
    """A circular buffer of transitions that hands out every row once, in the order in which rows were added.

    A transition is a dictionary of tensors [N, ...], in names of your own, nested if you like. The first one shows
    names, shapes and dtypes; memory is allocated then, once.

    One thread may add while another gets: with `on_full="block"`, `add` waits for the other thread's `get` instead of
    overwriting, and `get(wait=True)` waits until the buffer is full.

    Examples:
        Asynchronous (`buffer_type="vla"`): `add` takes one transition. A full buffer overwrites its oldest row.

        >>> buffer = RolloutBuffer(capacity=4)
        >>> def lies_in_memory():
        ...     return [f"T{int(row)}" for row in buffer.memory["number"][:, 0]]
        >>> for number in range(4):                       # [T0, _, _, _] ... [T0, T1, T2, T3]
        ...     buffer.add({"number": torch.tensor([number])})
        >>> lies_in_memory(), buffer.is_full()
        (['T0', 'T1', 'T2', 'T3'], True)
        >>> buffer.add({"number": torch.tensor([4])})     # in the place of T0, the oldest
        >>> lies_in_memory(), buffer.num_dropped
        (['T4', 'T1', 'T2', 'T3'], 1)
        >>> buffer.get()["number"].tolist()               # in the order of time, across the wrap
        [1, 2, 3, 4]
        >>> len(buffer), buffer.is_full()                 # each row is handed out once
        (0, False)
        >>> buffer.add({"number": torch.tensor([5])})
        >>> lies_in_memory(), buffer.get()["number"].tolist()
        (['T4', 'T5', 'T2', 'T3'], [5])

        Synchronous (`buffer_type="standard"`): `add` takes a whole rollout, [C, N, ...].

        >>> buffer = RolloutBuffer(capacity=3, buffer_type="standard")
        >>> buffer.add({"reward": torch.tensor([[0.0, 10.0], [1.0, 11.0], [2.0, 12.0]])})     # of two environments
        >>> buffer.get(flatten=True)["reward"].tolist()   # [C * N]: rows of one time stand together
        [0.0, 10.0, 1.0, 11.0, 2.0, 12.0]
    """

    def __init__(
        self,
        capacity: int,
        buffer_type: BufferType = "vla",
        device: str | torch.device = "cpu",
        on_full: Literal["overwrite", "block"] = "overwrite",
    ) -> None:
        """Allocate nothing yet.

        Args:
            capacity: Rows; each holds one transition of all environments.
            buffer_type: `vla`: transitions are added one by one; `standard`: whole rollouts of `capacity` rows are.
            device: Where the memory lies.
            on_full: What `add` does when no row is free: take the oldest row's place, or wait for `get` or `clear`,
                which another thread must call.

        Raises:
            AsyncflowError: There is no room for one row, or `buffer_type` or `on_full` is another word.
        """
        if capacity < 1:
            raise AsyncflowError(f"capacity = {capacity}: must be at least 1")
        for name, value, allowed in (
            ("buffer_type", buffer_type, ("vla", "standard")),
            ("on_full", on_full, ("overwrite", "block")),
        ):
            if value not in allowed:
                raise AsyncflowError(f"{name} = {value!r}: must be one of {', '.join(allowed)}")
        self.capacity, self.buffer_type, self.on_full = capacity, buffer_type, on_full
        self.device = torch.device(device)
        self._num_steps = 1 if buffer_type == "vla" else capacity  # rows of one `add`
        self._ring: RolloutRing | None = None
        self._is_closed = False
        self._allocated = threading.Condition()
        self._has_valid = False

    def add(self, rows: Rows) -> None:
        """Copy a transition, [N, ...] (`vla`), or a rollout, [C, N, ...] (`standard`), into the oldest place.

        Called by the thread that collects. If no row is free, it overwrites or waits, as `on_full` says.

        Raises:
            AsyncflowError: Names, shapes or dtypes are not those of the first call.
            BufferClosed: `close` was called.
        """
        fields = _as_fields(rows)
        if self.buffer_type == "vla":
            fields = {name: value.unsqueeze(0) for name, value in fields.items()}
        ring = self._ring or self._allocate(fields)
        self._check(ring.plan, fields)
        slot, everyone = ring.begin_rollout(), range(ring.plan.num_envs)
        for t in range(self._num_steps):
            slot.add_outcome(t, everyone, {name: value[t] for name, value in fields.items()})
        slot.finish(RolloutInfo(policy_version=0))

    def is_full(self) -> bool:
        """Tell whether every row holds a transition that was not handed out yet."""
        return self._ring is not None and self._ring.is_full

    def get(self, flatten: bool = True, wait: bool = False) -> TensorDict:
        """Return the rows that were not handed out yet, oldest first, as a copy, and free their places.

        Called by the thread that trains.

        Args:
            flatten: Return [rows * N, ...], as minibatches are drawn from; else [rows, N, ...], as advantages need it.
            wait: Wait until the buffer is full; woken by the other thread's `add`, or by `close`.

        Raises:
            AsyncflowError: There is no such row, and `wait` is false.
            BufferClosed: `close` was called.
        """
        with self._allocated:
            if wait:
                self._allocated.wait_for(lambda: self._ring is not None or self._is_closed)
            if self._is_closed:
                raise BufferClosed("the buffer is closed")
            ring = self._ring
        taken = ring.take_all(wait) if ring is not None else []
        if ring is None or not taken:
            raise AsyncflowError("the buffer holds no row that was not handed out yet: add some first")
        places = torch.tensor([rollout.slot for rollout in taken], device=self.device)
        rows: TensorDict = ring.memory["data"][places].flatten(0, 1)  # a copy, [rows, N]
        for rollout in taken:
            ring.release(rollout)
        rows = rows.exclude("valid") if not self._has_valid else rows
        return rows.flatten(0, 1) if flatten else rows

    def clear(self) -> None:
        """Drop the rows that were not handed out; the next `add` takes the oldest place. Never waits."""
        if self._ring is not None:
            self._ring.drop_all()

    def close(self) -> None:
        """Wake a thread that waits in `add` or `get` with `BufferClosed`. Any thread; may be called twice."""
        with self._allocated:
            self._is_closed = True
            self._allocated.notify_all()
        if self._ring is not None:
            self._ring.close()

    def __len__(self) -> int:
        """Return the number of rows that were not handed out yet."""
        return 0 if self._ring is None else self._ring.num_ready * self._num_steps

    @property
    def num_dropped(self) -> int:
        """Rows that were overwritten or cleared before anyone got them."""
        return 0 if self._ring is None else self._ring.books()["dropped"] // self._ring.plan.num_envs

    @property
    def memory(self) -> TensorDict:
        """All rows as they lie in memory, [C, N], no copy: for looking at, not for training."""
        if self._ring is None:
            raise AsyncflowError("memory is allocated with the first row that is added")
        rows: TensorDict = self._ring.memory["data"].view(self.capacity, self._ring.plan.num_envs)
        return rows

    def _allocate(self, fields: dict[Any, Tensor]) -> RolloutRing:
        """Allocate the ring for rows like these, [T, N, ...]."""
        flat = [name for name, value in fields.items() if value.dim() < 2]
        if flat or not fields:
            shape = "[N, ...]" if self.buffer_type == "vla" else "[capacity, N, ...]"
            raise AsyncflowError(f"{_name(flat[0]) if flat else 'a row'}: tensors {shape} are expected")
        num_envs = next(iter(fields.values())).shape[1]
        self._has_valid = "valid" in fields
        row = TensorDict({"valid": torch.ones(num_envs, dtype=torch.bool)}, [num_envs])
        for name, value in fields.items():
            if value.shape[1] != num_envs:
                raise AsyncflowError(f"{_name(name)}: of {value.shape[1]} environments, others are of {num_envs}")
            row[name] = value[0]
        plan = RingPlan(row, TensorDict({}, [num_envs]), self.capacity // self._num_steps, self._num_steps, 0)
        with self._allocated:
            if self._is_closed:
                raise BufferClosed("the buffer is closed")
            self._ring = RolloutRing(plan, self.device, self.on_full == "overwrite")
            self._ring.memory["data", "valid"].fill_(True)
            self._allocated.notify_all()
        return self._ring

    def _check(self, plan: RingPlan, fields: dict[Any, Tensor]) -> None:
        expected = dict(leaves(plan.fields if self._has_valid else plan.fields.exclude("valid")))
        for name in [*expected, *fields]:
            if name not in fields:
                raise AsyncflowError(f"{_name(name)} is missing; the first row had it")
            if name not in expected:
                raise AsyncflowError(f"{_name(name)} is new; the first row had {', '.join(map(_name, expected))}")
            wanted = (self._num_steps, *expected[name].shape), expected[name].dtype
            if (tuple(fields[name].shape), fields[name].dtype) != wanted:
                skipped = 1 if self.buffer_type == "vla" else 0  # the axis of time, which `add` put in front
                raise AsyncflowError(
                    f"{_name(name)}: {list(fields[name].shape[skipped:])} {fields[name].dtype}, "
                    f"expected {list(wanted[0][skipped:])} {wanted[1]}"
                )


def _as_fields(rows: Rows, prefix: tuple[str, ...] = ()) -> dict[Any, Tensor]:
    """Return tensors by name; the name of a nested one is a tuple."""
    return dict(_walk(rows, prefix))


def _walk(rows: Rows, prefix: tuple[str, ...]) -> Iterator[tuple[Any, Tensor]]:
    for name, value in rows.items():
        path = (*prefix, name)
        if isinstance(value, Mapping | TensorDictBase):
            yield from _walk(value, path)
        else:
            yield (path if prefix else name), torch.as_tensor(value)


def _name(name: str | tuple[str, ...]) -> str:
    return name if isinstance(name, str) else ".".join(name)
