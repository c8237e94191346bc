"""Layers that every policy is made of: normalisation, fully connected networks, features of time."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

NUM_TIME_FEATURES = 32


class Normalizer(nn.Module):
    """Maps [low, high] to [-1, 1] and back; fixed before training starts, saved with the policy.

    Demonstrations cover less than exploration does: a dimension that hardly moved in them (a quaternion's, which then
    flips its sign) would otherwise arrive as hundreds. Hence the floor of the range and the limit of what is passed on.
    Without demonstrations there is no range to speak of: the identity, without a limit.
    """

    MIN_HALF_RANGE = 0.05
    LIMIT = 5.0

    offset: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))
        self.is_fitted = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load as every module does; what is not the identity was fitted to data."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.is_fitted = bool((self.offset != 0).any() or (self.scale != 1).any())

    def set_range(self, low: Tensor, high: Tensor, unit: Tensor | None = None) -> None:
        """Fit the range, in the original units; half of it counts as `MIN_HALF_RANGE` of a `unit`, 1, at least."""
        half = (high - low) / 2
        unit = torch.ones_like(half) if unit is None else unit
        self.offset.copy_((high + low) / 2)
        self.scale.copy_(half.maximum(self.MIN_HALF_RANGE * unit))
        self.is_fitted = True

    def normalize(self, x: Tensor) -> Tensor:
        """Return `x` in normalised units, within `LIMIT` of the data that it was fitted to."""
        normalized = (x - self.offset) / self.scale
        return normalized.clamp(-self.LIMIT, self.LIMIT) if self.is_fitted else normalized

    def clipped_shares(self, x: Tensor) -> Tensor:
        """Return how many of the rows of `x [..., D]` `LIMIT` cuts, [D], 0 to 1."""
        is_clipped = ((x - self.offset) / self.scale).abs() > self.LIMIT
        return is_clipped.float().flatten(0, -2).mean(0)

    def denormalize(self, x: Tensor) -> Tensor:
        """Return `x` in the original units."""
        return x * self.scale + self.offset


def mlp(sizes: list[int], output_gain: float = 1.0) -> nn.Sequential:
    """Return a ReLU network with orthogonal weights (gain sqrt 2, `output_gain` in the last layer) and zero biases.

    Args:
        sizes: Width of input, hidden layers and output.
        output_gain: Gain of the last layer; small values make the first outputs small.
    """
    layers: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        is_last = index == len(sizes) - 2
        linear = nn.Linear(fan_in, fan_out)
        nn.init.orthogonal_(linear.weight, output_gain if is_last else 2**0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear] if is_last else [linear, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def time_features(time: Tensor) -> Tensor:
    """Return sines and cosines of `time`, `[..., E]`, with periods from 4 down to 0.25, geometrically spaced.

    Shorter periods tell no more steps apart and make the velocity of a small network rough in time.
    """
    periods = torch.logspace(math.log10(4), math.log10(0.25), NUM_TIME_FEATURES // 2, device=time.device)
    angle = time[..., None] * (2 * math.pi / periods)
    return torch.cat([angle.sin(), angle.cos()], -1)
