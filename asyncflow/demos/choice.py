"""Chooses demonstrations of a dataset: by robomimic's filter keys, and those that solve their task.

This file reads `mask/` and `rewards` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import h5py

from asyncflow.errors import ConfigError

ALL, TRAIN, VALID = "all", "train", "valid"
_IN_PARTS = ("NutAssembly", "PickPlace")  # robosuite pays for each of several objects
_NEARLY = 0.999  # of the reward for success, which files may hold in float32


class Choice(NamedTuple):
    """Names of demonstrations, and in words which they are."""

    names: list[str]
    meaning: str


def choose_demonstrations(file: h5py.File, filter_key: str | None, source: str) -> Choice:
    """Return the demonstrations of a filter key, in the order in which they were recorded.

    Args:
        file: A dataset in robomimic's layout; it has a group `data`.
        filter_key: A key of `mask`, or `all`; None means `train`, where there is no such key all but `valid`, and
            where there is no `mask` all.
        source: Names the file in a refusal.

    Raises:
        ConfigError: There are no demonstrations, or no such key, or it names none, or some that are not there.
    """
    names = sorted(file["data"], key=lambda name: (len(name), name))  # demo_2 before demo_10
    if not names:
        raise ConfigError(f"{source}: no demonstrations under `data`")
    masks = file.get("mask")
    keys = sorted(masks) if isinstance(masks, h5py.Group) else []
    if filter_key is None and TRAIN not in keys and VALID in keys:
        left_out = _read_mask(masks[VALID], names, source)
        chosen, meaning = [name for name in names if name not in left_out], f"all but mask/{VALID}"
    else:
        key = filter_key or (TRAIN if TRAIN in keys else ALL)
        if key not in (*keys, ALL):
            raise ConfigError(f"--filter-key {key}: {source} has no mask/{key}; allowed: {', '.join([*keys, ALL])}")
        kept = _read_mask(masks[key], names, source) if key in keys else names
        chosen, meaning = [name for name in names if name in set(kept)], f"mask/{key}" if key in keys else ALL
    if not chosen:
        raise ConfigError(f"{source}: {meaning} is no demonstration; use another --filter-key, such as {ALL}")
    return Choice(chosen, meaning)


def _read_mask(mask: Any, names: Sequence[str], source: str) -> list[str]:
    entries = mask[()].ravel().tolist() if isinstance(mask, h5py.Dataset) else [mask.name]
    listed = [entry.decode(errors="replace") if isinstance(entry, bytes) else str(entry) for entry in entries]
    unknown = [name for name in listed if name not in set(names)]
    if unknown:
        raise ConfigError(f"{source}: {mask.name} names {unknown[0]!r}, which is not under `data`")
    return listed


def find_failures(groups: Sequence[h5py.Group], env_meta: dict[str, Any]) -> list[int] | None:
    """Return the places of demonstrations that never solve their task, by their rewards.

    robosuite pays for success alone unless `reward_shaping` is on, or a task has several parts; then it pays less than
    `reward_scale` before.

    Returns:
        None where it cannot be told: one lacks rewards, or the task pays as much for less.
    """
    scale = env_meta["env_kwargs"].get("reward_scale", 1.0)
    pays_before = bool(env_meta["env_kwargs"].get("reward_shaping", False)) or env_meta["env_name"] in _IN_PARTS
    if env_meta["env_name"] == "Wipe" or (pays_before and not isinstance(scale, int | float)):
        return None
    needed = _NEARLY * scale if pays_before else 0.0
    failures = []
    for place, group in enumerate(groups):
        rewards = group.get("rewards")
        if not isinstance(rewards, h5py.Dataset) or rewards.dtype.kind not in "biuf":
            return None
        if not bool((rewards[()] > needed).any()):
            failures.append(place)
    return failures
