"""LeRobot's policy folders: how one is recognised, what it says about its model, and what an environment must offer it.

This file reads `config.json` without torch and LeRobot, so that `--checkpoint` is understood, or refused, before either
is loaded; the models themselves are in `policies/smolvla.py` and `policies/pi0.py`.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from asyncflow.config.observations import IMAGES, STATE, Field, name_in, refuse_unseen
from asyncflow.config.sections import PolicyConfig
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.files import expand_user, follow

KIND = "lerobot"  # of `policy.kind`
EXPORT = "lerobot"  # folder beside a policy file, which LeRobot loads again
CONFIG, WEIGHTS = "config.json", "model.safetensors"
VERSION = "0.3"
INSTALL = "pip install 'asyncflow[lerobot]'"
_NEWER = "policy_preprocessor.json"
_IMAGE = "observation.images."
_EMPTY = "observation.images.empty_camera_"
_STATE, _ACTION = "observation.state", "action"

UNNAMED = "unnamed"  # of statistics that stand under no dataset's name
# `normalize_inputs.buffer_action.mean`; of a model for several datasets `normalize_inputs.so100_buffer_action.mean`.
_STATISTICS = re.compile(r"(?P<module>(un)?normalize_\w+)\.((?P<dataset>[^.]+)_)?buffer_(?P<rest>.+)")

T = TypeVar("T")


class FolderType(NamedTuple):
    """The facts about one type of LeRobot policy that asyncflow uses.

    Attributes:
        chunk_key: Which key of `config.json` says how many actions the model predicts.
        can_shorten: Whether the first actions of a chunk do not depend on the rest, so that fewer may be predicted.
        transformers: The lowest version of transformers with which LeRobot's own code of the type runs.
    """

    chunk_key: str
    can_shorten: bool
    transformers: tuple[int, int]


_TRANSFORMERS = (4, 53)  # the highest version that was tried, and what the extra installs
_TYPES = {
    "smolvla": FolderType("chunk_size", can_shorten=True, transformers=(4, 50)),
    "pi0": FolderType("n_action_steps", can_shorten=False, transformers=(4, 52)),
}


@dataclass(frozen=True)
class LeRobotFolder:
    """A LeRobot policy folder's description of its model.

    Attributes:
        path: The folder.
        type: LeRobot's name of what it holds.
        state_dim: Size of `observation.state`.
        action_dim: A.
        cameras: LeRobot's names of the pictures that the model needs, in its order.
        chunk_size: Actions that the model predicts.
        statistics: Of which dataset the normalisation is, where the folder holds that of several.
    """

    path: Path
    type: str
    state_dim: int
    action_dim: int
    cameras: tuple[str, ...]
    chunk_size: int
    statistics: str | None = None


def is_lerobot_folder(path: Path) -> bool:
    """Tell whether a folder holds a LeRobot policy, of whatever type."""
    try:
        return "type" in _read_json(path) and not (path / "policy.safetensors").exists()
    except (OSError, ValueError, RecursionError):
        return False


def _read_json(path: Path) -> dict[str, Any]:
    """Return what `config.json` holds; anything but a mapping is a ValueError."""
    values = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{CONFIG} is no mapping")
    return values


def adopt_lerobot(values: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration's nested values with `policy.kind` set where `policy.checkpoint` is a LeRobot folder."""
    policy = values.get("policy")
    if not isinstance(policy, dict):
        return values
    name = policy.get("checkpoint")
    if not isinstance(name, str) or not is_lerobot_folder(expand_user(name)):
        return values
    path = str(expand_user(name).absolute())  # a run may be resumed from elsewhere
    return values | {"policy": policy | {"kind": KIND, "checkpoint": path}}


def open_lerobot(config: PolicyConfig) -> LeRobotFolder:
    """Return the folder that a policy of kind `lerobot` is built from, if it can be.

    Raises:
        CheckpointError: It is no such folder, of another type or version, or its configuration lacks something.
        ConfigError: There is none, or LeRobot or transformers is missing or of a version that cannot load it, or
            it holds statistics of several datasets and `policy.statistics` chooses none of them.
    """
    if config.checkpoint is None:
        raise ConfigError(f"policy.kind = {KIND}: needs policy.checkpoint, a LeRobot policy folder; it is null")
    folder = read_lerobot_folder(Path(config.checkpoint))
    source = f"policy.checkpoint = {folder.path}: a LeRobot policy"
    version = _find_version("lerobot", f"{source} needs the package lerobot {VERSION}")
    if not version.startswith(f"{VERSION}."):
        raise ConfigError(f"{source} needs the package lerobot {VERSION}, {version} is installed: {INSTALL}")
    lowest = _TYPES[folder.type].transformers
    low, high = (".".join(map(str, bound)) for bound in (lowest, _TRANSFORMERS))
    needed = f"{source} of type {folder.type} needs the package transformers {low} to {high}"
    version = _find_version("transformers", needed)
    if not lowest <= tuple(int(number) for number in re.findall(r"\d+", version)[:2]) <= _TRANSFORMERS:
        raise ConfigError(f"{needed}, {version} is installed: {INSTALL}")
    statistics = choose_statistics(_read_names(folder.path / WEIGHTS), config.statistics, source)
    return replace(folder, statistics=statistics)


def _read_names(path: Path) -> list[str]:
    """Return the names of a safetensors file's tensors; none where it is damaged, which its loading tells."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return list(json.loads(file.read(min(size, path.stat().st_size))))
    except (OSError, ValueError, TypeError, RecursionError):
        return []


def choose_statistics(names: Iterable[str], chosen: str | None, source: str) -> str | None:
    """Return the dataset whose statistics are used; None where none is named.

    LeRobot itself loads the alphabetically first of several, whatever robot it belongs to.

    Args:
        names: The tensors of the folder.
        chosen: `policy.statistics`.
        source: Names the folder in a refusal.

    Raises:
        CheckpointError: There are several and none is chosen, or none of that name.
    """
    found = sorted({match["dataset"] or UNNAMED for name in names if (match := _STATISTICS.match(name))})
    if chosen is not None and chosen not in found:
        raise CheckpointError(
            f"policy.statistics = {chosen}: {source} without statistics of that name; allowed: "
            f"{', '.join(found) or 'none'}"
        )
    if chosen is None and len(found) > 1:
        raise CheckpointError(
            f"{source} with the statistics of several datasets: {', '.join(found)}; choose one: policy.statistics=NAME"
        )
    return chosen or next(iter(found), None)


def select_statistics(tensors: Mapping[str, T], dataset: str | None) -> dict[str, T]:
    """Return a folder's tensors without the statistics of other datasets, and those of this one without its name."""
    selected = {}
    for name, tensor in tensors.items():
        match = _STATISTICS.match(name)
        if match is None:
            selected[name] = tensor
        elif (match["dataset"] or UNNAMED) == dataset:
            selected[f"{match['module']}.buffer_{match['rest']}"] = tensor
    return selected


def _find_version(package: str, needed: str) -> str:
    """Return the version of an installed package.

    Raises:
        ConfigError: It is missing; the message begins with what `needed` says.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"{needed}, which is not installed: {INSTALL}") from None


def read_lerobot_folder(path: Path) -> LeRobotFolder:
    """Read what a LeRobot policy folder says about its model.

    Raises:
        CheckpointError: It is no such folder, of another type or version, or its configuration lacks something.
    """
    source = f"policy.checkpoint = {path}"
    try:
        values = _read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        exported = next(
            (found for found in (path / EXPORT, follow(path / "checkpoints" / "last") / EXPORT) if found.is_dir()), None
        )
        hint = f"; of this run, {exported} is one" if exported else ""
        raise CheckpointError(f"{source}: not a LeRobot policy folder: {' '.join(str(error).split())}{hint}") from None
    kind = _check_format(path, values, source)
    chunk_key = _TYPES[kind].chunk_key
    try:
        inputs, outputs = values["input_features"], values["output_features"]
        pictures = [name for name, feature in inputs.items() if feature["type"] == "VISUAL"]
        folder = LeRobotFolder(
            path,
            type=kind,
            state_dim=int(inputs[_STATE]["shape"][0]),
            action_dim=int(outputs[_ACTION]["shape"][0]),
            cameras=tuple(name for name in pictures if not name.startswith(_EMPTY)),
            chunk_size=int(values[chunk_key]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(
            f"{source}: {CONFIG} lacks something that asyncflow needs ({_STATE}, {_ACTION}, {chunk_key}): "
            f"{type(error).__name__}: {error}"
        ) from None
    if folder.chunk_size < 1:
        raise CheckpointError(f"{source}: {chunk_key} = {folder.chunk_size} in {CONFIG}; at least 1 is needed")
    if not folder.cameras:
        raise CheckpointError(f"{source}: {CONFIG} names no pictures ({_IMAGE}...), which its type needs")
    return folder


def _check_format(path: Path, values: dict[str, Any], source: str) -> str:
    """Return the folder's type, if asyncflow reads what it says and holds."""
    kind = values.get("type")
    if kind not in tuple(_TYPES):
        raise CheckpointError(f"{source}: a LeRobot policy of type {kind!r}; asyncflow reads: {', '.join(_TYPES)}")
    if (path / _NEWER).exists():
        raise CheckpointError(
            f"{source}: written by LeRobot 0.4 or later, which keeps the normalisation apart ({_NEWER}); asyncflow "
            f"reads folders of LeRobot {VERSION}"
        )
    if values.get("adapt_to_pi_aloha"):
        raise CheckpointError(f"{source}: adapt_to_pi_aloha = true, which asyncflow does not know; only false")
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(f"{source}: has no {WEIGHTS}")
    return str(kind)


def match_cameras(
    folder: LeRobotFolder, config: PolicyConfig, obs: Mapping[str, Field], action_dim: int
) -> dict[str, str]:
    """Return LeRobot's name -> the environment's, of every picture, once all fits.

    A camera has LeRobot's name, with or without `observation.images.` in front; `policy.mapping` can give it one.

    Args:
        folder: The model's.
        config: Its `horizon` is checked.
        obs: As `EnvSpec.obs`, in the model's names.
        action_dim: Size of the model's action.

    Raises:
        ConfigError: `policy.horizon`, the state, the actions or the cameras differ from the model's, or there are
            point clouds.
    """
    _check_sizes(folder, config, obs, action_dim)
    cameras = [name_in(IMAGES, key) for key, field in obs.items() if field.kind == IMAGES]
    found = {name: _find_camera(name, cameras) for name in folder.cameras}
    missing = [name.removeprefix(_IMAGE) for name, camera in found.items() if camera is None]
    unknown = sorted(set(cameras) - set(found.values()))
    if missing or unknown:
        wanted, shown = (", ".join(names) or "none" for names in (folder.cameras, cameras))
        raise CheckpointError(
            f"policy.checkpoint = {folder.path}: the model's cameras are {wanted}; the environment's: {shown}; "
            f"missing: {', '.join(missing) or 'none'}; not the model's: {', '.join(unknown) or 'none'}; see "
            "env.cameras and policy.mapping.obs.images"
        )
    return {name: camera for name, camera in found.items() if camera is not None}


def _check_sizes(folder: LeRobotFolder, config: PolicyConfig, obs: Mapping[str, Field], action_dim: int) -> None:
    """Refuse chunks, observations and actions of which the model has others."""
    source = f"policy.checkpoint = {folder.path}"
    _check_horizon(folder, config)
    state = obs[STATE].shape if STATE in obs else ()
    if state != (folder.state_dim,):
        raise CheckpointError(
            f"{source}: {_STATE} has {folder.state_dim} numbers, the environment's state has the shape {list(state)}; "
            "see env.obs_keys, env.n_obs_steps and policy.mapping.obs.state"
        )
    if action_dim != folder.action_dim:
        raise CheckpointError(
            f"{source}: actions have {folder.action_dim} numbers, the environment's {action_dim}; see "
            "policy.mapping.action"
        )
    refuse_unseen(obs, source, (IMAGES,))


def _check_horizon(folder: LeRobotFolder, config: PolicyConfig) -> None:
    """Refuse chunks that the model does not predict."""
    can_shorten = _TYPES[folder.type].can_shorten
    if config.horizon == folder.chunk_size or (config.horizon < folder.chunk_size and can_shorten):
        return
    allowed = (
        "; use at most that"
        if can_shorten
        else f", and type {folder.type} no others; use {folder.chunk_size}, and policy.n_action_steps to execute fewer"
    )
    raise ConfigError(
        f"policy.horizon = {config.horizon}: {folder.path} predicts chunks of {folder.chunk_size}{allowed}"
    )


def _find_camera(name: str, cameras: Collection[str]) -> str | None:
    return next((each for each in (name, name.removeprefix(_IMAGE)) if each in cameras), None)


def with_export(config: PolicyConfig, folder: Path) -> PolicyConfig:
    """Return how to build a policy whose file lies in `folder`: from LeRobot's folder beside it, where there is one.

    So a run can be moved, and go on, without the folder that it began from.
    """
    if config.kind == KIND and (folder / EXPORT / CONFIG).is_file():
        return config.model_copy(update={"checkpoint": str(folder / EXPORT), "statistics": None})
    return config
