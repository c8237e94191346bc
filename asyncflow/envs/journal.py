"""EpisodeJournal: which episode each environment is in, and the actions that led to where it is.

The journal rebuilds open episodes. An episode is a function of the environment's construction, its seed and its
actions, so replaying them gives the same simulator bit for bit; the simulator's own state would not be enough.

Shapes: N environments, n of them addressed by one call, H executed actions of a chunk, A action size, D size of the
`state` observation.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class EpisodeJournal:
    """Grows by one chunk per decision; an episode's end empties its list.

    Attributes:
        episodes: Number of the open episode of each environment.
        chunks: [H, A] actions of each chunk executed in it; tensors are shared between copies and never written again.
        is_lost: Whether the episode before it was lost, which the next result of the environment has yet to say.
        checksums: Of the `state` that each environment is in, by which a replay is checked; empty in older checkpoints.
    """

    episodes: list[int]
    chunks: list[list[Tensor]]
    is_lost: list[bool]
    checksums: list[int] = field(default_factory=list)

    @classmethod
    def start(cls, num_envs: int) -> EpisodeJournal:
        """Return the journal of environments that are about to begin episode 0."""
        return cls([0] * num_envs, [[] for _ in range(num_envs)], [False] * num_envs)

    def record(self, env_ids: Iterable[int], actions: Tensor, has_ended: Tensor) -> None:
        """Enter executed chunks.

        Args:
            env_ids: The environments.
            actions: [n, H, A] what was executed; the caller does not write to it again.
            has_ended: [n] bool, the episode is over, so that the next one is open now.
        """
        for env, chunk, ended in zip(env_ids, actions, has_ended.tolist(), strict=True):
            if ended:
                self.begin_next(env)
            else:
                self.chunks[env].append(chunk)

    def begin_next(self, env: int) -> None:
        """Open the next episode of an environment."""
        self.episodes[env] += 1
        self.chunks[env] = []

    def copy(self) -> EpisodeJournal:
        """Return a copy that later records do not change."""
        chunks = [list(chunks) for chunks in self.chunks]
        return EpisodeJournal(list(self.episodes), chunks, list(self.is_lost), list(self.checksums))

    def note_states(self, states: Tensor) -> None:
        """Keep the checksums of the states that the journal leads to, [N, ..., D] float32."""
        self.checksums = [zlib.crc32(state.numpy().tobytes()) for state in states]

    def find_differing(self, states: Tensor) -> list[int]:
        """Return the environments that a replay led to other states, [N, ..., D], than `note_states` was given.

        An environment whose episode was lost begins another one, and is left out.
        """
        found = [zlib.crc32(state.numpy().tobytes()) for state in states]
        pairs = zip(self.checksums, found, strict=False)
        return [env for env, (before, now) in enumerate(pairs) if before != now and not self.is_lost[env]]

    def actions(self, env: int) -> Tensor | None:
        """Return [steps, A] what was executed in the open episode; None if nothing was."""
        return torch.cat(self.chunks[env]) if self.chunks[env] else None

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the journal as tensors, as a checkpoint stores it."""
        chunks = [chunk for chunks in self.chunks for chunk in chunks]
        return {
            "episodes": torch.tensor(self.episodes),
            "num_chunks": torch.tensor([len(chunks) for chunks in self.chunks]),
            "chunks": torch.stack(chunks) if chunks else torch.zeros(0),
            "is_lost": torch.tensor(self.is_lost),
            "checksums": torch.tensor(self.checksums, dtype=torch.int64),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> EpisodeJournal:
        """Return what `to_tensors` described.

        Raises:
            KeyError: One of the tensors is missing.
            ValueError: They contradict each other, or are of other types.
        """
        episodes, num_chunks, chunks, is_lost = (tensors[k] for k in ("episodes", "num_chunks", "chunks", "is_lost"))
        if not (episodes.shape == num_chunks.shape == is_lost.shape and episodes.ndim == 1):
            raise ValueError("episodes, num_chunks and is_lost must have a number for each environment")
        if (episodes.dtype, num_chunks.dtype, is_lost.dtype) != (torch.int64, torch.int64, torch.bool):
            raise ValueError("episodes and num_chunks must be int64, is_lost bool")
        if (episodes < 0).any() or (num_chunks < 0).any() or num_chunks.sum() != len(chunks):
            raise ValueError("episodes and num_chunks must not be negative, and num_chunks add up to the chunks")
        if len(chunks) and not (chunks.ndim == 3 and chunks.dtype == torch.float32):
            raise ValueError("chunks must be float32, [chunks, steps, action]")
        pieces = chunks.split(num_chunks.tolist()) if len(chunks) else []
        lists = [list(piece.unbind()) for piece in pieces] or [[] for _ in episodes]
        checksums = tensors["checksums"].tolist() if "checksums" in tensors else []
        return cls(episodes.tolist(), lists, is_lost.tolist(), checksums)
