"""Examples: what pre-training draws from demonstrations, an observation and the actions that followed it.

Chunks and histories are cut here, and images are augmented; other kinds of observation stay as they are.

Shapes: B examples in a batch, M steps of all demonstrations, L of one, O env steps of a history (n_obs_steps), P
predicted actions (horizon), A action size, D state size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from tensordict import TensorDict
from torch import Tensor

from asyncflow.config.observations import IMAGES, Field
from asyncflow.policies.networks.image_encoder import random_shift


@dataclass(frozen=True)
class Examples:
    """One example a step of every demonstration.

    Attributes:
        fields: As `EnvSpec.obs`, for one env step.
        obs: Key of a field -> [M, ...], such as `state` [M, D].
        frames: [M, O] int64 rows of `obs` that the example observes, oldest first.
        chunks: [M, P, A] actions that follow.
    """

    fields: dict[str, Field]
    obs: dict[str, Tensor]
    frames: Tensor
    chunks: Tensor

    def __len__(self) -> int:
        return len(self.chunks)

    def to(self, device: torch.device) -> Examples:
        """Return the examples on a device."""
        obs = {key: x.to(device) for key, x in self.obs.items()}
        return replace(self, obs=obs, frames=self.frames.to(device), chunks=self.chunks.to(device))

    def pick(self, rows: Tensor) -> tuple[TensorDict, Tensor]:
        """Return observations [B], images as they are, and the chunks that followed, [B, P, A], of examples `rows`."""
        return self.observe(rows, None, 0), self.chunks[rows]

    def observe(self, rows: Tensor, generator: torch.Generator | None, max_shift: int) -> TensorDict:
        """Return the observations [B] of examples `rows` [B], as an environment would give them.

        Args:
            rows: Which examples.
            generator: Shifts the images, and draws nothing where there are none.
            max_shift: Pixels by which images are shifted at most, down or up and right or left; 0 leaves them.
        """
        frames, size = self.frames[rows], [len(rows)]
        if frames.shape[1] == 1:  # without a history there is no dimension for it
            frames = frames.squeeze(1)
        obs, kinds = TensorDict({}, batch_size=size), {field.kind for field in self.fields.values()}
        offsets = None
        if IMAGES in kinds and max_shift:
            offsets = torch.randint(-max_shift, max_shift + 1, (len(rows), 2), generator=generator)
        for key, field in self.fields.items():
            values = self.obs[key][frames]
            shown = random_shift(values, offsets) if field.kind == IMAGES and offsets is not None else values
            obs[field.path(key)] = shown
        return obs


def cut_chunks(actions: list[Tensor], horizon: int) -> Tensor:
    """Return the [M, P, A] actions from every step on; the last action repeats past an episode's end.

    Args:
        actions: One [L, A] tensor a demonstration.
        horizon: P.
    """
    chunks = []
    for each in actions:
        steps = torch.arange(len(each))[:, None] + torch.arange(horizon)
        chunks.append(each[steps.clamp(max=len(each) - 1)])
    return torch.cat(chunks)


def cut_histories(lengths: list[int], n_obs_steps: int) -> Tensor:
    """Return the [M, O] rows that every step observes; the first one repeats before an episode's beginning.

    Args:
        lengths: Steps of each demonstration; they follow one another.
        n_obs_steps: O.
    """
    histories, start = [], 0
    for length in lengths:
        steps = torch.arange(length)[:, None] + torch.arange(1 - n_obs_steps, 1)
        histories.append(start + steps.clamp(min=0))
        start += length
    return torch.cat(histories)
