"""Policies with a velocity field: everything but the networks, and how demonstrations teach them (pre-training).

A velocity field and a value function become a `Policy` here. The loss of pre-training is flow matching
(arXiv:2210.02747). How a velocity becomes a stochastic policy is in `flow_sampler.py`.

Shapes: N decisions, P predicted actions, H executed actions, A size of the model's action, M width of a chunk: A, or
more in a padded model.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from asyncflow.config.sections import PolicyConfig
from asyncflow.policies.base import Mode, Policy
from asyncflow.policies.flow_sampler import FlowSampler, Velocity
from asyncflow.policies.networks.layers import Normalizer


class VelocityPolicy(Policy):
    """Denoises a chunk of normalised actions. A subclass computes what all denoising steps share, once a decision."""

    def __init__(self, config: PolicyConfig, action_dim: int, padded_dim: int | None = None) -> None:
        """Build the sampler; `padded_dim` is M where it is more than A.

        Raises:
            ConfigError: An impossible combination of noise keys.
        """
        super().__init__()
        self.has_gaussian_steps = True
        self.horizon, self.n_action_steps, self.action_dim = config.horizon, config.n_action_steps, action_dim
        self.sampler = FlowSampler(config, action_dim, padded_dim)
        self.num_denoising_steps = self.sampler.num_stochastic
        self.noise_size, self.log_prob_terms = self.sampler.noise_size, self.sampler.log_prob_terms
        self.action_normalizer = Normalizer((action_dim,))

    @abstractmethod
    def make_context(self, obs: TensorDictBase) -> Any:
        """Return what velocity and value are computed from; called once for a decision and once to evaluate it."""

    @abstractmethod
    def velocity_field(self, context: Any) -> Velocity:
        """Return the velocity field of a context; what all steps share is computed here."""

    @abstractmethod
    def velocity_at(self, context: Any, x: Tensor, time: Tensor) -> Tensor:
        """Return the velocity `[N, P, M]` of `x [N, P, M]` at any `time [N]` in [0, 1]; at a step's, the field's."""

    @abstractmethod
    def value(self, context: Any) -> Tensor:
        """Return V, [N] float32. Its gradient reaches the critic's parameters alone."""

    @torch.no_grad()
    def sample_actions(self, obs: TensorDictBase, mode: Mode, noise: Tensor) -> TensorDict:
        """Decide; `train` also stores what `FlowSampler.sample` returns. `eval` uses the initial noise alone."""
        context = self.make_context(obs)
        velocity = self.velocity_field(context)
        if mode == "eval":
            decision = {"actions": self.sampler.denoise(velocity, noise)}
        else:
            decision = self.sampler.sample(velocity, noise)
            decision |= {"actions": decision["chains"][:, -1], "values": self.value(context)}
        decision["actions"] = self.action_normalizer.denormalize(decision["actions"][..., : self.action_dim])
        return TensorDict(decision, batch_size=noise.shape[:1])

    def default_forward(self, batch: TensorDictBase) -> TensorDict:
        """Evaluate stored decisions; see `Policy.default_forward`."""
        context = self.make_context(batch["obs"])
        log_probs, entropy, means, stds = self.sampler.evaluate(self.velocity_field(context), batch)
        evaluation = {"log_probs": log_probs, "values": self.value(context), "entropy": entropy}
        if self.returns_gaussians:
            evaluation |= {"means": means, "stds": stds}
        return TensorDict(evaluation, batch_size=batch.batch_size)

    def get_value(self, obs: TensorDictBase) -> Tensor:
        """Return V(obs), [N] float32."""
        return self.value(self.make_context(obs))

    def flow_matching_loss(self, obs: TensorDictBase, actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Return the conditional flow matching loss (arXiv:2210.02747, eq. 23), in normalised units, float32.

        The path is `x_t = (1 - t) action + t noise`, its velocity `noise - action`. Padding is an action of 0.

        Args:
            obs: [N] observations.
            actions: [N, P, A] demonstrated chunks, in the simulator's units.
            noise: [N, P, M] standard normal numbers.
            time: [N] times in [0, 1].
        """
        padding = (0, noise.shape[-1] - self.action_dim)
        target = nn.functional.pad(self.action_normalizer.normalize(actions), padding)
        weight = time[:, None, None]
        predicted = self.velocity_at(self.make_context(obs), (1 - weight) * target + weight * noise, time)
        return nn.functional.mse_loss(predicted.float(), noise - target)

    def imitation_loss(self, obs: TensorDictBase, actions: Tensor, generator: torch.Generator) -> Tensor:
        """Return the flow matching loss with noise and times from `generator`."""
        shape, device = (len(actions), *self.sampler.chunk_shape), actions.device
        noise = torch.randn(shape, generator=generator, device=device)
        return self.flow_matching_loss(obs, actions, noise, torch.rand(shape[:1], generator=generator, device=device))

    def anneal(self, update: int) -> None:
        """Set the noise level for the number of finished updates, in place."""
        self.sampler.anneal(update)
