"""Gaussian policy: one forward predicts the mean of a whole chunk; the standard deviation does not see the state.

It is the plain baseline beside the flow policy, with the same chunks and normalisation.

Shapes: N decisions, P predicted actions, H executed actions, A action size, D context size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from asyncflow.config.observations import IMAGES
from asyncflow.config.sections import PolicyConfig
from asyncflow.errors import ConfigError
from asyncflow.policies.base import REDUCED_PRECISION_NATS, Mode, Policy
from asyncflow.policies.flow_sampler import entropy_terms, log_prob_terms, select_dims
from asyncflow.policies.networks.encoders import add_encoders, encode
from asyncflow.policies.networks.layers import Normalizer, mlp
from asyncflow.simulators.spec import EnvSpec


class GaussianPolicy(Policy):
    """Independent Gaussians around an MLP's mean, in normalised action units."""

    executed_dims: Tensor | None
    has_gaussian_steps = True

    def __init__(self, config: PolicyConfig, spec: EnvSpec) -> None:
        """Build actor and critic; arguments as those of `make_policy`.

        Raises:
            ConfigError: `log_prob` is a mode of denoising steps, or `min_std` is not below `initial_std`.
        """
        super().__init__()
        _check(config)
        action_dim = spec.action_dim
        self.horizon, self.n_action_steps, self.action_dim = config.horizon, config.n_action_steps, action_dim
        self.noise_size = config.horizon * action_dim
        self._is_mean = config.log_prob == "joint_mean"
        dims = config.executed_dims
        num_executed = action_dim if dims is None else len(dims)
        self.register_buffer("executed_dims", None if dims is None else torch.tensor(dims), persistent=False)
        self.log_prob_terms = float(config.n_action_steps * num_executed) if self._is_mean else 1.0
        self._min_std = config.min_std
        context_dim = add_encoders(self, config, spec)
        if spec.shapes(IMAGES):
            self.ratio_tolerance = REDUCED_PRECISION_NATS  # cuDNN's convolutions compute in TF32
        self.action_normalizer = Normalizer((action_dim,))
        # A small gain starts every state at the middle of the action range.
        self.actor = mlp([context_dim, *config.hidden_sizes, self.noise_size], output_gain=0.01)
        self.log_std = nn.Parameter(torch.full((action_dim,), math.log(config.initial_std - config.min_std)))
        self.critic = mlp([context_dim, *config.critic_hidden_sizes, 1], output_gain=0.01)

    @torch.no_grad()
    def sample_actions(self, obs: TensorDictBase, mode: Mode, noise: Tensor) -> TensorDict:
        """Decide; `eval` returns the mean. `train` also stores `raw_actions [N, P, A]`, in normalised units."""
        context = self._context(obs)
        mean = self._mean(context)
        if mode == "eval":
            return TensorDict({"actions": self.action_normalizer.denormalize(mean)}, batch_size=mean.shape[:1])
        std = self._std()
        raw = mean + std * noise.view_as(mean)
        decision = {
            "actions": self.action_normalizer.denormalize(raw),
            "raw_actions": raw,
            "log_probs": self._log_probs(raw, mean, std),
            "values": self._value(context),
        }
        return TensorDict(decision, batch_size=mean.shape[:1])

    def default_forward(self, batch: TensorDictBase) -> TensorDict:
        """Evaluate stored decisions; see `Policy.default_forward`."""
        context = self._context(batch["obs"])
        mean, std = self._mean(context), self._std()
        entropy = self.n_action_steps * entropy_terms(select_dims(std, self.executed_dims)).sum()
        evaluation = {
            "log_probs": self._log_probs(batch["raw_actions"], mean, std),
            "values": self._value(context),
            "entropy": entropy.expand(mean.shape[0]),
        }
        if self.returns_gaussians:
            means = select_dims(mean[:, : self.n_action_steps], self.executed_dims).unsqueeze(1)
            evaluation |= {"means": means, "stds": select_dims(std, self.executed_dims).expand(means.shape)}
        return TensorDict(evaluation, batch_size=mean.shape[:1])

    def imitation_loss(self, obs: TensorDictBase, actions: Tensor, generator: torch.Generator) -> Tensor:
        """Return the negative log-likelihood of demonstrated chunks, per number, in nats; nothing is drawn."""
        raw, mean = self.action_normalizer.normalize(actions), self._mean(self._context(obs))
        terms = log_prob_terms(*(select_dims(part, self.executed_dims) for part in (raw, mean, self._std())))
        return -terms.mean()

    def get_value(self, obs: TensorDictBase) -> Tensor:
        """Return V(obs), [N] float32."""
        return self._value(self._context(obs))

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the critic's parameters."""
        return self.critic.parameters()

    def _context(self, obs: TensorDictBase) -> Tensor:
        """Return the normalised state and the features of images and point clouds, [N, D]."""
        return encode(self, obs)

    def _value(self, context: Tensor) -> Tensor:
        """Return V of contexts [N, D], [N] float32; images and clouds are the actor's to learn from."""
        value: Tensor = self.critic(context.detach())
        return value.squeeze(-1).float()

    def _mean(self, context: Tensor) -> Tensor:
        mean: Tensor = self.actor(context)
        return mean.float().view(-1, self.horizon, self.action_dim)

    def _std(self) -> Tensor:
        return self.log_std.exp() + self._min_std  # not clamped: a std at the floor must have a gradient to rise with

    def _log_probs(self, raw: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        executed = self.n_action_steps
        parts = (raw[:, :executed], mean[:, :executed], std)
        terms = log_prob_terms(*(select_dims(part, self.executed_dims) for part in parts))
        return terms.mean((1, 2)) if self._is_mean else terms.sum((1, 2))


def _check(config: PolicyConfig) -> None:
    if config.log_prob not in ("joint_sum", "joint_mean"):
        raise ConfigError(
            f"policy.log_prob = {config.log_prob} needs denoising steps; "
            "policy.kind = gaussian allows joint_sum, joint_mean"
        )
    if config.min_std >= config.initial_std:
        raise ConfigError(f"policy.min_std = {config.min_std} must be below policy.initial_std = {config.initial_std}")
