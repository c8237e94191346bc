"""The settings from which a robosuite simulator is built; needs the standard library alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from asyncflow.config.observations import KINDS, Field
from asyncflow.config.task_table import Task
from asyncflow.errors import ConfigError


@dataclass(frozen=True)
class SimulatorSettings:
    """Everything that a simulator is built from, apart from its seed.

    Attributes:
        task: The task, or a description of one that the table lacks, from `env_meta`.
        horizon: Env steps until an episode is truncated.
        obs_keys: robomimic's names of what `state` concatenates.
        env_meta: robomimic's description; None means one built from the task.
        fast_step: Whether simulators that `FastStep` covers are stepped by it.
        rendered: What cameras yield, as in `EnvSpec.obs`, for one env step.
        rendered_with: As `EnvSpec.rendered_with`.
        camera_size: Height and width of what cameras render, in pixels.
        instruction: What the robot is told to do, in words.
    """

    task: Task
    horizon: int
    obs_keys: tuple[str, ...]
    env_meta: dict[str, Any] | None = None
    fast_step: bool = True
    rendered: dict[str, Field] = field(default_factory=dict)
    rendered_with: dict[str, Any] = field(default_factory=dict)
    camera_size: tuple[int, int] = (84, 84)
    instruction: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a message to a simulator's process holds them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SimulatorSettings:
        """Return what `to_json` described."""
        rendered = {
            key: Field(each["kind"], tuple(each["shape"]), each["dtype"]) for key, each in values["rendered"].items()
        }
        tuples = {key: tuple(values[key]) for key in ("obs_keys", "camera_size")}
        return cls(**{**values, **tuples, "task": Task.from_json(values["task"]), "rendered": rendered})

    @property
    def rendering_key(self) -> str | None:
        """The key of the configuration because of which something is rendered; None if nothing is."""
        kinds = {each.kind for each in self.rendered.values()}
        return next((f"env.{kind.key}" for name, kind in KINDS.items() if name in kinds), None)


def check_camera_names(kind: str, asked: tuple[str, ...], available: tuple[str, ...]) -> None:
    """Refuse cameras that are not there.

    Raises:
        ConfigError: Names the key of the kind, the first one, and those that are there.
    """
    for name in asked:
        if name not in available:
            key = f"env.{KINDS[kind].key}"
            raise ConfigError(f"{key}: there is no camera {name!r}; cameras: {', '.join(available)}")
