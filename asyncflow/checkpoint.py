"""A run's folder: its configuration, versions and checkpoints.

Owns names and atomic writing of everything in a run folder but its metrics. It must not know how a run is trained.

    config.yaml  versions.json  metrics.jsonl  checkpoints/update_000010/{policy.safetensors,state.json}
    checkpoints/last -> update_000010     checkpoints/best -> update_000010
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

from asyncflow.config import Config, PolicyConfig
from asyncflow.envs.base import EnvSpec
from asyncflow.errors import ConfigError
from asyncflow.policies.base import Policy
from asyncflow.policy_file import FILE_NAME, publish_file, save_policy, write_atomically

_PACKAGES = ("asyncflow", "torch", "tensordict", "robosuite", "robomimic", "mujoco", "numpy")


def name_run_folder(config: Config) -> Path:
    """Return the folder of a new run; creates nothing.

    Raises:
        ConfigError: The folder already holds a run.
    """
    trainer = config.trainer
    default = f"runs/{config.env.task}_{trainer.buffer_type}_seed{trainer.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.logging.out or default)
    if (folder / "config.yaml").exists():
        raise ConfigError(f"logging.out = {folder}: already holds a run; choose another folder or remove it")
    return folder


def create_run_folder(folder: Path, config: Config) -> None:
    """Create the folder of a new run, with its configuration and the versions it runs on.

    Raises:
        ConfigError: The folder cannot be created.
    """
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False).encode())
        write_atomically(folder / "versions.json", json.dumps(describe_versions(), indent=2).encode())
    except OSError as error:
        raise ConfigError(f"logging.out = {folder}: {error.strerror}") from None


def describe_versions() -> dict[str, str]:
    """Return what a result depends on besides its configuration: package versions, Python, git commit."""
    versions = {"python": platform.python_version(), "git_commit": _git_commit()}
    return versions | {package: _version(package) for package in _PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def save_checkpoint(
    run: Path, policy: Policy, policy_config: PolicyConfig, env_spec: EnvSpec, state: dict[str, Any]
) -> Path:
    """Write `checkpoints/update_NNNNNN` under a temporary name, flush it, rename it, and point `last` at it.

    Args:
        run: The run folder.
        policy: What to save.
        policy_config: What rebuilds it.
        env_spec: What it acts in.
        state: The run's clocks; `updates` names the folder.

    Raises:
        OSError: The disk is full or the folder was removed; older checkpoints are unharmed.
    """
    final = run / "checkpoints" / f"update_{state['updates']:06d}"
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_policy(temporary / FILE_NAME, policy, policy_config, env_spec)
        write_atomically(temporary / "state.json", json.dumps(state, indent=2).encode())
        if not final.exists():
            publish_file(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    point_at(run, "last", final)
    return final


def point_at(run: Path, name: str, checkpoint: Path) -> None:
    """Let the link `checkpoints/<name>` mean `checkpoint`; a reader sees the old or the new one."""
    link = run / "checkpoints" / name
    temporary = link.with_name(f".{name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.name)
    os.replace(temporary, link)
