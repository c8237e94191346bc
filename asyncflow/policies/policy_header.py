"""The schema of a policy file's description of itself, checked before anything is built from it.

How large the policy may be is checked where it is built (`make_policy`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from asyncflow.config.libero import DEFAULTS
from asyncflow.config.observations import IMAGES, SETTINGS, Field, field_key, make_field
from asyncflow.config.sections import PolicyConfig, explain, validate
from asyncflow.config.suites import TaskSpec
from asyncflow.simulators.checked import check_spec
from asyncflow.simulators.spec import EnvSpec

MAX_SIZE, MAX_HORIZON = 2**31 - 1, 2**62


def read_policy_config(header: dict[str, Any]) -> PolicyConfig:
    """Return how to build the policy.

    Raises:
        ConfigError: A key is unknown, its value is wrong, or the keys do not fit together.
        ValueError: There is no such description.
    """
    if not isinstance(header.get("policy"), dict):
        raise ValueError("policy must be a mapping")
    policy = {key: value for key, value in header["policy"].items() if key != "emulated_latency_s"}  # until 0.1.0
    return validate({"policy": policy}).policy


class _StoredSpec(BaseModel):
    """An `EnvSpec` as JSON."""

    model_config = ConfigDict(strict=True, extra="forbid")

    obs: dict[str, Field]
    action_dim: int
    horizon: int
    env_meta: dict[str, Any] = {}
    obs_keys: tuple[str, ...] = ()
    obs_widths: tuple[int, ...] = ()
    task: str = ""
    action_low: tuple[float, ...] = ()
    action_high: tuple[float, ...] = ()
    rendered_with: dict[str, Any] = {}
    has_success: bool = True
    instruction: str = ""
    num_start_states: int = 0
    tasks: tuple[TaskSpec, ...] = ()


def read_spec(header: dict[str, Any]) -> EnvSpec:
    """Return the environment that the policy was made for, from a file of any version.

    Raises:
        ContractError: A size is none.
        ValueError: A key is missing or unknown, of another type, or the sizes contradict each other.
    """
    if not isinstance(header.get("env"), dict):
        raise ValueError("env must be a mapping")
    env = _translate(header["env"])
    limit = env.pop("action_limit", 1.0)  # older files have one limit of all actions, or none
    if unknown := sorted(env.keys() - _StoredSpec.model_fields.keys()):
        raise ValueError(f"env: unknown key {unknown[0]!r}")
    try:
        stored = _StoredSpec.model_validate_json(json.dumps(env))
    except ValidationError as error:
        raise ValueError(f"env.{explain(error)}") from None
    spec = check_spec(EnvSpec(**{name: getattr(stored, name) for name in _StoredSpec.model_fields}), "env")
    _check_sizes(spec)
    if limit != 1 and not spec.action_low:
        numbers = (abs(float(limit)),) * spec.action_dim
        spec = replace(spec, action_low=tuple(-x for x in numbers), action_high=numbers)
    return spec


def _translate(env: dict[str, Any]) -> dict[str, Any]:
    """Return a description in today's words; 0.1.0 stored shapes alone, those of images apart."""
    rest = dict(env)
    if "obs_shapes" not in rest:
        return rest
    vectors, images = rest.pop("obs_shapes", None), rest.pop("image_shapes", {})
    if "point_settings" in rest:
        rest["rendered_with"] = rest.pop("point_settings")
    if not isinstance(vectors, dict) or not isinstance(images, dict):
        raise ValueError(f"env.obs_shapes = {vectors!r} and env.image_shapes = {images!r} must be mappings")
    shapes = vectors | {field_key(IMAGES, camera): shape for camera, shape in images.items()}
    return rest | {"obs": {key: asdict(make_field(key, shape)) for key, shape in shapes.items()}}


def _check_sizes(spec: EnvSpec) -> None:
    shapes = (*(field.shape for field in spec.obs.values()), (spec.action_dim,))
    if (largest := max(size for shape in shapes for size in shape)) > MAX_SIZE:
        raise ValueError(f"env: a size of {largest}; at most {MAX_SIZE}")
    if spec.horizon > MAX_HORIZON:
        raise ValueError(f"env.horizon = {spec.horizon}: at most {MAX_HORIZON}")
    if unknown := sorted(spec.rendered_with.keys() - SETTINGS - DEFAULTS.keys()):
        raise ValueError(f"env.rendered_with: unknown key {unknown[0]!r}")
    validate({"env": spec.rendered_with})
    width = spec.state_shape[-1]
    if spec.obs_widths and (len(spec.obs_widths) != len(spec.obs_keys) or sum(spec.obs_widths) != width):
        raise ValueError(
            f"env.obs_widths = {list(spec.obs_widths)}: must be those of {list(spec.obs_keys)} and add up to {width}, "
            "the size of `state`"
        )
