"""Kinds of observations: how each is shaped, which keys of `env` ask for it, and what it is called.

A new kind that cameras yield is an entry of `KINDS`, and one in the table of every room that handles it: who renders it
(`simulators/robosuite/cameras.py`), who looks at it (`policies/networks/encoders.py`) and how datasets hold it
(`demos/recorded.py`). Environments, shared memory and the ring go through the fields of an `EnvSpec`, whatever their
kinds. Loads neither torch nor a simulator.

Shapes: O env steps of a history (n_obs_steps), C cameras of one kind.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import prod
from typing import Any, Mapping, Protocol, Tuple

from asyncflow.errors import ConfigError

Shape = Tuple[int, ...]
Shapes = Mapping[str, Shape]  # name of a camera -> shape
VECTOR, IMAGES, POINTS, INDEX = "vector", "images", "points", "index"
STATE = "state"  # the vector that every environment has
TASK = "task"  # the index that environments have which are spread over several tasks
ITEM_BYTES = {"float32": 4, "uint8": 1, "int64": 8}


class CameraKeys(Protocol):
    """The keys of `env` that decide sizes; `EnvConfig` has them."""

    @property
    def camera_size(self) -> list[int]:
        """Pixels: height, width."""

    @property
    def num_points(self) -> int:
        """Points of a cloud."""


@dataclass(frozen=True)
class Field:
    """One part of an observation, without the environment dimension.

    Attributes:
        kind: `vector`, `index`, or a key of `KINDS`.
        shape: Such as `(19,)`; with a history of n_obs_steps > 1, `(n_obs_steps, 19)`, oldest first. `()` for an index.
        dtype: `float32`, `uint8`, or `int64` for an index.
    """

    kind: str
    shape: Shape
    dtype: str = "float32"

    @property
    def num_bytes(self) -> int:
        """Memory of one observation."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    def path(self, key: str) -> str | tuple[str, str]:
        """Return where in an observation the field with this key is."""
        return (self.kind, name_in(self.kind, key)) if self.kind in KINDS else key

    def with_history(self, n_obs_steps: int) -> Field:
        """Return the field of observations of the last `n_obs_steps` env steps; an index stays, it never changes."""
        return self if self.kind == INDEX else Field(self.kind, (n_obs_steps, *self.shape), self.dtype)


@dataclass(frozen=True)
class Kind:
    """One kind of camera output, such as images.

    Attributes:
        words: What messages call it.
        dtype: Of its numbers.
        form: Its shape; None where a size may be any.
        described: Its shape in words.
        key: The key of `env` that lists the cameras which yield it.
        size_key: The key of `env` that decides its sizes.
        shape: Its shape under a configuration.
        settings: Keys of `env` with which it is made and which its shape does not tell; policy files keep them.
        read_sizes: The keys of `env` that a shape tells, and their values.
    """

    words: str
    dtype: str
    form: tuple[int | None, ...]
    described: str
    key: str
    size_key: str
    shape: Callable[[CameraKeys], Shape]
    settings: tuple[str, ...] = ()
    read_sizes: Callable[[Shape], dict[str, Any]] = lambda _: {}

    def fits(self, shape: Shape) -> bool:
        """Tell whether a shape is one of this kind, with or without a history in front."""
        own = shape[-len(self.form) :]
        sizes = zip(own, self.form)
        return len(shape) - len(self.form) in (0, 1) and all(wanted in (None, size) for size, wanted in sizes)


KINDS = {
    IMAGES: Kind(
        words="images",
        dtype="uint8",
        form=(3, None, None),
        described="(3, height, width)",
        key="cameras",
        size_key="camera_size",
        shape=lambda env: (3, *env.camera_size),
        read_sizes=lambda shape: {"camera_size": list(shape[-2:])},
    ),
    POINTS: Kind(
        words="point clouds",
        dtype="float32",
        form=(None, 6),
        described="(num_points, 6)",
        key="point_clouds",
        size_key="num_points",
        shape=lambda env: (env.num_points, 6),
        settings=("num_points", "point_bounds", "camera_size"),
    ),
}
SETTINGS = {setting for kind in KINDS.values() for setting in kind.settings}


def field_key(kind: str, name: str) -> str:
    """Return the key of a camera's field, such as `images.agentview`, which is `obs["images", "agentview"]`."""
    return f"{kind}.{name}"


def name_in(kind: str, key: str) -> str:
    """Return what a key names within its kind: a camera, or the vector or index itself."""
    return key[len(kind) + 1 :] if kind in KINDS and key.startswith(f"{kind}.") else key


def make_field(key: str, shape: Shape) -> Field:
    """Return the field that a key and a bare shape mean: `images.` or `points.` and a camera's name, or a vector's."""
    kind, sizes = key.partition(".")[0], tuple(shape) if isinstance(shape, list) else shape
    return Field(kind, sizes, KINDS[kind].dtype) if kind in KINDS and kind != key else Field(VECTOR, sizes)


def asked_cameras(config: CameraKeys) -> dict[str, tuple[str, ...]]:
    """Return kind -> the cameras of which a configuration wants it; a kind that it does not want is absent."""
    asked = {name: tuple(getattr(config, kind.key)) for name, kind in KINDS.items()}
    return {name: cameras for name, cameras in asked.items() if cameras}


def rendered_fields(config: CameraKeys) -> dict[str, Field]:
    """Return the fields that cameras yield, for one env step."""
    return {
        field_key(name, camera): Field(name, KINDS[name].shape(config), KINDS[name].dtype)
        for name, cameras in asked_cameras(config).items()
        for camera in cameras
    }


def rendered_rooms(config: CameraKeys) -> dict[str, Shape]:
    """Return kind -> [C, ...], what all cameras of a kind yield at one env step."""
    return {name: (len(cameras), *KINDS[name].shape(config)) for name, cameras in asked_cameras(config).items()}


def read_settings(config: CameraKeys) -> dict[str, Any]:
    """Return the keys of `env` with which what cameras yield is made, and their values as JSON gives them back."""
    keys = [key for name in asked_cameras(config) for key in KINDS[name].settings]
    values = {key: getattr(config, key) for key in keys}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def read_cameras(fields: Mapping[str, Field]) -> dict[str, list[str]]:
    """Return the key of `env` of every kind, and the cameras of which these fields are that kind."""
    return {
        kind.key: [name_in(name, key) for key, field in fields.items() if field.kind == name]
        for name, kind in KINDS.items()
    }


def read_sizes(fields: Mapping[str, Field]) -> dict[str, Any]:
    """Return the keys of `env` that the shapes of these fields tell, and their values."""
    sizes: dict[str, Any] = {}
    for field in fields.values():
        if field.kind in KINDS:
            sizes.update(KINDS[field.kind].read_sizes(field.shape))
    return sizes


def refuse_unseen(fields: Mapping[str, Field], who: str, seen: Collection[str]) -> None:
    """Refuse what a policy would not look at: to render it takes most of the time.

    Args:
        fields: What the environments observe.
        who: The policy, as the message names it.
        seen: The kinds that it looks at, besides vectors.

    Raises:
        ConfigError: Names the key of `env` that asks for the rest.
    """
    for name, kind in KINDS.items():
        unseen = [name_in(name, key) for key, field in fields.items() if field.kind == name and name not in seen]
        if unseen:
            raise ConfigError(f"env.{kind.key} = {unseen}: {who} sees no {kind.words}; use []")
