"""Presets and overrides: from YAML files and command lines to a validated configuration.

This file decides how values are read and which of them win, whatever the keys mean.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from asyncflow.config.lerobot_folder import adopt_lerobot
from asyncflow.config.overrides import read_value
from asyncflow.config.plain_values import load_yaml
from asyncflow.config.plugins import is_named_simulator, trust_class
from asyncflow.config.sections import Config, validate
from asyncflow.config.task_table import TASKS, Task, own_name
from asyncflow.errors import ConfigError
from asyncflow.files import expand_user

PATH_KEYS = ("env.env_meta", "policy.checkpoint", "policy.vla.model_path")
# YAML's own, and what its constructors let through: bytes that are no text, `!!int x`, `!!bool x`, thousands of `[`.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)


def preset_names() -> list[str]:
    """Return the names of the shipped presets."""
    return sorted(path.stem for path in _preset_folder().glob("*.yaml"))


def _preset_folder() -> Path:
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"


def load_config(preset: str | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """Build a validated configuration of the user's own: a model's class that it names may be imported.

    Args:
        preset: A shipped preset's name or the path of a YAML file; None means the defaults.
        overrides: Dotted key -> value, applied last.

    Raises:
        ConfigError: An unknown preset or key, a wrong type or an impossible combination; the message is one line.
    """
    values = apply_overrides(read_preset(preset) if preset else {}, overrides or {})
    trust_named_class(values)
    env = values.get("env")
    if isinstance(env, dict) and isinstance(env.get("task"), str):
        env["task"] = own_name(env["task"])
    return validate(anchor_paths(adopt_lerobot(values)))


def anchor_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Return nested values with the paths in them made absolute: a run may go on from another folder.

    What is no file or folder here stays as it is: a shipped name, one that `from_pretrained` knows, or a mistake.
    """
    anchored = deepcopy(values)
    for key in PATH_KEYS:
        *parents, leaf = key.split(".")
        section: Any = anchored
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(section.get(leaf), str):
            section[leaf] = anchor(section[leaf])
    algorithm = anchored.get("algorithm")
    terms = algorithm.get("auxiliary") if isinstance(algorithm, dict) else None
    for term in terms if isinstance(terms, list) else []:
        if isinstance(term, dict):
            term |= {key: anchor(value) for key, value in term.items() if key == "dataset"}
    return anchored


def anchor(name: Any) -> Any:
    """Return a path as an absolute one, and anything else as it is."""
    if not isinstance(name, str):
        return name
    path = expand_user(name)
    try:
        return str(path.absolute()) if path.exists() and not _is_shipped(name) else name
    except (OSError, ValueError):  # a name that no file can have
        return name


def _is_shipped(name: str) -> bool:
    return (Path(__file__).parents[1] / "assets" / f"{name}.safetensors").is_file()


def trust_named_class(values: dict[str, Any]) -> None:
    """Trust what nested values name, which must be the user's own and not those of a file.

    That is the model's class, and simulators of the user's own (`env.task=my_simulator:Reach`).
    """
    found: Any = values
    for key in ("policy", "vla", "model_class"):
        found = found.get(key) if isinstance(found, dict) else None
    if isinstance(found, str):
        trust_class(found)
    env = values.get("env")
    tasks = [env.get("task"), *(env.get("tasks") or [])] if isinstance(env, dict) else []
    for task in filter(is_named_simulator, tasks):
        trust_class(task)


def apply_overrides(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return nested values with dotted keys replaced.

    Raises:
        ConfigError: A key goes through something that is not a section.
    """
    for key, value in overrides.items():
        _set_dotted(values, key, value)
    return values


def read_preset(preset: str) -> dict[str, Any]:
    """Return the nested values of a preset's YAML file.

    Raises:
        ConfigError: The preset does not exist or is not a YAML mapping.
    """
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else _preset_folder() / f"{preset}.yaml"
    if not path.is_file():
        raise ConfigError(f"--config {preset}: no such preset or file; presets: {', '.join(preset_names())}")
    try:
        return read_sections(path)
    except ValueError as error:
        raise ConfigError(f"--config {preset}: {error}") from None


def default_horizon(task: Task) -> int:
    """Return the env steps after which `asyncflow train` ends an episode of a task, unless it is told otherwise."""
    for name, known in TASKS.items():
        if known is task and name.lower() in preset_names():
            return load_config(name.lower()).env.horizon or task.horizon
    return task.horizon


def read_sections(path: Path) -> dict[str, Any]:
    """Return the nested values that a YAML file holds.

    Raises:
        ValueError: It is not YAML, or no mapping; the message is one line that does not name the file.
    """
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except _YAML_ERRORS as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected a mapping of sections, got {type(values).__name__}")
    return values


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """Parse `key.sub=value` arguments, each value by the type of its key.

    Raises:
        ConfigError: An argument without `=`, or a list or mapping that is not YAML.
    """
    parsed = {}
    for argument in arguments:
        key, separator, text = argument.partition("=")
        if not separator or not key:
            raise ConfigError(f"{argument!r} is not an override; write section.key=value")
        try:
            parsed[key] = read_value(key, text)
        except _YAML_ERRORS:
            raise ConfigError(f"{key}: cannot read the value {text!r}") from None
    return parsed


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key}: {parent} is not a section")
    values[leaf] = value
