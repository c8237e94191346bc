"""robomimic's datasets as tensors.

Files that cannot be used are refused here, with the reason.

Shapes: L steps of one demonstration, A action size, D state size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import Tensor

from asyncflow.config.controllers import Limits, find_action_limits, name_robots
from asyncflow.config.observations import KINDS, STATE, asked_cameras, field_key
from asyncflow.config.sections import EnvConfig
from asyncflow.config.task_table import Task
from asyncflow.config.tasks import check_env_meta, find_described_task, parse_env_meta
from asyncflow.demos.choice import ALL, choose_demonstrations, find_failures
from asyncflow.demos.recorded import read_finite, read_recorded, take_settings
from asyncflow.errors import ConfigError
from asyncflow.simulators.spec import EnvSpec


@dataclass(frozen=True)
class Demonstrations:
    """A dataset in memory.

    Attributes:
        spec: What was recorded, for one env step: its `obs` are the keys of `obs`, its limits those of `actions`.
        obs: Key of `spec.obs` -> one [L, ...] tensor a demonstration.
        actions: One [L, A] float32 tensor a demonstration, within the controller's limits.
        notice: One line where actions had to be clipped to them; empty otherwise.
        choice: In words, which of the dataset's demonstrations these are.
        num_failures: How many of them never solve their task; None where the dataset does not tell.
    """

    spec: EnvSpec
    obs: dict[str, list[Tensor]]
    actions: list[Tensor]
    notice: str = ""
    choice: str = ALL
    num_failures: int | None = None


def read_dataset(
    dataset: str | Path,
    env_config: EnvConfig,
    filter_key: str | None = None,
    only_successes: bool = False,
    default_horizon: Callable[[Task], int] = lambda task: task.horizon,
) -> Demonstrations:
    """Load the low-dimensional observations and actions of demonstrations, and what the asked cameras saw.

    Args:
        dataset: HDF5 file in robomimic's layout.
        env_config: Says which observations and cameras.
        filter_key: Which demonstrations; see `choose_demonstrations`.
        only_successes: Leave out those that never solve their task.
        default_horizon: The horizon of the dataset's task, where `env_config` has none.

    Raises:
        ConfigError: A missing file, not HDF5, not robomimic's layout, of another simulator, missing observations or
            actions, a number that is not finite, or no demonstrations.
    """
    path = Path(dataset)
    if not path.is_file():
        raise ConfigError(f"--dataset {path}: no such file")
    try:
        file = h5py.File(path, "r")
    except OSError:
        raise ConfigError(f"--dataset {path}: not an HDF5 file, or truncated") from None
    with file:
        try:
            return _read_demonstrations(
                file, env_config, path, filter_key, only_successes, default_horizon=default_horizon
            )
        except (OSError, KeyError, RuntimeError) as error:  # what h5py raises for damaged blocks and broken links
            raise ConfigError(f"--dataset {path}: damaged: {' '.join(str(error).split())}") from None


def _read_demonstrations(  # noqa: PLR0913  those of `read_dataset`
    file: h5py.File,
    env_config: EnvConfig,
    path: Path,
    filter_key: str | None,
    only_successes: bool,
    *,
    default_horizon: Callable[[Task], int],
) -> Demonstrations:
    env_meta, source = _read_env_meta(file, path), f"--dataset {path}"
    settings = take_settings(env_meta, env_config, source)
    choice = choose_demonstrations(file, filter_key, source)
    task = find_described_task(env_meta, env_config, source)
    obs_keys = tuple(env_config.obs_keys or task.obs_keys)
    groups = [file["data"][name] for name in choice.names]
    for group in groups:
        _check_demo(group, obs_keys, path)
    failures = find_failures(groups, env_meta)
    if only_successes:
        groups, failures = _keep_successes(groups, failures, source), []
    states = [torch.cat([_read(group["obs"][key], source) for key in obs_keys], dim=1) for group in groups]
    actions = [_read(group["actions"], source) for group in groups]
    if len({(row.shape[1], action.shape[1]) for row, action in zip(states, actions, strict=True)}) > 1:
        raise ConfigError(f"--dataset {path}: demonstrations differ in the size of their observations or actions")
    action_limits = _find_limits(env_meta, actions)
    actions, notice = _clip_actions(actions, action_limits)
    obs = {STATE: states} | _read_cameras(groups, env_config, settings, source)
    spec = EnvSpec(
        {key: tuple(parts[0].shape[1:]) for key, parts in obs.items()},
        action_dim=actions[0].shape[1],
        horizon=env_config.horizon or default_horizon(task),
        env_meta=env_meta,
        obs_keys=obs_keys,
        action_low=action_limits[0],
        action_high=action_limits[1],
        rendered_with=settings,
    )
    return Demonstrations(
        spec=spec,
        obs=obs,
        actions=actions,
        notice=notice,
        choice=choice.meaning,
        num_failures=None if failures is None else len(failures),
    )


def _keep_successes(groups: list[h5py.Group], failures: list[int] | None, source: str) -> list[h5py.Group]:
    """Return the demonstrations but for failures.

    Raises:
        ConfigError: The dataset does not tell them apart, or there are only failures.
    """
    if failures is None:
        raise ConfigError(
            f"--only-successes: {source} does not tell: a demonstration has no `rewards` that tell it; leave it out"
        )
    if len(failures) == len(groups):
        raise ConfigError(f"--only-successes: not one of {source}'s {len(groups)} demonstrations ever succeeds")
    return [group for place, group in enumerate(groups) if place not in failures]


def _find_limits(env_meta: dict[str, Any], actions: list[Tensor]) -> Limits:
    """Return the limits of the controller; where only its simulator knows them, those of recorded actions beyond 1."""
    kwargs, size = env_meta["env_kwargs"], actions[0].shape[1]
    limits = find_action_limits(kwargs.get("controller_configs"), name_robots(kwargs), size)
    if limits is None:
        highest = torch.cat(actions).abs().amax(0).clamp(min=1.0).tolist()
        return tuple(-bound for bound in highest), tuple(highest)
    return limits


def _clip_actions(actions: list[Tensor], limits: Limits) -> tuple[list[Tensor], str]:
    """Return actions as the controller executed them, and what the user should know of that."""
    low, high = map(torch.tensor, limits)
    executed = [part.clamp(low, high) for part in actions]
    changed = torch.cat([(part != clipped).any(1) for part, clipped in zip(actions, executed, strict=True)])
    if not bool(changed.any()):
        return actions, ""
    beyond = torch.cat(actions)[changed]
    column = int((beyond - beyond.clamp(low, high)).abs().amax(0).argmax())
    return executed, (
        f"actions of {int(changed.sum())} of {len(changed)} steps are beyond the controller's limits, such as "
        f"{beyond[:, column].abs().max():g} in dimension {column}, limits {low[column]:g} to {high[column]:g}: "
        "clipped, as the controller executed them"
    )


def _read_cameras(
    groups: list[h5py.Group], env_config: EnvConfig, settings: dict[str, Any], source: str
) -> dict[str, list[Tensor]]:
    """Return what cameras saw: key of the field -> one tensor a demonstration."""
    seen: dict[str, list[Tensor]] = {}
    for kind, cameras in asked_cameras(env_config).items():
        for camera in cameras:
            parts = [read_recorded(group, kind, camera, settings, source) for group in groups]
            if len({part.shape[1:] for part in parts}) > 1:
                raise ConfigError(f"{source}: demonstrations differ in the size of their {KINDS[kind].words}")
            seen[field_key(kind, camera)] = parts
    return seen


def _read_env_meta(file: h5py.File, path: Path) -> dict[str, Any]:
    source = f"--dataset {path}"
    if not isinstance(file.get("data"), h5py.Group) or "env_args" not in file["data"].attrs:
        raise ConfigError(f"{source}: no attribute `env_args` on group `data`; not a robomimic dataset")
    source += ": attribute `env_args`"
    return check_env_meta(parse_env_meta(file["data"].attrs["env_args"], source), source)


def _check_demo(demo: Any, obs_keys: tuple[str, ...], path: Path) -> None:
    """Refuse a demonstration that lacks something, or whose arrays are not one row of numbers for each of its steps."""
    obs: Any = demo.get("obs") if isinstance(demo, h5py.Group) else None
    available = sorted(obs) if isinstance(obs, h5py.Group) else []
    missing = [key for key in obs_keys if key not in available]
    if missing:
        raise ConfigError(
            f"--dataset {path}: {demo.name} lacks the observations {', '.join(missing)}; "
            f"available: {', '.join(available) or 'none'} (env.obs_keys)"
        )
    if "actions" not in demo:
        raise ConfigError(f"--dataset {path}: {demo.name} lacks `actions`")
    arrays = [demo["actions"], *(obs[key] for key in obs_keys)]
    num_steps = {len(array) if _is_numeric(array) else 0 for array in arrays}
    if len(num_steps) > 1 or 0 in num_steps:
        raise ConfigError(
            f"--dataset {path}: {demo.name} must hold one row of numbers a step, in actions and obs alike"
        )


def _is_numeric(dataset: Any) -> bool:
    return isinstance(dataset, h5py.Dataset) and dataset.ndim > 0 and dataset.dtype.kind in "biuf"


def _read(dataset: h5py.Dataset, source: str) -> Tensor:
    """Return a dataset as [L, size] float32."""
    return read_finite(dataset, source).reshape(len(dataset), -1)
