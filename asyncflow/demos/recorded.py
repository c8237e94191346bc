"""Read and write numbers, images and point clouds in robomimic's layout: names, shapes and checks.

Images are stored as robomimic does, point clouds beside them. A new kind is an entry of `RECORDED`.

Shapes: L steps of one demonstration, Q points of a cloud.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from asyncflow.config.observations import IMAGES, KINDS, POINTS, read_settings
from asyncflow.config.sections import EnvConfig
from asyncflow.errors import ConfigError

SETTINGS_KEY = "point_settings"  # of `env_args`


@dataclass(frozen=True)
class Recorded:
    """The layout of one kind of observation in a dataset.

    Attributes:
        suffix: Behind the camera, in the name of an observation.
        store: One picture's array of what `Simulator.render` returned.
        read: A dataset's array of one demonstration, how many steps that has, `EnvSpec.rendered_with` and the file's
            name in a refusal, to [L, ...]; refuses another type or shape by ConfigError.
    """

    suffix: str
    store: Callable[[NDArray[Any]], NDArray[Any]]
    read: Callable[[h5py.Dataset, int, Mapping[str, Any], str], Tensor]


def read_finite(dataset: h5py.Dataset, source: str) -> Tensor:
    """Return a dataset of numbers as float32, a row a step; one that is not finite would make every weight NaN.

    Args:
        dataset: What to read.
        source: Names the file in a refusal.

    Raises:
        ConfigError: A number is not finite, or too large for float32; the message names its place and its step.
    """
    stored = dataset[()]
    with np.errstate(over="ignore"):
        numbers = torch.from_numpy(stored.astype(np.float32))  # numpy reads types that torch lacks, big-endian ones too
    is_bad = ~numbers.isfinite()
    if bool(is_bad.any()):
        place = tuple(int(index) for index in is_bad.nonzero()[0])
        raise ConfigError(
            f"{source}: {dataset.name}: step {place[0]} holds {stored[place]}; every number must be finite in float32"
        )
    return numbers


def _read_images(images: h5py.Dataset, num_steps: int, _: Mapping[str, Any], source: str) -> Tensor:
    """Return [L, 3, height, width] uint8; [L, height, width, 3] is stored."""
    if images.dtype != "uint8" or images.ndim != 4 or images.shape[::3] != (num_steps, 3):
        raise ConfigError(f"{source}: {images.name} must be uint8 [steps, height, width, 3]")
    return torch.from_numpy(images[()]).permute(0, 3, 1, 2).contiguous()


def _read_clouds(clouds: h5py.Dataset, num_steps: int, settings: Mapping[str, Any], source: str) -> Tensor:
    """Return [L, Q, 6] float32."""
    num_points = settings["num_points"]
    if clouds.dtype != "float32" or clouds.shape != (num_steps, num_points, 6):
        raise ConfigError(f"{source}: {clouds.name} must be float32 [steps, {num_points} (env.num_points), 6]")
    return read_finite(clouds, source)


RECORDED = {
    IMAGES: Recorded("_image", lambda image: image.transpose(1, 2, 0), _read_images),
    POINTS: Recorded("_points", lambda cloud: cloud, _read_clouds),
}


def read_recorded(demo: h5py.Group, kind: str, camera: str, settings: Mapping[str, Any], source: str) -> Tensor:
    """Return what a camera yielded in one demonstration, [L, ...].

    Args:
        demo: The demonstration; it has `actions` and `obs`.
        kind: Of observations.
        camera: One that `env` asks for.
        settings: As `EnvSpec.rendered_with`.
        source: Names the file in a refusal.

    Raises:
        ConfigError: There is none, or of another type or shape, or with a number that is not finite.
    """
    suffix, words = RECORDED[kind].suffix, f"{KINDS[kind].words} of env.{KINDS[kind].key}"
    dataset = demo["obs"].get(camera + suffix)
    if not isinstance(dataset, h5py.Dataset):
        found = ", ".join(key.removesuffix(suffix) for key in demo["obs"] if key.endswith(suffix))
        raise ConfigError(f"{source}: {demo.name} has no {words} = {camera}; cameras: {found or 'none'}")
    return RECORDED[kind].read(dataset, len(demo["actions"]), settings, source)


def take_settings(env_meta: dict[str, Any], env_config: EnvConfig, source: str) -> dict[str, Any]:
    """Take how what cameras yield was made out of a dataset's description of its environment.

    Returns:
        As `EnvSpec.rendered_with`: what the dataset says, and the configuration's where it says nothing.

    Raises:
        ConfigError: The dataset says what `env` does not allow.
    """
    recorded, settings = env_meta.pop(SETTINGS_KEY, {}), read_settings(env_config)
    if not settings:
        return {}
    try:
        settings |= {key: recorded[key] for key in settings if key in recorded}
        EnvConfig(**settings)
    except (TypeError, ValidationError):
        raise ConfigError(
            f"{source}: attribute `env_args`: {SETTINGS_KEY} must hold {', '.join(settings)} as `env` has them"
        ) from None
    return settings
