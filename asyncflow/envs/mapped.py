"""Environments that speak a model's names and units, around any others.

Owns where names are mapped: here, once, on the way to and from the simulators. Policies, ring and log-probs
therefore hold what the model sees and decides; simulators and their journal hold their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from asyncflow.config.policy import MappingConfig
from asyncflow.envs.base import ChunkResult, EnvSpec, VecEnv
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.envs.mapping import NameMapping
from asyncflow.errors import ConfigError

if TYPE_CHECKING:
    from tensordict import TensorDict


class MappedVecEnv(VecEnv):
    """Others' environments; see `VecEnv` for what the methods do."""

    def __init__(self, env: VecEnv, mapping: NameMapping) -> None:
        """Take over environments, which nobody else uses from now on."""
        self.env, self.num_envs, self.spec, self.notices = env, env.num_envs, mapping.spec, env.notices
        self._mapping = mapping

    @property
    def simulator_spec(self) -> EnvSpec:
        """What the environments can be built from again."""
        return self.env.simulator_spec

    def reset(self, seed: int, journal: EpisodeJournal | None = None) -> TensorDict:
        """Start or rebuild episodes; the journal holds the simulator's actions."""
        return self._mapping.map_obs(self.env.reset(seed, journal))

    def journal(self) -> EpisodeJournal:
        """Return the simulators' journal."""
        return self.env.journal()

    def step_async(self, actions: Tensor, env_ids: range) -> None:
        """Start one chunk of the model's actions, [n, H, M], in each of `env_ids`."""
        self.env.step_async(self._mapping.map_actions(actions), env_ids)

    def step_wait(self, env_ids: range) -> ChunkResult:
        """Wait for a chunk, and map what it led to."""
        result = self.env.step_wait(env_ids)
        obs, final_obs = (self._mapping.map_obs(each) for each in (result.obs, result.final_obs))
        return replace(result, obs=obs, final_obs=final_obs)

    def interrupt(self) -> None:
        """End every wait for simulators."""
        self.env.interrupt()

    def close(self) -> None:
        """Stop the simulators."""
        self.env.close()


def map_names(env: VecEnv, config: MappingConfig) -> VecEnv:
    """Return environments in the model's names; the same ones where nothing is mapped.

    Raises:
        ConfigError: The mapping does not fit; the environments are closed.
    """
    if not config.parts:
        return env
    try:
        return MappedVecEnv(env, NameMapping(config, env.spec))
    except ConfigError:
        env.close()
        raise
