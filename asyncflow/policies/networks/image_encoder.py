"""Image encoder: from what cameras show to the features that actor and critic see beside the state.

The networks are torchvision's residual blocks, with group norm instead of batch norm: a decision depends neither
on its batch nor on a training flag. Keypoints by a spatial softmax: deep spatial autoencoders (arXiv:1509.06113,
equation 2).

Shapes: N observations, O env steps of a history (n_obs_steps), F features of an observation, C channels, B images.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from asyncflow.config.observations import Shapes
from asyncflow.errors import ConfigError

NUM_KEYPOINTS = 32
_SMALL_CHANNELS = (16, 32, 64)
_CHANNELS_PER_GROUP = 16
_BLIND_SIZES = {"small": 9, "resnet18": 32}  # largest images of which one cell is left, where a keypoint cannot move


class SpatialSoftmax(nn.Module):
    """Expected coordinates, in [-1, 1], of each learned feature in an image."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.keypoints = nn.Conv2d(num_channels, NUM_KEYPOINTS, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """Return x and y of the keypoints, [B, 2 * NUM_KEYPOINTS], of features [B, C, height, width]."""
        heat: Tensor = self.keypoints(features)
        height, width = heat.shape[-2:]
        share = heat.float().flatten(2).softmax(-1).view_as(heat)
        x = torch.linspace(-1, 1, width, device=heat.device)
        y = torch.linspace(-1, 1, height, device=heat.device)
        return torch.cat([(share.sum(2) * x).sum(-1), (share.sum(3) * y).sum(-1)], 1)


class ImageEncoder(nn.Module):
    """One network a camera; the images of a history share it.

    Attributes:
        num_features: F, of all cameras and the whole history.
    """

    def __init__(self, kind: str, image_shapes: Shapes) -> None:
        """Build the networks.

        Args:
            kind: `small` or `resnet18`.
            image_shapes: Camera -> `(3, height, width)`, with O in front for a history.

        Raises:
            ConfigError: Images are too small to see anything in, or their names cannot be those of networks.
        """
        super().__init__()
        smallest = min(min(shape[-2:]) for shape in image_shapes.values())
        if smallest <= _BLIND_SIZES[kind]:
            raise ConfigError(
                f"policy.image_encoder = {kind} needs images of more than {_BLIND_SIZES[kind]} pixels a side, "
                f"got {smallest}; see env.camera_size"
            )
        unusable = [camera for camera in image_shapes if "." in camera or hasattr(nn.ModuleDict(), camera)]
        if unusable:
            raise ConfigError(
                f"policy.mapping.obs.images: policy.image_encoder cannot name a network {unusable[0]!r}; "
                "use a name without dots that is no attribute of torch.nn.ModuleDict"
            )
        build = _build_resnet18 if kind == "resnet18" else _build_small
        self.cameras = nn.ModuleDict({camera: build() for camera in image_shapes})
        self.num_features = sum(2 * NUM_KEYPOINTS * prod(shape[:-3]) for shape in image_shapes.values())

    def forward(self, images: TensorDictBase) -> Tensor:
        """Return the features [N, F] of uint8 images, camera -> [N, 3, height, width] or [N, O, 3, height, width]."""
        return torch.cat([self._encode(network, images[camera]) for camera, network in self.cameras.items()], 1)

    def _encode(self, network: nn.Module, images: Tensor) -> Tensor:
        scaled = images.flatten(0, -4).float() / 127.5 - 1
        features: Tensor = network(scaled)
        return features.view(len(images), -1)


def random_shift(images: Tensor, offsets: Tensor) -> Tensor:
    """Shift images, repeating their borders (DrQ, arXiv:2004.13649, section 3.1: the crop of a padded image).

    Args:
        images: [N, ..., height, width].
        offsets: [N, 2] int64 pixels down and right, one pair for all images of an observation.
    """
    height, width = images.shape[-2:]
    rows = (torch.arange(height, device=images.device) - offsets[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - offsets[:, 1:]).clamp(0, width - 1)
    flat = images.flatten(1, -3)
    picked = flat[torch.arange(len(flat))[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.movedim(-1, 1).reshape(images.shape)


def _group_norm(num_channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_channels // _CHANNELS_PER_GROUP, num_channels)


def _build_resnet18() -> nn.Module:
    """Return torchvision's network up to its last feature map, 512 channels at 1/32 of the resolution."""
    from torchvision.models import resnet18  # noqa: PLC0415  seconds, and only images need it

    layers = list(resnet18(weights=None, norm_layer=_group_norm).children())[:-2]
    return nn.Sequential(*layers, SpatialSoftmax(512))


def _build_small() -> nn.Module:
    """Return a stem and two residual blocks: 64 channels at 1/8 of the resolution, for training on a CPU."""
    from torchvision.models.resnet import BasicBlock, conv1x1  # noqa: PLC0415

    # A stride of 4 at once, instead of a norm and a pooling at half the resolution, takes half the time.
    stem = nn.Conv2d(3, _SMALL_CHANNELS[0], kernel_size=8, stride=4, padding=3, bias=False)
    layers: list[nn.Module] = [stem, _group_norm(_SMALL_CHANNELS[0]), nn.ReLU()]
    for stride, (fan_in, fan_out) in enumerate(pairwise(_SMALL_CHANNELS), start=1):
        shortcut = nn.Sequential(conv1x1(fan_in, fan_out, stride), _group_norm(fan_out))
        layers.append(BasicBlock(fan_in, fan_out, stride, shortcut, norm_layer=_group_norm))
    return nn.Sequential(*layers, SpatialSoftmax(_SMALL_CHANNELS[-1]))
