"""The memory that a parent and its simulators' processes share: what it holds, and where.

One mapped file without a name, which the system frees with its last user. It begins with a header, by which the other
side sees that it holds what is expected; then come the arrays, in the machine's own layout. Row i of each belongs to
environment i.

Shapes: N environments, H executed actions of a chunk, O env steps that an observation shows (n_obs_steps), C cameras.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import tempfile
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from asyncflow.config.observations import KINDS
from asyncflow.errors import EnvError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_STATE = 4096
MAX_ACTION = 64
FINAL = "final_"  # before the name of what belongs to the last observation of a chunk's own episode

_VERSION = 1
_HEADER = struct.Struct("<8sIIQ")  # magic, version, checksum of the plan, bytes in all
_MAGIC = b"asyncflw"
_ALIGNMENT = 64  # bytes of a cache line: rows of different arrays never share one


@dataclass(frozen=True)
class BoardPlan:
    """The sizes from which both sides derive the same layout.

    A board is allocated before a simulator says how much it needs, hence the room for `MAX_STATE` and `MAX_ACTION`:
    pages that nobody writes take no memory. What cameras yield is known from the configuration.

    Attributes:
        num_envs: N.
        chunk_length: H.
        n_obs_steps: O.
        rooms: Kind -> [C, ...], what all cameras of a kind yield at one env step.
    """

    num_envs: int
    chunk_length: int
    n_obs_steps: int = 1
    rooms: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return name -> (dtype, shape) of everything on the board, in its order.

        - `actions` [N, H, MAX_ACTION] is written by the parent, everything else by the simulators.
        - `obs` [N, MAX_STATE]: observation to decide on next, of which O * D numbers are used.
        - `final_obs`: the last observation of the chunk's own episode.
        - a kind's name [N, O, C, ...]: what cameras yield with `obs`; `final_KIND`: the same of `final_obs`.
        - `rewards` [N, H]: zero after the episode's end.
        - `executed` [N]: env steps executed; zero where the chunk counts for nothing.
        - `terminated` [N]: the episode ended by itself, as by success.
        - `truncated` [N]: the episode was cut, at the horizon at the latest.
        - `succeeded` [N]: an episode ended that solved the task.
        - `episode_return`, `episode_length` [N]: of the episode that ended, or zero.
        - `nonfinite` [N]: what was not finite, as `runner` numbers it; zero if nothing was.
        - `nonfinite_step` [N]: in which env step of its episode, from 1; or zero.
        - `started_s`, `ended_s` [N]: when the chunk began and ended, the next episode's reset included, in
          `time.perf_counter` seconds.
        """
        rows, per_step = (self.num_envs,), (self.num_envs, self.chunk_length)
        plan = {
            "actions": ("float32", (*per_step, MAX_ACTION)),
            "obs": ("float32", (*rows, MAX_STATE)),
            "final_obs": ("float32", (*rows, MAX_STATE)),
            "rewards": ("float32", per_step),
            "executed": ("int64", rows),
            "terminated": ("bool", rows),
            "truncated": ("bool", rows),
            "succeeded": ("bool", rows),
            "episode_return": ("float32", rows),
            "episode_length": ("int64", rows),
            "nonfinite": ("int64", rows),
            "nonfinite_step": ("int64", rows),
            "started_s": ("float64", rows),
            "ended_s": ("float64", rows),
        }
        for kind, room in self.rooms.items():
            rendered = (KINDS[kind].dtype, (self.num_envs, self.n_obs_steps, *room))
            plan.update({kind: rendered, FINAL + kind: rendered})
        return plan

    def offsets(self) -> tuple[dict[str, int], int]:
        """Return where each array begins, in bytes, and the size of all."""
        offsets, end = {}, _HEADER.size
        for name, (dtype, shape) in self.arrays().items():
            offsets[name] = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = offsets[name] + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return offsets, end

    def header(self) -> bytes:
        """Return what stands at the beginning of the memory."""
        offsets, num_bytes = self.offsets()
        layout = json.dumps([self.to_json(), *([name, *self.arrays()[name], at] for name, at in offsets.items())])
        return _HEADER.pack(_MAGIC, _VERSION, zlib.crc32(layout.encode()), num_bytes)

    def to_json(self) -> dict[str, Any]:
        """Return the sizes as a message holds them."""
        rooms = {kind: list(room) for kind, room in self.rooms.items()}
        return {"sizes": [self.num_envs, self.chunk_length, self.n_obs_steps], "rooms": rooms}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> BoardPlan:
        """Return what `to_json` described."""
        num_envs, chunk_length, n_obs_steps = values["sizes"]
        rooms = {kind: tuple(room) for kind, room in values["rooms"].items()}
        return cls(num_envs, chunk_length, n_obs_steps, rooms)


class Board:
    """The shared memory, as arrays.

    Attributes:
        plan: Its sizes.
        arrays: Name -> array, as `BoardPlan.arrays` describes them; writable.
        descriptor: Of the mapped file.
    """

    def __init__(self, plan: BoardPlan, descriptor: int) -> None:
        """Map a file that holds a board.

        Raises:
            EnvError: It holds another one.
        """
        self.plan, self.descriptor = plan, descriptor
        expected = plan.header()
        found = os.pread(descriptor, _HEADER.size, 0)
        if found != expected:
            raise EnvError(f"shared memory: its header is {found.hex()}; expected {expected.hex()}, by its sizes")
        offsets, num_bytes = plan.offsets()
        memory = mmap.mmap(descriptor, num_bytes)  # stays until the last array of it is gone
        self.arrays: dict[str, NDArray[Any]] = {}
        for name, (dtype, shape) in plan.arrays().items():
            count = int(np.prod(shape, dtype=np.int64))
            self.arrays[name] = np.frombuffer(memory, dtype, count, offsets[name]).reshape(shape)

    @classmethod
    def create(cls, plan: BoardPlan) -> Board:
        """Allocate a board; whoever gets its descriptor shares it.

        Raises:
            OSError: There is too little memory, or a limit on the size of files.
        """
        descriptor = _open_memory()
        try:
            os.ftruncate(descriptor, plan.offsets()[1])
            os.pwrite(descriptor, plan.header(), 0)
            return cls(plan, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that cameras yield here."""
        return tuple(self.plan.rooms)

    def row(self, env: int) -> dict[str, NDArray[Any]]:
        """Return writable views of one environment's row."""
        return {name: array[env, ...] for name, array in self.arrays.items()}

    def close(self) -> None:
        """Let go of the memory, which stays until the last array of it is gone; may be called twice."""
        self.arrays.clear()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _open_memory() -> int:
    """Return the descriptor of a file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("asyncflow-board")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
