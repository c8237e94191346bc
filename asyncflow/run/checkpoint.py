"""Checkpoints: everything that a run needs to go on from the boundary after an update.

What lies in `checkpoints/` is named, summed and written atomically here. A checkpoint is a policy, a `RunState` and
named groups of tensors.

    update_000010/{policy.safetensors,training.safetensors,state.json,checksums.json}
    last -> update_000010     best -> update_000010
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from asyncflow import checksums, files
from asyncflow.config.sections import PolicyConfig
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.errors import CheckpointError
from asyncflow.files import follow, publish_file, write_atomically
from asyncflow.policies.base import Policy
from asyncflow.policies.policy_file import FILE_NAME, read_policy_file, save_policy
from asyncflow.run.state import RunState, check_groups
from asyncflow.simulators.spec import EnvSpec

Groups = Mapping[str, Mapping[str, Tensor]]
TRAINING, STATE = "training.safetensors", "state.json"
REPLACED = ".replaced"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as `load_checkpoint` returns it.

    Attributes:
        path: Its folder.
        policy: The policy's tensors, by the names of `state_dict`.
        state: How far the run was.
        groups: Group -> name -> tensor, as they were saved.
    """

    path: Path
    policy: dict[str, Tensor]
    state: RunState
    groups: dict[str, dict[str, Tensor]]

    @property
    def journal(self) -> EpisodeJournal | None:
        """The journal that rebuilds the open episodes; None if none had begun."""
        tensors = self.groups.get("journal")
        return EpisodeJournal.from_tensors(tensors) if tensors else None


@dataclass(frozen=True)
class PolicyToSave:
    """A policy and what rebuilds it; a class of a user's own has no configuration."""

    policy: Policy
    config: PolicyConfig | None
    env_spec: EnvSpec


def save_checkpoint(run: Path, source: PolicyToSave, state: RunState, groups: Groups) -> Path:
    """Write `checkpoints/update_NNNNNN` under a temporary name, flush it, rename it, and point `last` at it.

    Args:
        run: The run folder.
        source: The policy.
        state: How far the run is; `updates` names the folder.
        groups: Group -> name -> tensor; neither name holds a slash.

    Raises:
        OSError: The disk is full or the folder was removed; older checkpoints are unharmed.
    """
    final = checkpoint_path(run, state.updates)
    if not _holds(final, state):
        write_checkpoint(final, source, state, groups)
    point_at(run, "last", final)
    return final


def write_checkpoint(
    final: Path, source: PolicyToSave, state: RunState, groups: Groups, extra: Mapping[str, bytes] | None = None
) -> None:
    """Write a checkpoint's folder under a temporary name, flush it, and give it its name, in an older one's place.

    Args:
        final: The folder.
        source: The policy.
        state: How far the run is.
        groups: Group -> name -> tensor; neither name holds a slash.
        extra: File name -> content of what else lies in the folder.

    Raises:
        OSError: The disk is full or the folder above was removed; an older checkpoint is unharmed.
    """
    temporary = _hidden(final)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()  # without its parents: a run folder that was removed is not made anew
        _write(temporary, source, state, groups, extra or {})
        _publish(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def checkpoint_path(run: Path, updates: int) -> Path:
    """Return the folder of the checkpoint after an update, whether it exists or not."""
    return run / "checkpoints" / f"update_{updates:06d}"


def _holds(folder: Path, state: RunState) -> bool:
    """Tell whether a checkpoint of this state is there; one of an update whose evaluation was owed is written anew."""
    try:
        found = json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        return False
    return bool(found == json.loads(state.to_json()))


def _publish(temporary: Path, final: Path) -> None:
    """Give a checkpoint its name; an older one of that name stays, hidden, until it is there."""
    replaced = final.with_name(f".{final.name}{REPLACED}")
    if final.exists():
        os.replace(final, replaced)
    publish_file(temporary, final)
    shutil.rmtree(replaced, ignore_errors=True)


def _write(folder: Path, source: PolicyToSave, state: RunState, groups: Groups, extra: Mapping[str, bytes]) -> None:
    tensors = {f"{group}/{name}": t.detach().cpu().contiguous() for group, x in groups.items() for name, t in x.items()}
    save_policy(folder / FILE_NAME, source.policy, source.config, source.env_spec)
    source.policy.export(folder)
    write_atomically(folder / TRAINING, save(tensors))
    write_atomically(folder / STATE, state.to_json().encode())
    for name, content in extra.items():
        write_atomically(folder / name, content)
    write_atomically(folder / checksums.NAME, checksums.describe_folder(folder))


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _is_unfinished(path: Path) -> bool:
    return re.fullmatch(r"\.(update_\d+|last|best)\.\d+\.tmp", path.name) is not None


def point_at(run: Path, name: str, checkpoint: Path) -> None:
    """Let the link `checkpoints/<name>` mean `checkpoint`; a reader sees the old or the new one."""
    files.point_at(run / "checkpoints" / name, checkpoint.name)


def list_checkpoints(run: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, oldest first."""
    found = [path for path in (run / "checkpoints").glob("update_*") if path.name.removeprefix("update_").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("update_")))


def prune_checkpoints(run: Path, keep_last: int | None) -> None:
    """Remove all but the newest `keep_last` checkpoints and the best one; None keeps all.

    Raises:
        OSError: One cannot be removed.
    """
    kept = {follow(run / "checkpoints" / name).resolve() for name in ("last", "best")}
    for path in list_checkpoints(run)[: -keep_last if keep_last else 0]:
        if path.resolve() not in kept:
            os.replace(path, _hidden(path))  # so that a cut leaves no half of a checkpoint under its name
            shutil.rmtree(_hidden(path))


def clean_checkpoints(run: Path) -> None:
    """Remove what a killed process left half done, and links that mean nothing. Only for the folder's only writer."""
    for path in (run / "checkpoints").glob(f".update_*{REPLACED}"):
        original = path.with_name(path.name[1 : -len(REPLACED)])
        if original.exists():
            shutil.rmtree(path)
        else:
            os.replace(path, original)
    # `checkpoints` may be a link to a folder in which others work, too: only what a run wrote there is removed.
    for path in filter(_is_unfinished, (run / "checkpoints").glob(".*.tmp")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    for name in ("last", "best"):
        link = run / "checkpoints" / name
        if follow(link) == link and not link.is_dir():
            link.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: A file is missing, truncated or damaged.
    """
    checksums.check_folder(path, {FILE_NAME, TRAINING, STATE})
    policy = read_policy_file(path / FILE_NAME, is_any_class=True)
    try:
        content, flat = (path / STATE).read_bytes(), load((path / TRAINING).read_bytes())
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or incomplete: {' '.join(str(error).split())}") from None
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor
    try:
        state = RunState.from_json(content)
        check_groups(groups, state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}/{error}") from None
    return Checkpoint(path, policy.tensors, state, groups)


def _set_aside(damaged: Path) -> None:
    names = (damaged.with_name(f"damaged_{damaged.name}_{number}") for number in itertools.count())
    os.replace(damaged, next(name for name in names if not name.exists()))


def find_newest(run: Path) -> tuple[Checkpoint, list[str]]:
    """Return the newest checkpoint that is whole, and a line about each newer one, which is set aside.

    Raises:
        CheckpointError: There is none.
    """
    problems: list[str] = []
    newer: list[Path] = []
    for path in reversed(list_checkpoints(run)):
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            newer.append(path)
            continue
        for damaged in newer:
            _set_aside(damaged)
        point_at(run, "last", path)
        return checkpoint, problems
    reasons = "; ".join(problems) or "it has no checkpoints"
    raise CheckpointError(f"--resume {run}: nothing to go on from: {reasons}")
