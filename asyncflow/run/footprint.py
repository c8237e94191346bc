"""Least memory of environments and rollouts, counted from sizes alone, before a simulator or a ring is built.

These are lower bounds: what fits here may still be refused once everything is known (`plan_ring`).
"""

from __future__ import annotations

import torch

from asyncflow.config.sections import Config
from asyncflow.devices import check_memory
from asyncflow.simulators.spec import EnvSpec

SIMULATOR_BYTES = 50_000_000  # of a robosuite task, half of what Lift takes
TOY_BYTES = 1_000  # of an environment without a simulator
FLOAT_BYTES = 4


def check_environments(num_envs: int, spec: EnvSpec, is_simulated: bool) -> None:
    """Refuse more environments than fit into memory.

    Raises:
        ConfigError: See above.
    """
    each = 2 * _obs_bytes(spec) + (
        SIMULATOR_BYTES if is_simulated else TOY_BYTES
    )  # the last observation, and the final
    check_memory(num_envs * each, torch.device("cpu"), "env.num_envs, env.n_obs_steps or env.camera_size")


def check_rollouts(config: Config, spec: EnvSpec, device: torch.device) -> None:
    """Refuse rollouts that do not fit into the memory of the device that trains.

    Raises:
        ConfigError: See above.
    """
    policy = config.policy
    num_chunks = policy.num_inference_steps + 1 if policy.kind in ("flow", "vla") else 1
    decision = num_chunks * policy.horizon * spec.action_dim * FLOAT_BYTES
    kept = decision if policy.freeze_backbone else decision + _obs_bytes(spec)  # else its features, unknown here
    num_slots = config.max_policy_lag + 1 if config.trainer.buffer_type == "vla" else 1
    keys = "buffer.buffer_size, policy.horizon, policy.num_inference_steps or env.n_obs_steps"
    check_memory(num_slots * config.buffer.buffer_size * kept, device, keys)


def _obs_bytes(spec: EnvSpec) -> int:
    return sum(field.num_bytes for field in spec.obs.values())
