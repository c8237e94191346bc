"""Chooses a run's environment: its checkpoint's, else `env.env_meta`, else its first policy's, else the task's own.

A policy learned under the controllers and the frequency that its file describes, and `asyncflow eval` measures it
there; so training goes on there too, unless `env.env_meta` says otherwise. A run that goes on needs no other file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from asyncflow.config.observations import asked_cameras
from asyncflow.config.plugins import ENVS, plugin_names
from asyncflow.config.sections import EnvConfig
from asyncflow.config.tasks import TOYS, check_env_meta, find_task, load_env_meta, resolve_task
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.simulators.spec import EnvSpec

MAX_NAMED = 6  # differences in one line


def adopt_environment(config: EnvConfig, start: EnvSpec) -> EnvConfig:
    """Return `env` with the description, the horizon and the observations of the policy that a run starts from.

    What the configuration says stays: `env.env_meta`, `env.horizon`, `env.obs_keys`.

    Raises:
        CheckpointError: The policy was made for another task.
        ConfigError: Observations or cameras are asked for that neither the policy nor the task knows.
    """
    if config.env_meta is not None or config.tasks or not _is_described(start):
        return config
    _check_task(config, start)
    asked = {camera for cameras in asked_cameras(config).values() for camera in cameras}
    known = {camera for by_camera in start.rendered.values() for camera in by_camera}
    if asked - known or set(config.obs_keys or []) - set(start.obs_keys):
        resolve_task(config)  # which names those that the task has
    changes: dict[str, Any] = {"env_meta": start.env_meta, "horizon": config.horizon or start.horizon}
    return config.model_copy(update=changes | {"obs_keys": config.obs_keys or list(start.obs_keys)})


def read_description(spec: EnvSpec) -> dict[str, Any]:
    """Return the description that a policy file holds; a text in its place is no path to be followed.

    Raises:
        ConfigError: It cannot be simulated here.
    """
    return check_env_meta(spec.env_meta, "env_meta of the policy file")


def _is_described(spec: EnvSpec) -> bool:
    """Tell whether robomimic's description builds the environment; a toy's or a package's is built by its name."""
    return bool(spec.env_meta) and not spec.task


def _check_task(config: EnvConfig, start: EnvSpec) -> None:
    name = read_description(start)["env_name"]
    if config.task == name:  # of an environment that asyncflow has no name for
        return
    is_known = config.task not in TOYS and config.task not in plugin_names(ENVS)
    if not is_known or find_task(config.task).env_name != name:
        raise CheckpointError(
            f"env.task = {config.task}: the policy to start from was made for {name}; use its own task, or say by "
            "env.env_meta=FILE which environment is meant"
        )


def restore_environment(config: EnvConfig, saved: EnvSpec) -> EnvConfig:
    """Return `env` with the description that a run's own checkpoint holds."""
    if not _is_described(saved):
        return config
    changes: dict[str, Any] = {
        "env_meta": read_description(saved),
        "horizon": saved.horizon,
        "obs_keys": list(saved.obs_keys),
    }
    return config.model_copy(update=changes)


def tell_change(config: EnvConfig, start: EnvSpec) -> str | None:
    """Return a line if `env.env_meta` describes another environment than a new run's policy was made for."""
    if config.env_meta is None or not _is_described(start):
        return None
    differences = _list_differences(start.env_meta, load_env_meta(config.env_meta))
    return f"env.env_meta differs from what the policy was made for: {differences}" if differences else None


def tell_edit(config: EnvConfig, saved: EnvSpec) -> str | None:
    """Return a line if the file `env.env_meta` no longer describes the environment of a run that goes on."""
    if config.env_meta_file is None or not _is_described(saved):
        return None
    try:
        found = load_env_meta(config.env_meta_file)
    except ConfigError:  # it is gone, or no description any more; nobody needs it
        return None
    differences = _list_differences(saved.env_meta, found)
    if not differences:
        return None
    return (
        f"env.env_meta = {config.env_meta_file} has changed since the run began; it goes on with what its checkpoint "
        f"describes: {differences}"
    )


def _list_differences(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Return which values two descriptions differ in, in words; the simulator's version apart."""
    found = [line for line in _compare("", first, second) if not line.startswith("env_version ")]
    rest = len(found) - MAX_NAMED
    return ", ".join(found[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _compare(key: str, first: Any, second: Any) -> Iterator[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        for name in sorted(first.keys() | second.keys()):
            yield from _compare(f"{key}.{name}" if key else name, first.get(name), second.get(name))
    elif first != second:
        yield f"{key} {first} -> {second}"
