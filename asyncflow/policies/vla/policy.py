"""VLAPolicy: a vision-language-action model as a policy.

This file decides when the prefix is encoded, in which precision, and what the value's gradient reaches. The networks
may be any model with the methods of `VELOCITY_METHODS`.

A model's prefix is a tensor, or a TensorDict of `features` and what else velocity and value need of an observation.

Shapes: N decisions, K denoising steps, J of them evaluated at once, P predicted actions, M width of a chunk: the size
of the model's action, or more in a padded model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from asyncflow.config.contracts import broken, name_of
from asyncflow.config.observations import IMAGES
from asyncflow.config.sections import PolicyConfig
from asyncflow.errors import ConfigError
from asyncflow.policies.base import REDUCED_PRECISION_NATS, Policy
from asyncflow.policies.flow_sampler import Steps, Velocity
from asyncflow.policies.networks.layers import Normalizer
from asyncflow.policies.networks.lora import add_lora
from asyncflow.policies.velocity import VelocityPolicy
from asyncflow.policies.vla.foreign import (
    ACTOR_CRITIC_METHODS,
    VELOCITY_METHODS,
    ForeignPolicy,
    has_methods,
    load_model,
    require_row,
)
from asyncflow.policies.vla.model import SIZES, VLAModel, VLAShape, tokenize
from asyncflow.simulators.spec import EnvSpec

Prefix = Tensor | TensorDictBase


class VLAPolicy(VelocityPolicy):
    """Denoises chunks with a model's expert; its value head sees the prefix, and no gradient flows from it there."""

    def __init__(self, config: PolicyConfig, model: nn.Module, action_dim: int) -> None:
        """Wrap a model with the methods of `VELOCITY_METHODS`.

        Raises:
            ConfigError: An impossible combination of noise keys, a backbone that cannot be frozen, or chunks that are
                narrower than the actions.
        """
        padded_dim = getattr(model, "padded_action_dim", action_dim)
        if padded_dim < action_dim:
            raise ConfigError(
                f"{type(model).__name__}: padded_action_dim = {padded_dim} is less than the {action_dim} dimensions of "
                "an action (policy.mapping.action.size)"
            )
        super().__init__(config, action_dim, padded_dim)
        self.model: Any = model
        self._dtype: torch.dtype = getattr(torch, config.vla.dtype)
        self._feature_dtype: torch.dtype = getattr(torch, config.vla.feature_dtype)
        self._is_frozen = config.freeze_backbone
        # A model may compute in less than float32 by itself. Under autocast it always does, and a sum of a hundred
        # log-probs keeps the rounding of each.
        self.ratio_tolerance = REDUCED_PRECISION_NATS if self._dtype == torch.float32 else 25.0
        if self._is_frozen:
            if not isinstance(getattr(model, "backbone", None), nn.Module):
                raise ConfigError(f"policy.freeze_backbone = true: {type(model).__name__} has no module `backbone`")
            self.model.backbone.requires_grad_(False).to(self._dtype)
        self.train()

    def train(self, mode: bool = True) -> VLAPolicy:
        """Stay in evaluation mode: dropout would make training re-evaluate other decisions than were taken."""
        return super().train(False)

    @property
    def obs_normalizer(self) -> Normalizer:
        """The model's normalisation of the state."""
        normalizer: Normalizer = self.model.obs_normalizer
        return normalizer

    def encode_obs(self, obs: TensorDictBase) -> TensorDictBase:
        """Return the `prefix` that a frozen backbone makes of observations, features in `policy.vla.feature_dtype`."""
        if not self._is_frozen:
            return obs
        with torch.enable_grad():  # records nothing where all is frozen
            prefix = self._run_backbone(obs)
        if prefix.requires_grad:
            raise ConfigError(
                "policy.freeze_backbone = true: encode_prefix depends on parameters outside `backbone`, "
                "which are trained"
            )
        return TensorDict({"prefix": _cast_features(prefix, self._feature_dtype)}, batch_size=obs.batch_size)

    def make_context(self, obs: TensorDictBase) -> Prefix:
        """Return the prefix of observations, its features float32, or of what `encode_obs` made of them."""
        if not self._is_frozen:
            return _cast_features(self._run_backbone(obs), torch.float32)
        encoded = obs if "prefix" in obs.keys() else self.encode_obs(obs)  # noqa: SIM118  a TensorDict iterates rows
        return _cast_features(encoded["prefix"], torch.float32)

    def _run_backbone(self, obs: TensorDictBase) -> Prefix:
        with self._autocast():
            prefix: Prefix = self.model.encode_prefix(obs)
        if not isinstance(prefix, Tensor | TensorDictBase) or prefix.shape[:1] != obs.shape[:1]:
            raise broken(f"{name_of(self.model)}.encode_prefix", "returned", prefix, f"a batch of {len(obs)} prefixes")
        if not isinstance(prefix, Tensor) and "features" not in prefix:
            raise ConfigError(
                f"{type(self.model).__name__}: encode_prefix returned names without `features`: "
                f"{', '.join(map(str, prefix.keys()))}"
            )
        return prefix

    def velocity_field(self, context: Prefix) -> Velocity:
        """Return the velocity field; the expert's keys and values of the prefix are computed here, once."""
        cache = self._cache_prefix(context)

        def velocity(x: Tensor, steps: Steps) -> Tensor:
            is_slice = isinstance(steps, slice)
            chunks = x if is_slice else x[:, None]
            times = self.sampler.time[steps] if is_slice else self.sampler.time[steps].view(-1, 1)
            v = self._ask_velocity(cache, chunks, times.expand(chunks.shape[:2]))
            return v if is_slice else v[:, 0]

        return velocity

    def velocity_at(self, context: Prefix, x: Tensor, time: Tensor) -> Tensor:
        """Return the velocity `[N, P, M]`; every chunk is one step, at a time of its own."""
        return self._ask_velocity(self._cache_prefix(context), x[:, None], time[:, None])[:, 0]

    def _ask_velocity(self, cache: Any, chunks: Tensor, times: Tensor) -> Tensor:
        with self._autocast():
            velocity: Tensor = self.model.velocity(cache, chunks, times)
        if not isinstance(velocity, Tensor) or velocity.shape != chunks.shape:
            expected = f"a tensor of shape {tuple(chunks.shape)}: decisions, steps, policy.horizon, action size"
            raise broken(f"{name_of(self.model)}.velocity", "returned", velocity, expected)
        return velocity

    def _cache_prefix(self, context: Prefix) -> Any:
        with self._autocast():
            return self.model.cache_prefix(context) if hasattr(self.model, "cache_prefix") else context

    def value(self, context: Prefix) -> Tensor:
        """Return V, [N] float32."""
        return require_row(self.model.value(context.detach()), len(context), self.model, "value").float()

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the value head's parameters."""
        head = getattr(self.model, "value_head", None)
        return iter(()) if head is None else head.parameters()

    def _autocast(self) -> AbstractContextManager[Any]:
        """Return what computes in `policy.vla.dtype`; float32 leaves the caller's autocast as it is."""
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.sampler.time.device.type, self._dtype)


def build_vla(config: PolicyConfig, spec: EnvSpec) -> Policy:
    """Build asyncflow's own model of `policy.vla.size` from scratch, or load `policy.vla.model_class`.

    Raises:
        ConfigError: An instruction that is too long, a patch that does not fit, impossible noise keys, or a model
            that cannot be had or lacks a method.
    """
    if config.vla.model_class is not None:
        model = load_model(config.vla)
        _instruct(model, config, read_instructions(config, spec))
        if config.vla.lora_rank:
            add_lora(model, config.vla)
        return _wrap(config, model, spec.action_dim)
    vla = config.vla
    shape = VLAShape(
        image_shapes=spec.shapes(IMAGES),
        state_shape=spec.state_shape,
        horizon=config.horizon,
        action_dim=spec.action_dim,
        instructions=tokenize(read_instructions(config, spec)),
        patch_size=vla.patch_size,
    )
    own = VLAModel(SIZES[vla.size], shape, config.critic_hidden_sizes)
    if vla.lora_rank:
        add_lora(own, vla)
    return VLAPolicy(config, own, spec.action_dim)


def read_instructions(config: PolicyConfig, spec: EnvSpec) -> list[str]:
    """Return the instruction of every task, by their places in `spec.task_table`; one where one serves all of them.

    The configuration's stands in place of the tasks' own.
    """
    told = [config.instruction] if config.instruction else [task.instruction for task in spec.task_table]
    return told[:1] if len(set(told)) == 1 else told


def _instruct(model: nn.Module, config: PolicyConfig, instructions: list[str]) -> None:
    """Tell a loaded model what to do, if it can be told: each task's instruction, or the one of all."""
    tell = getattr(model, "set_instruction", None)
    if len(instructions) > 1 and callable(tell_all := getattr(model, "set_instructions", None)):
        tell_all(instructions)
    elif len(instructions) > 1 and callable(tell):
        raise ConfigError(
            f"env.tasks: {config.vla.model_class} takes one instruction, by set_instruction(text), and the tasks have "
            f"{len(instructions)}; give it set_instructions(texts), of which an observation's `task` is the index"
        )
    elif callable(tell):
        tell(instructions[0])
    elif config.mapping.obs.language:
        raise ConfigError(
            f"policy.mapping.obs.language = {config.instruction!r}: {config.vla.model_class} has no method "
            "set_instruction(text) that takes it"
        )


def _wrap(config: PolicyConfig, model: nn.Module, action_dim: int) -> Policy:
    """Return a loaded model as the policy that its methods make it."""
    if has_methods(model, VELOCITY_METHODS):
        return VLAPolicy(config, model, action_dim)
    if has_methods(model, ACTOR_CRITIC_METHODS):
        return ForeignPolicy(config, model, action_dim)
    raise ConfigError(
        f"policy.vla.model_class = {config.vla.model_class}: needs the methods {', '.join(VELOCITY_METHODS)}, or "
        f"{', '.join(ACTOR_CRITIC_METHODS)}"
    )


def _cast_features(prefix: Prefix, dtype: torch.dtype) -> Prefix:
    """Return a prefix with its features in another type, and what else it holds as it is."""
    if isinstance(prefix, Tensor):
        return prefix.to(dtype)
    return prefix.copy().set("features", prefix["features"].to(dtype))
