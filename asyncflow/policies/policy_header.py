"""The schema of a policy file's description of itself, checked before anything is built from it.

How large the policy may be is checked where it is built (`make_policy`).
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from asyncflow.config.sections import PolicyConfig, explain, validate
from asyncflow.envs.base import EnvSpec
from asyncflow.envs.contract import check_spec

MAX_SIZE, MAX_HORIZON = 2**31 - 1, 2**62
_SPEC = TypeAdapter(EnvSpec)
_SPEC_FIELDS = {field.name for field in fields(EnvSpec)}
_POINT_SETTINGS = {"camera_size", "num_points", "point_bounds"}


def read_policy_config(header: dict[str, Any]) -> PolicyConfig:
    """Return how to build the policy.

    Raises:
        ConfigError: A key is unknown, its value is wrong, or the keys do not fit together.
        ValueError: There is no such description.
    """
    if not isinstance(header.get("policy"), dict):
        raise ValueError("policy must be a mapping")
    return validate({"policy": header["policy"]}).policy


def read_spec(header: dict[str, Any]) -> EnvSpec:
    """Return the environment that the policy was made for; older files have one limit of all actions, or none.

    Raises:
        ContractError: A size is none.
        ValueError: A key is missing or unknown, of another type, or the sizes contradict each other.
    """
    env = header.get("env")
    if not isinstance(env, dict):
        raise ValueError("env must be a mapping")
    env = dict(env)
    limit = env.pop("action_limit", 1.0)
    if unknown := sorted(env.keys() - _SPEC_FIELDS):
        raise ValueError(f"env: unknown key {unknown[0]!r}")
    try:
        spec = _SPEC.validate_json(json.dumps(env), strict=True)
    except ValidationError as error:
        raise ValueError(f"env.{explain(error)}") from None
    spec = check_spec(spec, "env")
    _check_sizes(spec)
    if limit != 1 and not spec.action_low:
        numbers = (abs(float(limit)),) * spec.action_dim
        spec = replace(spec, action_low=tuple(-x for x in numbers), action_high=numbers)
    return spec


def _check_sizes(spec: EnvSpec) -> None:
    shapes = (*spec.obs_shapes.values(), *spec.image_shapes.values(), (spec.action_dim,))
    if (largest := max(size for shape in shapes for size in shape)) > MAX_SIZE:
        raise ValueError(f"env: a size of {largest}; at most {MAX_SIZE}")
    if spec.horizon > MAX_HORIZON:
        raise ValueError(f"env.horizon = {spec.horizon}: at most {MAX_HORIZON}")
    if unknown := sorted(spec.point_settings.keys() - _POINT_SETTINGS):
        raise ValueError(f"env.point_settings: unknown key {unknown[0]!r}")
    width = spec.obs_shapes["state"][-1]
    if spec.obs_widths and (len(spec.obs_widths) != len(spec.obs_keys) or sum(spec.obs_widths) != width):
        raise ValueError(
            f"env.obs_widths = {list(spec.obs_widths)}: must be those of {list(spec.obs_keys)} and add up to {width}, "
            "the size of `state`"
        )
