"""A run's folder: its name, its configuration, the versions it runs on, and who writes in it.

Checkpoints and metrics have files of their own.

    config.yaml  versions.json  metrics.jsonl  lock  checkpoints/
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from asyncflow.config.interpreters import KINDS, remembered
from asyncflow.config.presets import PATH_KEYS, anchor, apply_overrides, read_sections, trust_named_class
from asyncflow.config.removed import take_removed
from asyncflow.config.sections import Config, validate, values_by_key
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.files import lock_file, make_new_folder, write_atomically
from asyncflow.terminal import command

# What may differ in a resumed run: none of it changes what a finished update was.
CHANGEABLE = (
    "trainer.total_updates", "trainer.total_env_steps", "trainer.save_interval", "trainer.keep_last",
    "trainer.eval_interval", "trainer.eval_episodes", "trainer.device", "logging.logger",
    "env.num_workers", "env.python", "env.step_timeout_s", "env.max_restarts", "env.restart_window_s",
    "algorithm.max_nonfinite_steps", "policy.compile", "logging.trace",
)  # fmt: skip
_WRITTEN = ("metrics.jsonl", "versions.json", "trace.json")  # by a new run, besides config.yaml and checkpoints
# What a run opens to write, so that a link there would lead a stranger's folder to the user's own files.
_WRITTEN_IN_PLACE = ("lock", "metrics.jsonl", "trace*.json", "events.out.tfevents.*")
_KERNEL_VARIABLES = ("OPENBLAS_CORETYPE", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
_VERSIONS = TypeAdapter(dict[str, str])
_PACKAGES = ("asyncflow", "torch", "tensordict", "robosuite", "robomimic", "mujoco", "numpy")


def name_run_folder(config: Config) -> Path:
    """Return the folder of a new run; creates nothing. One that nobody asked for may get a number behind its name.

    Raises:
        ConfigError: The folder already holds a run, or files that a run would write to.
    """
    trainer = config.trainer
    default = f"runs/{name_tasks(config)}_{trainer.buffer_type}_seed{trainer.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.logging.out or default)
    _refuse_run(folder)
    return folder


def name_tasks(config: Config) -> str:
    """Return what a folder calls a run's tasks; ids of gymnasium and members of a suite have `:` and `/` in them."""
    return re.sub(r"[:/]", "-", config.env.task_label)


def _refuse_run(folder: Path) -> None:
    try:
        if (folder / "config.yaml").exists():
            raise ConfigError(
                f"logging.out = {folder}: already holds a run; choose another folder, or go on with it: "
                f"{command('train', '--resume', folder)}"
            )
        found = [name for name in _WRITTEN if (folder / name).exists()]
        found += [f"checkpoints/{path.name}" for path in (folder / "checkpoints").glob("*")]
    except OSError as error:
        raise ConfigError(f"logging.out = {folder}: {error.strerror}") from None
    if found:
        raise ConfigError(f"logging.out = {folder}: already holds {found[0]}, which is not this run's; choose another")


def create_run_folder(folder: Path, config: Config) -> tuple[Path, int]:
    """Create the folder of a new run, with its configuration and the versions it runs on, and lock it.

    Returns:
        The folder, whose name gets a number if nobody asked for it and another run has just taken it; and the
        descriptor, as `lock_run_folder`.

    Raises:
        ConfigError: The folder cannot be created, or another process has begun a run in it since it was named.
    """
    try:
        if config.logging.out is None:
            folder = make_new_folder(folder)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"logging.out = {folder}: {error.strerror}") from None
    descriptor = lock_run_folder(folder)
    try:
        _refuse_run(folder)
        _describe_run(folder, config)
    except BaseException:
        os.close(descriptor)
        raise
    return folder, descriptor


def _describe_run(folder: Path, config: Config) -> None:
    try:
        write_atomically(folder / "versions.json", json.dumps(describe_versions(), indent=2).encode())
        write_config(folder, config)
    except OSError as error:
        raise ConfigError(f"logging.out = {folder}: {error.strerror}") from None


def write_config(folder: Path, config: Config) -> None:
    """Write or replace a run's resolved configuration."""
    write_atomically(folder / "config.yaml", yaml.safe_dump(config.model_dump(by_alias=True), sort_keys=False).encode())


def resume_config(folder: Path, overrides: dict[str, Any]) -> Config:
    """Return the configuration with which a run goes on.

    The folder may be a stranger's: of the two, only the overrides are the user's own, and may name a class to import.

    Args:
        folder: The run folder.
        overrides: Dotted key -> value; only `CHANGEABLE` keys may differ from the run's.

    Raises:
        CheckpointError: The folder holds no run, or its configuration is damaged.
        ConfigError: A key cannot be changed in the middle of a run, or a value is wrong.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"--resume {folder}: holds no run (no config.yaml); give the folder that a run wrote")
    try:
        values, _ = take_removed(read_sections(path))  # `tell_removed` tells
    except ValueError as error:
        raise CheckpointError(f"--resume {folder}: config.yaml is damaged: {error}") from None
    run = validate(values)
    overrides = {key: anchor(value) if key in PATH_KEYS else value for key, value in overrides.items()}
    _refuse_changes(run, overrides)
    _check_interpreter(run.env.python, apply_overrides({}, deepcopy(overrides)))
    trust_named_class(apply_overrides({}, deepcopy(overrides)))
    resumed = validate(apply_overrides(values, overrides))
    _refuse_changes(run, values_by_key(resumed))  # a whole section was given, or a part of a value
    return resumed


def _check_interpreter(python: str | None, given: dict[str, Any]) -> None:
    """Refuse a program that only the run's own file names: the folder may be a stranger's.

    Raises:
        ConfigError: It is neither named by the command nor one that `asyncflow envs` remembers.
    """
    named = given.get("env")
    if python is None or python in KINDS or (isinstance(named, dict) and "python" in named):
        return
    if python not in filter(None, map(remembered, KINDS)):
        raise ConfigError(
            f"env.python = {python}: named by the run's config.yaml and not by this command, so that it is not "
            f"started; if you trust that program: env.python={python}"
        )


def tell_removed(folder: Path) -> list[str]:
    """Return a line about every key that an older version took, that the run had changed, and that it goes on without.

    Call it before the run's configuration is written anew.
    """
    return take_removed(read_sections(folder / "config.yaml"))[1]


def _refuse_changes(run: Config, overrides: dict[str, Any]) -> None:
    """Refuse another value than the run's, where that must stay; what is no key is left to the validation."""
    own = values_by_key(run)
    for key, value in overrides.items():
        is_same = key in own and own[key] in (value, os.path.expanduser(value) if isinstance(value, str) else value)
        if key in own and key not in CHANGEABLE and not is_same:
            raise ConfigError(
                f"{key} = {value!r}: cannot change with --resume, the run has {own[key]!r}; "
                f"may change: {', '.join(CHANGEABLE)}"
            )


def lock_run_folder(folder: Path) -> int:
    """Become the only process that writes in a run folder, until it ends; returns the descriptor to close.

    Raises:
        ConfigError: Another process trains there, the folder cannot be written to, or one of the files in it that a
            run writes is a symbolic link.
    """
    try:
        links = [path for path in folder.iterdir() if path.is_symlink() and any(map(path.match, _WRITTEN_IN_PLACE))]
        if links:
            raise ConfigError(f"{links[0]}: is a symbolic link, through which a run writes nothing; remove it")
        descriptor = lock_file(folder / "lock")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write in it: {error.strerror}") from None
    if descriptor is None:
        raise ConfigError(f"{folder}: another process is training in this run folder; stop it first")
    return descriptor


def describe_versions() -> dict[str, str]:
    """Return what a result depends on besides its configuration: package versions, Python, git commit, processor."""
    versions = {"python": platform.python_version(), "git_commit": _git_commit(), "processor": _processor()}
    return versions | {package: _version(package) for package in _PACKAGES}


def changed_versions(folder: Path) -> list[str]:
    """Return, a line each, which versions are not those that the run began with."""
    try:
        before = _VERSIONS.validate_json((folder / "versions.json").read_bytes())
    except (OSError, ValidationError):
        return ["versions.json is missing or damaged"]
    now = describe_versions()
    # Older runs did not note their processor.
    return [f"{name} was {before[name]}, is {now[name]}" for name in now if before.get(name, now[name]) != now[name]]


def note_simulators(folder: Path, versions: Mapping[str, str]) -> list[str]:
    """Add to `versions.json` what simulates; return, a line each, which versions are not those of the run's beginning.

    Args:
        folder: The run folder.
        versions: As `VecEnv.versions`.
    """
    path = folder / "versions.json"
    try:
        before = _VERSIONS.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return []  # `changed_versions` says so
    now = {f"simulators.{name}": version for name, version in versions.items()}
    noted = {name: version for name, version in before.items() if name.startswith("simulators.")}
    if not noted:
        write_atomically(path, json.dumps(before | now, indent=2).encode())
        return []
    found = {name: (noted.get(name, "not there"), now.get(name, "not there")) for name in sorted(noted | now)}
    return [f"{name} was {was}, is {now_is}" for name, (was, now_is) in found.items() if was != now_is]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """Return what decides how matrix products round: the processor, and the variables that choose kernels for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    chosen = [f"{name}={os.environ[name]}" for name in _KERNEL_VARIABLES if os.environ.get(name)]
    return ", ".join([name, *chosen])


def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
