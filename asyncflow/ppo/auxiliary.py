"""Auxiliary losses: terms that are added to PPO's loss in every minibatch that trains the actor.

    loss = surrogate_loss + vf_coef * value_loss - ent_coef * entropy + sum_i weight_i * auxiliary_i

`algorithm.auxiliary` lists those that asyncflow brings, `PPO(policy, auxiliary=[...])` takes any `AuxiliaryLoss`.

Shapes: T decisions, N environments, B decisions of a minibatch, C decisions that are imitated, J denoising steps,
H executed actions, A action size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from asyncflow.config.sections import AuxiliaryConfig, Schedule
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.policies.base import Policy
from asyncflow.ppo.losses import masked_mean
from asyncflow.ppo.schedules import remaining
from asyncflow.rollout.weights import changing_tensors, make_acting_copy

PIECE = 64  # decisions that the reference evaluates at once


class AuxiliaryLoss(ABC):
    """One more term of the loss.

    Attributes:
        name: `train/<name>_loss` is the metric of its mean, without the weight.
        weight: Its factor.
        weight_final: Its factor at the schedule's end.
        schedule: How the factor goes from one to the other: constant, linear or cosine.
        schedule_updates: Updates that this takes; None for those of the run.
        state: Tensors that the term goes on from when a run is resumed, by name. Replace them, never change them in
            place: an update that is abandoned puts the mapping back to what it was.
        made_from: The entry of `algorithm.auxiliary` that builds it again; None for a loss of a user's own.
    """

    name: str = "auxiliary"
    weight: float = 1.0
    weight_final: float = 0.0
    schedule: Schedule = "constant"
    schedule_updates: int | None = None
    state: Mapping[str, Tensor] = {}
    made_from: AuxiliaryConfig | None = None

    def begin_update(self, policy: Policy, batch: TensorDict, seed: int) -> None:  # noqa: B027  needed by few
        """Prepare an update; called before its first minibatch, without gradient. By default nothing happens.

        Args:
            policy: With the weights at the update's start.
            batch: [T, N] the rollout with `obs`, `valid`, `advantages` and `returns`. Fields [T, N, ...] that are added
                are shuffled along, and each minibatch has its rows of them.
            seed: Of this update and this loss: whatever is random must be drawn from it, so that a resumed run, and
                both buffer types, draw the same.
        """

    @abstractmethod
    def __call__(self, policy: Policy, minibatch: TensorDictBase, evaluation: TensorDictBase) -> Tensor:
        """Return the loss of a minibatch, [], with a gradient. It must not read the device back.

        Args:
            policy: With today's weights.
            minibatch: [B] decisions; `valid` says which count.
            evaluation: [B] what `policy.default_forward(minibatch)` returned.
        """

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the `state` of a run that was cut."""
        self.state = dict(state)

    def weight_in(self, update: int, total_updates: int | None) -> float:
        """Return the factor in an update, which are numbered from 0."""
        total = self.schedule_updates or total_updates
        left = remaining(self.schedule, update, total, f"the schedule of the auxiliary loss {self.name}")
        return (
            self.weight_final + (self.weight - self.weight_final) * left if self.schedule != "constant" else self.weight
        )

    def follow(self, config: AuxiliaryConfig) -> None:
        """Take weight and schedule from the configuration."""
        self.made_from = config
        self.weight, self.weight_final = config.weight, config.weight_final
        self.schedule, self.schedule_updates = config.schedule, config.schedule_updates


class Demonstrations(Protocol):
    """Decisions to imitate."""

    def __len__(self) -> int:
        """Return how many there are."""

    def pick(self, rows: Tensor) -> tuple[TensorDictBase, Tensor]:
        """Return observations and actions [P, A], in the simulator's units, of rows [C], on the policy's device."""


class BehaviorCloning(AuxiliaryLoss):
    """Imitates demonstrations, or the decisions of the run's own successful episodes.

    The loss is that of the policy (`Policy.imitation_loss`): flow matching, or the negative log-likelihood of a
    Gaussian. A decision of the run's own counts as a success if its episode succeeded within the same rollout.
    """

    def __init__(
        self,
        demonstrations: Demonstrations | None = None,
        *,
        weight: float = 1.0,
        batch_size: int = 256,
        capacity: int = 10_000,
        name: str = "bc",
    ) -> None:
        """Imitate demonstrations; without them the run's own successes, of which the newest `capacity` are kept.

        Raises:
            ConfigError: `demonstrations` cannot be picked from.
        """
        if demonstrations is not None and not hasattr(demonstrations, "pick"):
            raise ConfigError(
                f"BehaviorCloning({type(demonstrations).__name__}): expected demonstrations with pick(rows), or "
                "nothing for the run's own successes"
            )
        self.name, self.weight = name, weight
        self.demonstrations = demonstrations
        self.batch_size, self.capacity = batch_size, capacity
        self.state: dict[str, Tensor] = {}
        self._generator = torch.Generator()

    def begin_update(self, policy: Policy, batch: TensorDict, seed: int) -> None:
        """Keep what succeeded in this rollout, and begin the update's random numbers."""
        self._generator = torch.Generator(batch["valid"].device).manual_seed(seed)
        if self.demonstrations is None:
            self._keep_successes(batch)

    def __call__(self, policy: Policy, minibatch: TensorDictBase, evaluation: TensorDictBase) -> Tensor:
        """Return the loss of randomly chosen decisions; zero while there are none."""
        size = len(self.demonstrations) if self.demonstrations is not None else len(self.state.get("actions", ()))
        if not size:
            return torch.zeros((), device=minibatch["valid"].device)
        rows = torch.randint(size, (self.batch_size,), generator=self._generator, device=self._generator.device)
        obs, actions = self._pick(rows) if self.demonstrations is None else self.demonstrations.pick(rows)
        return policy.imitation_loss(obs, actions, self._generator)

    def _pick(self, rows: Tensor) -> tuple[TensorDictBase, Tensor]:
        fields = {tuple(name.split(":")[1:]): x[rows] for name, x in self.state.items() if name != "actions"}
        obs = TensorDict({}, [len(rows)])
        for name, x in fields.items():
            obs[name] = x
        return obs, self.state["actions"][rows]

    def _keep_successes(self, batch: TensorDict) -> None:
        """Add this rollout's decisions of episodes that succeeded in it to the store, and drop the oldest."""
        is_kept = successful_decisions(batch).flatten()
        rows = is_kept.nonzero().flatten()[-self.capacity :]  # sync: once an update
        flat = batch.flatten(0, 1)
        leaves = flat["obs"].items(include_nested=True, leaves_only=True)
        fields = {":".join(["obs", *((name,) if isinstance(name, str) else name)]): x for name, x in leaves}
        kept = {}
        for name, x in (fields | {"actions": flat["actions"]}).items():
            new = x[rows]
            old = self.state.get(name, new[:0])
            kept[name] = torch.cat([old, new])[-self.capacity :]
        self.state = kept


def successful_decisions(batch: TensorDictBase) -> Tensor:
    """Tell of which decisions, [T, N], the episode succeeds within the rollout, all of it in it valid."""
    is_end = batch["terminated"] | batch["truncated"]
    leads, found = torch.zeros_like(is_end[0]), []
    for t in reversed(range(len(is_end))):
        leads = torch.where(is_end[t], batch["succeeded"][t], leads) & batch["valid"][t]
        found.append(leads)
    return torch.stack(found[::-1])


class ReferenceKL(AuxiliaryLoss):
    """The KL divergence from the policy to the one that the run began with, in nats of a whole decision.

    For a flow policy it is that of the denoising path (DPPO, arXiv:2409.00588, takes every denoising step as a Gaussian
    policy): the KL divergences of the steps' Gaussians, at the chains that were sampled, added up. Where both have the
    same variance that is a sum of squared differences of the means over twice the variance. The reference's means are
    computed once an update.
    """

    def __init__(self, policy: Policy, *, weight: float = 1.0, name: str = "reference_kl") -> None:
        """Copy the policy as it is now; what is frozen in it is shared.

        Raises:
            ConfigError: The policy does not tell the Gaussians of its steps.
        """
        if not policy.has_gaussian_steps:
            raise ConfigError(
                f"auxiliary loss reference_kl: {type(policy).__name__} does not tell the Gaussians of its decisions; "
                "asyncflow's flow, gaussian and vla policies do (Policy.has_gaussian_steps)"
            )
        self.name, self.weight = name, weight
        policy.returns_gaussians = True
        self._reference = make_acting_copy(policy)
        self.state = changing_tensors(self._reference)
        for parameter in self._reference.parameters():
            parameter.requires_grad_(False)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over the weights of the policy that the run began with.

        Raises:
            CheckpointError: They are not those of this policy.
        """
        wanted = {name: tuple(x.shape) for name, x in self.state.items()}
        if wanted != {name: tuple(x.shape) for name, x in state.items()}:
            raise CheckpointError(f"the state of the auxiliary loss {self.name} does not fit the policy")
        for name, x in state.items():
            self.state[name].copy_(x)

    def begin_update(self, policy: Policy, batch: TensorDict, seed: int) -> None:
        """Add the reference's Gaussians of every decision."""
        pieces = [self._reference.default_forward(piece) for piece in batch.flatten(0, 1).split(PIECE)]
        for part in ("means", "stds"):
            batch[f"{self.name}_{part}"] = torch.cat([piece[part] for piece in pieces]).unflatten(0, batch.batch_size)

    def __call__(self, policy: Policy, minibatch: TensorDictBase, evaluation: TensorDictBase) -> Tensor:
        """Return the mean over the valid decisions."""
        reference = (minibatch[f"{self.name}_means"], minibatch[f"{self.name}_stds"])
        kl = gaussian_kl(evaluation["means"], evaluation["stds"], *reference)
        return masked_mean(kl.flatten(1).sum(1), minibatch["valid"])


def gaussian_kl(mean: Tensor, std: Tensor, mean_0: Tensor, std_0: Tensor) -> Tensor:
    """Return KL(N(mean, std) || N(mean_0, std_0)) per element, in nats."""
    difference, ratio = (mean - mean_0) / std_0, std / std_0
    return 0.5 * (difference * difference + ratio * ratio - 1) - ratio.log()


def build_auxiliary(
    config: AuxiliaryConfig, policy: Policy, demonstrations: Demonstrations | None = None
) -> AuxiliaryLoss:
    """Return the term that an entry of `algorithm.auxiliary` names.

    Args:
        config: The entry.
        policy: What is trained, as the run begins with it.
        demonstrations: What `dataset` holds.

    Raises:
        ConfigError: The policy cannot have that term, or demonstrations are missing.
    """
    loss: AuxiliaryLoss
    if config.kind == "reference_kl":
        loss = ReferenceKL(policy)
    elif config.dataset is not None and demonstrations is None:
        raise ConfigError(
            f"algorithm.auxiliary: bc from dataset = {config.dataset}: only a run reads datasets; give "
            "PPO(policy, auxiliary=[BehaviorCloning(demonstrations)])"
        )
    else:
        loss = BehaviorCloning(demonstrations, batch_size=config.batch_size, capacity=config.capacity)
    loss.follow(config)
    return loss


def check_names(losses: Sequence[AuxiliaryLoss]) -> list[AuxiliaryLoss]:
    """Return auxiliary losses, whose names must be words of their own: metrics and checkpoints tell them apart by them.

    Raises:
        ConfigError: One is no `AuxiliaryLoss`, two have the same name, or one is no word.
    """
    for each in losses:
        if not isinstance(each, AuxiliaryLoss):
            raise ConfigError(
                f"PPO(auxiliary=[...]): expected losses such as ReferenceKL(policy, weight=0.1), got {each!r}"
            )
    names = [each.name for each in losses]
    for name in names:
        if not name.isidentifier() or names.count(name) > 1:
            raise ConfigError(f"auxiliary losses {', '.join(names)}: expected different names of letters, digits and _")
    return list(losses)
