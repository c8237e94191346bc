"""Several tasks in one set of environments: which layout they share, and the index that tells them apart.

Environment i has task i modulo the number of tasks, so that they are spread evenly, and alike in every run. What a
policy makes of the index is the policy's business.

Shapes: N environments, n of them addressed by one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDict

from asyncflow.config.observations import INDEX, TASK, Field
from asyncflow.config.suites import TaskSpec
from asyncflow.errors import ConfigError
from asyncflow.simulators.spec import EnvSpec

# What of a layout may differ between tasks: it is each task's own, or only says how numbers are called.
_OWN = ("horizon", "env_meta", "task", "instruction", "num_start_states", "tasks")


def join_tasks(specs: Sequence[EnvSpec], names: Sequence[str]) -> EnvSpec:
    """Return the description of environments that are spread over several tasks.

    Args:
        specs: One of each task.
        names: The tasks' names.

    Raises:
        ConfigError: Two tasks observe or act otherwise; one line that says how.
    """
    first = specs[0]
    for spec, name in zip(specs, names, strict=True):
        _check_alike(first, spec, names[0], name)
    tasks = tuple(
        TaskSpec(name, spec.instruction, spec.horizon, spec.num_start_states)
        for spec, name in zip(specs, names, strict=True)
    )
    horizon = max(task.horizon for task in tasks)
    one: dict[str, Any] = {"env_meta": {}, "task": "", "instruction": "", "num_start_states": 0}
    return replace(first, **one, obs=first.obs | {TASK: Field(INDEX, (), "int64")}, horizon=horizon, tasks=tasks)


def _check_alike(first: EnvSpec, other: EnvSpec, first_name: str, other_name: str) -> None:
    layouts = [{k: v for k, v in vars(spec).items() if k not in _OWN} for spec in (first, other)]
    for name, value in layouts[0].items():
        if value != (found := layouts[1][name]):
            shown = [_describe(each) for each in (value, found)]
            raise ConfigError(
                f"env.tasks: {first_name} and {other_name} differ in {name}: {shown[0]} and {shown[1]}; tasks of one "
                "run observe and act alike (env.obs_keys, env.cameras)"
            )


def _describe(value: Any) -> Any:
    """Return a part of a layout as a message shows it: of fields their shapes."""
    is_fields = isinstance(value, dict) and all(isinstance(each, Field) for each in value.values())
    return {key: list(field.shape) for key, field in value.items()} if is_fields else value


def tell_task(obs: TensorDict, spec: EnvSpec, env_ids: Iterable[int]) -> TensorDict:
    """Add to observations [n], where there are several tasks, which one each environment has."""
    if TASK in spec.obs:
        obs[TASK] = torch.tensor(spec.task_ids(env_ids))
    return obs
