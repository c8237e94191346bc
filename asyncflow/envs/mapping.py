"""From a simulator's names and units to a model's: which images and numbers a model sees, and what its actions mean.

`NameMapping` is `policy.mapping`, checked against what environments offer; `MappedVecEnv` puts it around environments.
Names are mapped here alone, on the way to and from the simulators: policies, ring and log-probs hold what the model
sees and decides, simulators and their journal hold their own.

Shapes: n environments, O env steps of a history (n_obs_steps), D size of the model's state, H executed actions,
A size of the simulator's action, M size of the model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from asyncflow.config.observations import IMAGES, STATE, VECTOR, Field, field_key
from asyncflow.config.policy import ActionMapping, MappingConfig, StatePart
from asyncflow.envs.base import ChunkResult, VecEnv
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.errors import ConfigError
from asyncflow.simulators.spec import EnvSpec

KEY = "policy.mapping"
SUFFIX = "_image"  # of robomimic's names of what cameras see


class NameMapping:
    """`policy.mapping` for one kind of environments.

    Attributes:
        source: What the environments offer, in their own names.
        spec: What a policy must fit, in the model's names; the environments' own where nothing is mapped.
        parts: As `MappingConfig.parts`; empty where nothing is mapped.
    """

    def __init__(self, config: MappingConfig, spec: EnvSpec) -> None:
        """Check the mapping against what the environments offer.

        Raises:
            ConfigError: An image or an observation that they lack, a slice beyond an observation's end, or entries for
                another number of action dimensions; the message is one line that names what is there.
        """
        check_names(config, spec)
        action = config.action
        _check_entries(action, spec.action_dim)
        self._cameras = None if config.obs.images is None else _find_cameras(config.obs.images, spec)
        self._columns = None if config.obs.state is None else torch.tensor(_find_columns(config.obs.state, spec))
        self._select = None if action.select is None else torch.tensor(action.select)
        self._scale = None if action.scale is None else torch.tensor(action.scale)
        self._offset = None if action.offset is None else torch.tensor(action.offset)
        self._has_actions = action != ActionMapping()
        self._limits = spec.action_limits
        self.source, self.parts = spec, config.parts
        self.spec = self._describe(spec, action.size or spec.action_dim)

    def map_obs(self, obs: TensorDict) -> TensorDict:
        """Return observations [n] in the model's names: `state` [n, D] or [n, O, D], `images` uint8; others stay."""
        fields: dict[str, Any] = dict(obs.items())  # tensors are shared, not copied
        if self._columns is not None:
            fields[STATE] = obs[STATE].index_select(-1, self._columns)
        if self._cameras is not None:
            fields[IMAGES] = {name: obs[IMAGES, camera] for name, camera in self._cameras.items()}
        shown = {name: field for name, field in fields.items() if name != IMAGES or IMAGES in self.spec.rendered}
        return TensorDict(shown, batch_size=obs.batch_size)

    def map_actions(self, actions: Tensor) -> Tensor:
        """Return the simulator's actions [n, H, A], within its limits, of the model's, [n, H, M]."""
        if not self._has_actions:
            return actions
        mapped = actions if self._select is None else actions.index_select(-1, self._select)
        mapped = mapped if self._scale is None else mapped * self._scale
        mapped = mapped if self._offset is None else mapped + self._offset
        return mapped.clamp(*self._limits)

    def _describe(self, spec: EnvSpec, action_dim: int) -> EnvSpec:
        if self._cameras is not None:
            others = {key: field for key, field in spec.obs.items() if field.kind != IMAGES}
            pairs = self._cameras.items()
            images = {field_key(IMAGES, name): spec.obs[field_key(IMAGES, camera)] for name, camera in pairs}
            spec = replace(spec, obs=others | images)
        if self._columns is not None:
            state = Field(VECTOR, (*spec.state_shape[:-1], len(self._columns)))
            spec = replace(spec, obs=spec.obs | {STATE: state}, obs_keys=(), obs_widths=())
        if self._has_actions:
            low, high = (-math.inf,) * action_dim, (math.inf,) * action_dim  # clipped once they are the simulator's
            spec = replace(spec, action_dim=action_dim, action_low=low, action_high=high)
        return spec


class MappedVecEnv(VecEnv):
    """Others' environments; see `VecEnv` for what the methods do."""

    def __init__(self, env: VecEnv, mapping: NameMapping) -> None:
        """Take over environments, which nobody else uses from now on."""
        self.env, self.num_envs, self.spec, self.notices = env, env.num_envs, mapping.spec, env.notices
        self.versions = env.versions
        self.n_action_steps, self.origin = env.n_action_steps, env.origin
        self.mapping = mapping

    @property
    def simulator_spec(self) -> EnvSpec:
        """The spec that the environments can be built from again."""
        return self.env.simulator_spec

    def reset(self, seed: int, journal: EpisodeJournal | None = None) -> TensorDict:
        """Start or rebuild episodes; the journal holds the simulator's actions."""
        return self.mapping.map_obs(self.env.reset(seed, journal))

    def journal(self) -> EpisodeJournal:
        """Return the simulators' journal."""
        return self.env.journal()

    def step_async(self, actions: Tensor, env_ids: range) -> None:
        """Start one chunk of the model's actions, [n, H, M], in each of `env_ids`."""
        self.env.step_async(self.mapping.map_actions(actions), env_ids)

    def step_wait(self, env_ids: range) -> ChunkResult:
        """Wait for a chunk, and map what it led to."""
        result = self.env.step_wait(env_ids)
        obs, final_obs = (self.mapping.map_obs(each) for each in (result.obs, result.final_obs))
        return replace(result, obs=obs, final_obs=final_obs)

    def interrupt(self) -> None:
        """End every wait for simulators."""
        self.env.interrupt()

    def close(self) -> None:
        """Stop the simulators."""
        self.env.close()


def map_names(env: VecEnv, mapping: NameMapping) -> VecEnv:
    """Return environments in the model's names; the same ones where nothing is mapped."""
    return MappedVecEnv(env, mapping) if mapping.parts else env


def check_names(config: MappingConfig, spec: EnvSpec) -> None:
    """Refuse images and observations that environments lack; this needs no sizes.

    Raises:
        ConfigError: Names the first one, and those that are there.
    """
    _find_cameras(config.obs.images or {}, spec)
    keys = spec.obs_keys or (STATE,)
    for part in config.obs.state or []:
        if part.key not in keys:
            raise ConfigError(
                f"{KEY}.obs.state: there is no observation {part.key!r}; observations: {', '.join(keys)} (env.obs_keys)"
            )


def _find_cameras(images: Mapping[str, str], spec: EnvSpec) -> dict[str, str]:
    """Return the model's name -> camera."""
    found: dict[str, str] = {}
    cameras = spec.shapes(IMAGES)
    for image, name in images.items():
        camera = image if image in cameras else image.removesuffix(SUFFIX)
        if camera not in cameras:
            there = ", ".join(f"{each}{SUFFIX}" for each in cameras) or "none"
            raise ConfigError(f"{KEY}.obs.images: there is no image {image!r}; images: {there} (env.cameras)")
        if camera in found.values():
            raise ConfigError(f"{KEY}.obs.images = {images}: names the camera {camera} twice")
        found[name] = camera
    return found


def _find_columns(parts: list[StatePart], spec: EnvSpec) -> list[int]:
    """Return where in the simulator's state each number of the model's is."""
    places = _lay_out(spec)
    columns: list[int] = []
    for part in parts:
        place = places[part.key]
        first, end = part.slice or (0, len(place))
        if end > len(place):
            widths = ", ".join(f"{key} {len(each)}" for key, each in places.items())
            raise ConfigError(
                f"{KEY}.obs.state: slice = {part.slice} of {part.key} ends beyond its {len(place)} numbers; "
                f"numbers: {widths}"
            )
        columns += place[first:end]
    return columns


def _lay_out(spec: EnvSpec) -> dict[str, range]:
    """Return which numbers of the simulator's state each of its observations is."""
    keys, size = spec.obs_keys or (STATE,), spec.state_shape[-1]
    widths = (size,) if len(keys) == 1 else spec.obs_widths
    if len(widths) != len(keys) or sum(widths) != size:
        raise ConfigError(
            f"{KEY}.obs.state: the environment does not say how many numbers each of {', '.join(keys)} has "
            "(EnvSpec.obs_widths)"
        )
    return {key: range(end - width, end) for key, width, end in zip(keys, widths, accumulate(widths), strict=True)}


def _check_entries(action: ActionMapping, action_dim: int) -> None:
    """Refuse entries that are not one for each dimension of the simulator's action."""
    for name, entries in (("select", action.select), ("scale", action.scale), ("offset", action.offset)):
        if entries is not None and len(entries) != action_dim:
            raise ConfigError(
                f"{KEY}.action.{name} = {entries}: {len(entries)} entries for {action_dim} dimensions of the "
                "simulator's action; give one for each"
            )
