"""Point encoder: from point clouds to the features that actor and critic see beside the state.

The network applies the same small MLP on every point, then the maximum over points, so that neither their order nor
their repetition matters (PointNet, arXiv:1612.00593, section 4.2); layer norm and a projection behind the maximum
instead of transformation networks and batch norm (DP3, arXiv:2403.03954).

Shapes: N observations, O env steps of a history (n_obs_steps), P points of a cloud, F features of an observation.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from asyncflow.config.observations import Shapes
from asyncflow.policies.networks.layers import Normalizer

NUM_FEATURES = 64
_NUM_CHANNELS = 6  # x, y, z, r, g, b
_WIDTHS = (_NUM_CHANNELS, 32, 64, 128)  # a quarter of DP3's work, for training on a CPU


class PointNet(nn.Module):
    """A cloud's features; a function of the set of its points."""

    def __init__(self) -> None:
        super().__init__()
        layers = [(nn.Linear(i, o), nn.LayerNorm(o), nn.ReLU()) for i, o in pairwise(_WIDTHS)]
        self.points = nn.Sequential(*(part for layer in layers for part in layer))
        self.projection = nn.Sequential(nn.Linear(_WIDTHS[-1], NUM_FEATURES), nn.LayerNorm(NUM_FEATURES))

    def forward(self, clouds: Tensor) -> Tensor:
        """Return `[..., NUM_FEATURES]` of clouds `[..., P, 6]`."""
        each: Tensor = self.points(clouds)
        features: Tensor = self.projection(each.max(-2).values)
        return features


class PointEncoder(nn.Module):
    """One network a camera; the clouds of a history share it.

    Attributes:
        num_features: F, of all cameras and the whole history.
        normalizer: Of a point's six numbers, in one frame for all cameras; the identity unless pre-training fits it.
    """

    def __init__(self, shapes: Shapes) -> None:
        """Build the networks for camera -> `(P, 6)`, with O in front for a history."""
        super().__init__()
        self.normalizer = Normalizer((_NUM_CHANNELS,))
        self.cameras = nn.ModuleDict({camera: PointNet() for camera in shapes})
        self.num_features = sum(NUM_FEATURES * prod(shape[:-2]) for shape in shapes.values())

    def forward(self, points: TensorDictBase) -> Tensor:
        """Return the features [N, F] of clouds, camera -> [N, P, 6] or [N, O, P, 6]."""
        clouds = [(network, self.normalizer.normalize(points[camera])) for camera, network in self.cameras.items()]
        return torch.cat([network(cloud).flatten(1) for network, cloud in clouds], 1)
