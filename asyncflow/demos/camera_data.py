"""What cameras saw, in datasets in robomimic's layout: images as robomimic stores them, and point clouds beside them.

Owns names, shapes and checks of both, and where a dataset says how its clouds were made. It must not know what is
learned from them.

Shapes: L steps of one demonstration, Q points of a cloud.
"""

from __future__ import annotations

from typing import Any

import h5py
import torch
from pydantic import ValidationError
from torch import Tensor

from asyncflow.config.sections import EnvConfig
from asyncflow.config.tasks import POINT_SETTINGS
from asyncflow.demos.finite import read_finite
from asyncflow.errors import ConfigError

IMAGE_SUFFIX, CLOUD_SUFFIX = "_image", "_points"
SETTINGS_KEY = "point_settings"  # of `env_args`


def read_images(demo: h5py.Group, camera: str, source: str) -> Tensor:
    """Return what a camera saw in one demonstration, [L, 3, height, width] uint8; [L, height, width, 3] is stored.

    Args:
        demo: The demonstration; it has `actions` and `obs`.
        camera: One of `env.cameras`.
        source: Names the file in a refusal.

    Raises:
        ConfigError: There are none, or of another type or shape.
    """
    images = _find(demo, camera + IMAGE_SUFFIX, f"{source}: {demo.name} has no images of env.cameras = {camera}")
    if images.dtype != "uint8" or images.ndim != 4 or images.shape[::3] != (len(demo["actions"]), 3):
        raise ConfigError(f"{source}: {images.name} must be uint8 [steps, height, width, 3]")
    return torch.from_numpy(images[()]).permute(0, 3, 1, 2).contiguous()


def read_clouds(demo: h5py.Group, camera: str, num_points: int, source: str) -> Tensor:
    """Return a camera's point clouds in one demonstration, [L, Q, 6] float32.

    Args:
        demo: As that of `read_images`.
        camera: One of `env.point_clouds`.
        num_points: Q.
        source: Names the file in a refusal.

    Raises:
        ConfigError: There are none, of another type or shape, or with a number that is not finite.
    """
    missing = f"{source}: {demo.name} has no point clouds of env.point_clouds = {camera}"
    clouds = _find(demo, camera + CLOUD_SUFFIX, missing)
    if clouds.dtype != "float32" or clouds.shape != (len(demo["actions"]), num_points, 6):
        raise ConfigError(f"{source}: {clouds.name} must be float32 [steps, {num_points} (env.num_points), 6]")
    return read_finite(clouds, source)


def _find(demo: h5py.Group, name: str, missing: str) -> h5py.Dataset:
    """Return a recorded observation; `missing` begins what is said where there is none."""
    dataset = demo["obs"].get(name)
    if not isinstance(dataset, h5py.Dataset):
        suffix = name[name.rindex("_") :]
        found = ", ".join(key.removesuffix(suffix) for key in demo["obs"] if key.endswith(suffix))
        raise ConfigError(f"{missing}; cameras: {found or 'none'}")
    return dataset


def take_point_settings(env_meta: dict[str, Any], env_config: EnvConfig, source: str) -> dict[str, Any]:
    """Take how clouds were made out of a dataset's description of its environment.

    Returns:
        As `EnvSpec.point_settings`: what the dataset says, and the configuration's where it says nothing.

    Raises:
        ConfigError: The dataset says what `env` does not allow.
    """
    recorded = env_meta.pop(SETTINGS_KEY, {})
    if not env_config.point_clouds:
        return {}
    settings = {key: getattr(env_config, key) for key in POINT_SETTINGS}
    try:
        settings |= {key: recorded[key] for key in POINT_SETTINGS if key in recorded}
        EnvConfig(**settings)
    except (TypeError, ValidationError):
        raise ConfigError(
            f"{source}: attribute `env_args`: {SETTINGS_KEY} must hold {', '.join(POINT_SETTINGS)} as `env` has them"
        ) from None
    return settings
