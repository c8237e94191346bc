"""Completes a command line that leaves something out (the task, its preset), and writes the command that comes next.

Loads torch only where a policy file has to say which task it was made for.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from asyncflow.config.lerobot_folder import is_lerobot_folder
from asyncflow.config.libero import is_libero, list_tasks
from asyncflow.config.overrides import write_value
from asyncflow.config.plugins import is_named_simulator
from asyncflow.config.presets import apply_overrides, load_config, parse_overrides, preset_names, read_preset
from asyncflow.config.sections import values_by_key
from asyncflow.config.suites import SUITES, expand, label
from asyncflow.config.task_table import KNOWN, own_name
from asyncflow.config.tasks import GYM, TOYS, find_task, load_env_meta, name_of_env, task_names
from asyncflow.errors import ConfigError
from asyncflow.files import expand_user


def choose_preset(values: dict[str, Any]) -> str | None:
    """Return the preset of the task that was asked for; the lift preset's weights fit no other task.

    Args:
        values: Dotted key -> value, as a command line gives them.

    Raises:
        ConfigError: The task does not exist, or has neither a preset nor weights to start from.
    """
    task = values.get("env.task", "Lift")
    if tasks := values.get("env.tasks"):
        task = label(expand(tasks)) if isinstance(tasks, list) and all(isinstance(x, str) for x in tasks) else None
    if not isinstance(task, str):
        return None  # the validation will say what is wrong with it
    task = own_name(task)
    if task.startswith(GYM) or is_named_simulator(task):
        return "gym"
    if is_libero(task):
        for name in values.get("env.tasks") or [task]:
            list_tasks(name)  # which refuses what is none
        return "libero"
    presets = {name.replace("_", ""): name for name in preset_names()}
    if (task in KNOWN or task in TOYS or task in SUITES) and task.lower() in presets:
        return presets[task.lower()]
    if task not in task_names() and not values.get("env.tasks"):
        find_task(task)  # which says what is near
    if "policy.checkpoint" not in values:
        tasks = values.get("env.tasks")
        if tasks and (twice := [name for name in tasks if tasks.count(name) > 1]):
            raise ConfigError(f"env.tasks = {tasks} names {twice[0]} twice")
        key = f"env.tasks = {tasks}" if tasks else f"env.task = {task!r}"
        raise ConfigError(
            f"{key}: no preset and no shipped weights; give --checkpoint (`asyncflow pretrain` writes "
            "one), --config, or policy.checkpoint=null to start from scratch"
        )
    return None


def name_task(preset: str | None, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with the task of the policy to start from, or of `env.env_meta`, where they name none.

    Args:
        preset: As for `load_config`.
        values: Dotted key -> value, as a command line gives them.

    Raises:
        ConfigError: The preset, the checkpoint or the description cannot be read.
    """
    sections = apply_overrides(read_preset(preset) if preset else {}, deepcopy(values))
    env, policy = (sections.get(name) or {} for name in ("env", "policy"))
    if not isinstance(env, dict) or not isinstance(policy, dict) or {"task", "tasks"} & env.keys():
        return values
    described, checkpoint = env.get("env_meta"), policy.get("checkpoint")
    if isinstance(described, str | dict):
        name = name_of_env(load_env_meta(described if isinstance(described, dict) else expand_user(described)))
        return values | {"env.task": name} if name in KNOWN else values
    if not isinstance(checkpoint, str) or is_lerobot_folder(expand_user(checkpoint)):
        return values
    from asyncflow.policies.policy_file import read_env_spec, resolve_checkpoint  # noqa: PLC0415  torch takes seconds to load

    spec = read_env_spec(resolve_checkpoint(checkpoint))
    if spec.tasks:
        return values | {"env.tasks": [task.name for task in spec.tasks]}
    name = spec.task or name_of_env(spec.env_meta)
    return values | {"env.task": name} if name else values


def start_from(preset: str | None, overrides: list[str], path: Path, env_keys: dict[str, Any]) -> list[str | Path]:
    """Return the words behind `asyncflow train` with which a run starts from a pre-trained policy.

    Args:
        preset: That of the pre-training.
        overrides: Those of the pre-training.
        path: The policy file.
        env_keys: Dotted key -> what the policy was made for; said only where the run would take another.
    """
    values = parse_overrides(overrides)
    taken = values_by_key(load_config(preset, values))
    is_task_free = "env.task" in name_task(preset, values | {"policy.checkpoint": str(path)}).keys() - values.keys()
    kept = [each for each in overrides if each.partition("=")[0] != "policy.checkpoint"]
    needed = {key: value for key, value in env_keys.items() if value != taken[key]}
    if is_task_free:
        needed.pop("env.task", None)
    words = [f"{key}={write_value(value)}" for key, value in needed.items()]
    return [*(["--config", preset] if preset else []), "--checkpoint", path, *kept, *words]
