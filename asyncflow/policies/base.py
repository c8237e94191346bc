"""The Policy contract: what the collector, PPO, evaluation and pre-training ask of a policy.

The split into actor and critic parameters is part of it. A policy knows nothing of rollouts, lags or threads.

Shapes: N decisions in a batch, P predicted actions (horizon), H executed actions, A action size, K denoising steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from asyncflow.errors import ConfigError
from asyncflow.policies.networks.layers import Normalizer

if TYPE_CHECKING:
    from asyncflow.config.sections import PolicyConfig
    from asyncflow.simulators.spec import EnvSpec

Mode = Literal["train", "eval"]
REDUCED_PRECISION_NATS = 0.5  # a `ratio_tolerance` where TF32, or what a model computes in by itself, rounds


def clipped_inputs(policy: nn.Module, obs: TensorDictBase) -> Tensor | None:
    """Return how often each number of the state was cut by the policy's normaliser, [D], 0 to 1.

    None where there is no such normaliser, or `obs` holds features in place of the state.
    """
    normalizer = getattr(policy, "obs_normalizer", None)
    if not isinstance(normalizer, Normalizer) or not normalizer.is_fitted or "state" not in obs.keys():  # noqa: SIM118
        return None
    return normalizer.clipped_shares(obs["state"])


class Policy(nn.Module, ABC):
    """An actor and a critic over one observation.

    Attributes:
        horizon: P.
        n_action_steps: H.
        action_dim: A.
        noise_size: Standard normal numbers that one decision consumes.
        log_prob_terms: Factor from `log_probs`, summed over its denoising steps if it has them, to the joint
            log-prob of the decision: K * H * A where `log_probs` is a mean, 1 where it is a sum.
        num_denoising_steps: J, of which `per_step` log-probs are; 1 where a decision is one Gaussian.
        has_gaussian_steps: Whether `default_forward` can return the Gaussians of which a decision is made.
        returns_gaussians: Whether it does; set by who needs them, as each entry of an answer takes time.
        ratio_tolerance: Nats by which joint log-probs of the same weights may differ between acting and training. The
            default is for float32; a class that computes in reduced precision, TF32 included, sets a larger one.
        num_tasks: Tasks that it was made for; of several, an observation's `task` is one.
        made_from: The keys of `policy` that build it again; None for a policy of a user's own.
        made_for: The environments that the file describes of which it was loaded, in the simulator's names.
    """

    horizon: int
    n_action_steps: int
    action_dim: int
    noise_size: int
    log_prob_terms: float
    num_denoising_steps: int = 1
    has_gaussian_steps: bool = False
    returns_gaussians: bool = False
    ratio_tolerance: float = 0.01
    num_tasks: int = 1
    made_from: PolicyConfig | None = None
    made_for: EnvSpec | None = None

    def encode_obs(self, obs: TensorDictBase) -> TensorDictBase:
        """Return what the ring keeps of observations [N], and every other method takes as well as them.

        By default the observations themselves. A policy of which a part is frozen may return what that part makes of
        them, so that an update never runs it. Nothing that training changes may be in it: it outlives versions.
        """
        return obs

    @abstractmethod
    def sample_actions(self, obs: TensorDictBase, mode: Mode, noise: Tensor) -> TensorDict:
        """Decide.

        Args:
            obs: [N] observations.
            mode: `train` explores; `eval` is a deterministic function of `obs` and of the initial noise.
            noise: [N, noise_size] standard normal numbers.

        Returns:
            [N] `actions [N, P, A]`; what is executed of them is clipped to the simulator's limits. In `train` also
            `log_probs` ([N], or [N, K] with `per_step`) of the first H actions, `values [N]`, and whatever
            `default_forward` needs to evaluate the same decision again.
        """

    @abstractmethod
    def default_forward(self, batch: TensorDictBase) -> TensorDict:
        """Evaluate stored decisions under today's weights; never samples.

        Args:
            batch: [N] `obs` and everything that `sample_actions(mode="train")` returned.

        Returns:
            [N] `log_probs` in the stored shape, `values [N]`, `entropy [N]` in nats. With `returns_gaussians` also
            `means` and `stds`, both [N, J, H, A], of the Gaussians that the log-probs are those of.
        """

    def imitation_loss(self, obs: TensorDictBase, actions: Tensor, generator: torch.Generator) -> Tensor:
        """Return the loss that pulls decisions towards demonstrated ones, [], with a gradient.

        Args:
            obs: [N] observations.
            actions: [N, P, A] demonstrated chunks, in the simulator's units.
            generator: On the policy's device; whatever is random is drawn from it.

        Raises:
            ConfigError: The policy has none.
        """
        raise ConfigError(
            f"auxiliary loss bc: {type(self).__name__} has no imitation_loss; asyncflow's flow, gaussian and vla have"
        )

    @abstractmethod
    def get_value(self, obs: TensorDictBase) -> Tensor:
        """Return V(obs), [N] float32, in units of discounted reward. Never runs the sampler."""

    @abstractmethod
    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that only the value function uses."""

    def actor_parameters(self) -> Iterator[nn.Parameter]:
        """Yield every other parameter."""
        critic = {id(parameter) for parameter in self.critic_parameters()}
        return (parameter for parameter in self.parameters() if id(parameter) not in critic)

    def anneal(self, update: int) -> None:
        """Set what depends on the number of finished updates, in place. Called before weights are published."""

    def export(self, folder: Path) -> None:
        """Write into a checkpoint, beside the policy file, what other programs load; nothing by default."""


def is_scaled(policy: nn.Module) -> bool:
    """Tell whether asyncflow scales a policy's observations and actions; a model from elsewhere does so itself."""
    return isinstance(getattr(policy, "obs_normalizer", None), Normalizer)


def scale_actions(policy: nn.Module, limits: tuple[Tensor, Tensor], recorded: Tensor | None = None) -> None:
    """Let a policy that asyncflow normalises put out [-1, 1] for the range of its actions.

    That is the range of recorded actions, or else the simulator's; where it has none, the policy decides in the
    simulator's units. A policy without asyncflow's `obs_normalizer` scales its actions itself, and is left as it is.

    Args:
        policy: Changed in place.
        limits: `EnvSpec.action_limits`.
        recorded: [L, A] actions of demonstrations.
    """
    if not is_scaled(policy):
        return
    is_limited = (limits[1] - limits[0]).isfinite()
    low, high = (torch.where(is_limited, limit, one) for limit, one in zip(limits, (-1.0, 1.0), strict=True))
    unit = ((high - low) / 2).clamp(min=torch.finfo(low.dtype).eps)
    if recorded is not None:
        low, high = recorded.amin(0), recorded.amax(0)
    normalizer: Normalizer = policy.action_normalizer  # type: ignore[assignment]
    normalizer.set_range(low, high, unit)


def set_eval(policy: nn.Module) -> None:
    """Put every module into evaluation mode, also one whose own `train` would do otherwise."""
    for module in policy.modules():
        module.training = False
