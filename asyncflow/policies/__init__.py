"""Policies: what decides, evaluates its decisions again, and is trained."""

from __future__ import annotations

import torch

from asyncflow.config.lerobot_folder import KIND as LEROBOT
from asyncflow.config.lerobot_folder import match_cameras, open_lerobot
from asyncflow.config.plugins import POLICIES, build_plugin, load_plugin, refuse_taken_name
from asyncflow.config.sections import POLICY_KINDS, PolicyConfig
from asyncflow.envs.base import point_shapes
from asyncflow.errors import ConfigError
from asyncflow.policies.base import Policy, set_eval
from asyncflow.policies.draft import check_size, is_large
from asyncflow.policies.flow import FlowPolicy
from asyncflow.policies.gaussian import GaussianPolicy
from asyncflow.policies.networks.image_encoder import Shapes
from asyncflow.policies.vla.foreign import find_model_class
from asyncflow.policies.vla.policy import VLAPolicy, build_vla
from asyncflow.seeding import derive_seed

__all__ = ["FlowPolicy", "GaussianPolicy", "Policy", "VLAPolicy", "find_policy_code", "make_policy"]


def make_policy(  # noqa: PLR0913  what builds a policy, and what is known of its weights
    config: PolicyConfig,
    obs_shapes: Shapes,
    action_dim: int,
    seed: int,
    image_shapes: Shapes | None = None,
    *,
    num_stored: int | None = None,
) -> Policy:
    """Build a policy on the CPU; its weights depend on `config`, the shapes and `seed` alone.

    Args:
        config: What to build.
        obs_shapes: Shape of every observation without the batch dimension, as `EnvSpec` has them; `state` must be a
            vector, or a history.
        action_dim: Size of one action.
        seed: The run's seed.
        image_shapes: Camera -> `(3, height, width)`, with n_obs_steps in front for a history.
        num_stored: Numbers of the weights that will be loaded into it, which bound its size.

    Raises:
        ConfigError: The observations have no `state` vector, or point clouds that the policy cannot see, `config` is an
            impossible combination, an image is too small for its encoder, or memory does not suffice.
    """
    if config.kind in POLICY_KINDS and config.vla.model_class is None:
        _require_state(config, obs_shapes)
        _refuse_unseen(config, obs_shapes)
        if config.kind != LEROBOT and not config.vla.lora_rank and is_large(config, obs_shapes, action_dim):
            check_size(lambda: _build(config, obs_shapes, action_dim, image_shapes or {}), num_stored)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed CUDA, which the fork does not restore.
        torch.default_generator.manual_seed(derive_seed(seed, "init"))
        policy = _build(config, obs_shapes, action_dim, image_shapes or {})
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


def _build(config: PolicyConfig, obs_shapes: Shapes, action_dim: int, image_shapes: Shapes) -> Policy:
    if config.kind in ("flow", "gaussian"):
        build = FlowPolicy if config.kind == "flow" else GaussianPolicy
        return build(config, obs_shapes, action_dim, image_shapes)
    if config.kind == "vla":
        return build_vla(config, obs_shapes, action_dim, image_shapes)
    if config.kind == LEROBOT:
        return _build_lerobot(config, obs_shapes, action_dim, image_shapes)
    arguments = (config.model_copy(deep=True), dict(obs_shapes), action_dim, dict(image_shapes))
    return build_plugin(POLICIES, config.kind, arguments, Policy)  # type: ignore[type-abstract]


def _build_lerobot(config: PolicyConfig, obs_shapes: Shapes, action_dim: int, image_shapes: Shapes) -> Policy:
    folder = open_lerobot(config)  # before the import, which it allows
    cameras = match_cameras(folder, config, obs_shapes, action_dim, image_shapes)

    from asyncflow.policies.lerobot.policy import build_lerobot  # noqa: PLC0415  an optional extra, seconds to load

    return build_lerobot(config, folder, cameras, image_shapes)


def _require_state(config: PolicyConfig, obs_shapes: Shapes) -> None:
    if len(obs_shapes.get("state", ())) not in (1, 2):
        raise ConfigError(
            f"policy.kind = {config.kind} needs a vector observation named `state`, got {obs_shapes}; see env.obs_keys"
        )


def _refuse_unseen(config: PolicyConfig, obs_shapes: Shapes) -> None:
    """Refuse point clouds that a policy would not look at: what renders them takes most of the time."""
    clouds = list(point_shapes(obs_shapes))
    if clouds and config.kind == "vla":
        raise ConfigError(
            f"policy.kind = vla: asyncflow's own model sees no point clouds, env.point_clouds = {clouds}; use flow, "
            "gaussian, or a policy.vla.model_class that does"
        )
