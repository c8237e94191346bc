"""EpisodeJournal: which episode each environment is in, and the actions that led to where it is.

Owns what rebuilds open episodes. An episode is a function of the environment's construction, its seed and its actions,
so replaying them gives the same simulator bit for bit; the simulator's own state would not be enough.

Shapes: N environments, n of them addressed by one call, H executed actions of a chunk, A action size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class EpisodeJournal:
    """Grows by one chunk per decision; an episode's end empties its list.

    Attributes:
        episodes: Number of the open episode of each environment.
        chunks: [H, A] actions of each chunk executed in it; tensors are shared between copies and never written again.
        is_lost: Whether the episode before it was lost, which the next result of the environment has yet to say.
    """

    episodes: list[int]
    chunks: list[list[Tensor]]
    is_lost: list[bool]

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
        return EpisodeJournal(list(self.episodes), [list(chunks) for chunks in self.chunks], list(self.is_lost))

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
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> EpisodeJournal:
        """Return what `to_tensors` described."""
        pieces = tensors["chunks"].split(tensors["num_chunks"].tolist()) if len(tensors["chunks"]) else []
        chunks = [list(piece.unbind()) for piece in pieces] or [[] for _ in tensors["episodes"]]
        return cls(tensors["episodes"].tolist(), chunks, tensors["is_lost"].tolist())
