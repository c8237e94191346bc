"""Flow-matching policy: a velocity MLP and a critic MLP over the state and, with cameras, their features.

The two MLPs are built here. How a velocity becomes a stochastic policy is in `flow_sampler.py`, how that becomes a
Policy, and what pre-training minimises, in `velocity.py`.

Shapes: N decisions, K denoising steps, J stochastic ones, P predicted actions, A action size, D context size, W width
of the first hidden layer, E time features.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensordict import TensorDictBase
from torch import Tensor, nn

from asyncflow.config.observations import IMAGES
from asyncflow.config.sections import PolicyConfig
from asyncflow.policies.base import REDUCED_PRECISION_NATS
from asyncflow.policies.flow_sampler import Steps, Velocity
from asyncflow.policies.networks.encoders import add_encoders, encode
from asyncflow.policies.networks.layers import NUM_TIME_FEATURES, mlp, time_features
from asyncflow.policies.velocity import VelocityPolicy
from asyncflow.simulators.spec import EnvSpec


class VelocityNetwork(nn.Module):
    """MLP over (context, noisy chunk, time features); its first layer is split, so each part is computed once."""

    def __init__(self, state_dim: int, chunk_size: int, hidden_sizes: list[int]) -> None:
        super().__init__()
        width = hidden_sizes[0]
        self.state_in = mlp([state_dim, width], output_gain=2**0.5)
        self.time_in = mlp([NUM_TIME_FEATURES, width], output_gain=2**0.5)
        self.chunk_in = mlp([chunk_size, width], output_gain=2**0.5)
        self.trunk = nn.Sequential(nn.ReLU(inplace=True), mlp([*hidden_sizes, chunk_size]))

    def forward(self, x: Tensor, state: Tensor, time: Tensor) -> Tensor:
        """Return the velocity `[..., P, A]` of `x [..., P, A]`, given `state` and `time` `[..., W]` from `*_in`."""
        hidden = self.chunk_in(x.flatten(-2)) + state + time
        velocity: Tensor = self.trunk(hidden)
        return velocity.view(x.shape)


class FlowPolicy(VelocityPolicy):
    """Denoises a chunk of normalised actions, conditioned on the normalised state and what cameras see."""

    step_features: Tensor

    def __init__(self, config: PolicyConfig, spec: EnvSpec) -> None:
        """Build the networks and the sampler; arguments as those of `make_policy`.

        Raises:
            ConfigError: An impossible combination of noise keys.
        """
        super().__init__(config, spec.action_dim)
        context_dim = add_encoders(self, config, spec)
        if spec.shapes(IMAGES):
            self.ratio_tolerance = REDUCED_PRECISION_NATS  # cuDNN's convolutions compute in TF32
        self.velocity = VelocityNetwork(context_dim, config.horizon * spec.action_dim, config.hidden_sizes)
        self.critic = mlp([context_dim, *config.critic_hidden_sizes, 1], output_gain=0.01)
        self.register_buffer("step_features", time_features(self.sampler.time), persistent=False)

    def make_context(self, obs: TensorDictBase) -> Tensor:
        """Return the normalised state and the features of images and point clouds, [N, D]."""
        return encode(self, obs)

    def velocity_field(self, context: Tensor) -> Velocity:
        """Return the velocity field of contexts [N, D]."""
        state, times = self.velocity.state_in(context), self.velocity.time_in(self.step_features)

        def velocity(x: Tensor, steps: Steps) -> Tensor:
            shared = state[:, None] if isinstance(steps, slice) else state
            result: Tensor = self.velocity(x, shared, times[steps])
            return result

        return velocity

    def velocity_at(self, context: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Return the velocity `[N, P, A]` of contexts [N, D]."""
        state, times = self.velocity.state_in(context), self.velocity.time_in(time_features(time))
        velocity: Tensor = self.velocity(x, state, times)
        return velocity

    def value(self, context: Tensor) -> Tensor:
        """Return V of contexts [N, D], [N] float32; images and clouds are the actor's to learn from."""
        value: Tensor = self.critic(context.detach())
        return value.squeeze(-1).float()

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the critic's parameters."""
        return self.critic.parameters()
