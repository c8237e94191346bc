"""Policies: what decides, evaluates its decisions again, and is trained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import nn

from asyncflow.config.lerobot_folder import KIND as LEROBOT
from asyncflow.config.lerobot_folder import match_cameras, open_lerobot
from asyncflow.config.observations import IMAGES, refuse_unseen
from asyncflow.config.plugins import POLICIES, build_plugin, load_plugin, refuse_taken_name
from asyncflow.config.sections import POLICY_KINDS, PolicyConfig
from asyncflow.devices import check_memory
from asyncflow.errors import ConfigError
from asyncflow.policies.base import Policy, set_eval
from asyncflow.policies.flow import FlowPolicy
from asyncflow.policies.gaussian import GaussianPolicy
from asyncflow.policies.vla.foreign import find_model_class
from asyncflow.policies.vla.policy import VLAPolicy, build_vla, read_instructions
from asyncflow.seeding import derive_seed
from asyncflow.simulators.spec import EnvSpec

__all__ = ["FlowPolicy", "GaussianPolicy", "Policy", "VLAPolicy", "find_policy_code", "make_policy"]

MAX_UNCHECKED = 1 << 24  # numbers; a draft takes as long as a small policy
_SIZE_KEYS = "policy.hidden_sizes, policy.critic_hidden_sizes, policy.horizon or env.n_obs_steps"


def make_policy(config: PolicyConfig, spec: EnvSpec, seed: int, *, num_stored: int | None = None) -> Policy:
    """Build a policy on the CPU; its weights depend on `config`, the spec's sizes and `seed` alone.

    Args:
        config: What to build.
        spec: What it must fit, in its own names; `state` must be a vector, or a history.
        seed: The run's seed.
        num_stored: Numbers of the weights that will be loaded into it, which bound its size.

    Raises:
        ConfigError: The observations have no `state` vector, or point clouds that the policy cannot see, `config` is an
            impossible combination, an image is too small for its encoder, or memory does not suffice.
    """
    if config.kind in POLICY_KINDS and config.vla.model_class is None:
        _require_state(config, spec)
        if config.kind == "vla":
            refuse_unseen(spec.obs, "policy.kind = vla: asyncflow's own model", (IMAGES,))
        if config.kind != LEROBOT and not config.vla.lora_rank and _is_large(config, spec):
            _check_size(lambda: _build(config, spec), num_stored)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed CUDA, which the fork does not restore.
        torch.default_generator.manual_seed(derive_seed(seed, "init"))
        policy = _build(config, spec)
    policy.num_tasks = len(spec.task_table)
    set_eval(policy)  # an update evaluates the decisions that were taken: without dropout, with fixed statistics
    return policy


def find_policy_code(config: PolicyConfig) -> bool:
    """Import what the policy is made of, and tell whether that is asyncflow's own, which fits any observation.

    Raises:
        ConfigError: It cannot be imported, is a folder of LeRobot that cannot be read, or another package registered
            asyncflow's own name too.
    """
    if config.kind not in POLICY_KINDS:
        load_plugin(POLICIES, config.kind)
        return False
    refuse_taken_name(POLICIES, config.kind, "policy.kind")
    if config.kind == LEROBOT:
        open_lerobot(config)
        return False
    if config.kind == "vla" and config.vla.model_class is not None:
        find_model_class(config.vla)
        return False
    return True


def _build(config: PolicyConfig, spec: EnvSpec) -> Policy:
    if config.kind in ("flow", "gaussian"):
        return (FlowPolicy if config.kind == "flow" else GaussianPolicy)(config, spec)
    if config.kind == "vla":
        return build_vla(config, spec)
    if config.kind == LEROBOT:
        return _build_lerobot(config, spec)
    arguments = (config.model_copy(deep=True), deepcopy(spec))
    return build_plugin(POLICIES, config.kind, arguments, Policy)  # type: ignore[type-abstract]


def _build_lerobot(config: PolicyConfig, spec: EnvSpec) -> Policy:
    folder = open_lerobot(config)  # before the import, which it allows
    cameras = match_cameras(folder, config, spec.obs, spec.action_dim)

    from asyncflow.policies.lerobot.policy import build_lerobot  # noqa: PLC0415  an optional extra, seconds to load

    return build_lerobot(config, folder, cameras, spec.shapes(IMAGES), read_instructions(config, spec))


def _require_state(config: PolicyConfig, spec: EnvSpec) -> None:
    if len(spec.state_shape) not in (1, 2):
        shapes = {key: field.shape for key, field in spec.obs.items()}
        raise ConfigError(
            f"policy.kind = {config.kind} needs a vector observation named `state`, got {shapes}; see env.obs_keys"
        )


def _is_large(config: PolicyConfig, spec: EnvSpec) -> bool:
    """Tell whether the fully connected layers alone may hold more than `MAX_UNCHECKED` numbers."""
    inputs = sum(math.prod(field.shape) for field in spec.obs.values() if field.kind != IMAGES)
    outputs = config.horizon * spec.action_dim
    networks = ([inputs, *config.hidden_sizes, outputs], [inputs, *config.critic_hidden_sizes])
    return sum(a * b for sizes in networks for a, b in itertools.pairwise(sizes)) > MAX_UNCHECKED


def _check_size(build: Callable[[], nn.Module], num_stored: int | None) -> None:
    """Refuse a policy that is larger than the memory that is free, or than the weights that are to be loaded into it.

    Args:
        build: Builds the policy.
        num_stored: Numbers of those weights; None if there are none.

    Raises:
        ConfigError: See above.
    """
    try:
        with torch.device("meta"):
            tensors = list(build().state_dict().values())
    except (RuntimeError, OverflowError, TypeError):  # a size beyond 64 bits
        raise ConfigError(f"the policy's sizes are beyond what can be counted; lower {_SIZE_KEYS}") from None
    num_numbers = sum(tensor.numel() for tensor in tensors)
    if num_stored is not None and num_numbers > 2 * num_stored:
        raise ConfigError(f"a policy of {num_numbers} numbers is described, of which the checkpoint holds {num_stored}")
    check_memory(sum(tensor.nbytes for tensor in tensors), torch.device("cpu"), _SIZE_KEYS)
