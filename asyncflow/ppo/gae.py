"""Advantages and returns of a rollout, as pure functions.

The caller passes, for every decision, the value of the observation that followed it in the *same* episode (the true
final observation where the horizon cut it).

Shapes: T decisions, N environments.

Papers: GAE, Schulman et al., arXiv:1506.02438, eq. 16; a chunk is one decision whose discount is `gamma ** executed`,
as in semi-Markov options (Sutton, Precup and Singh, 1999).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transitions:
    """The parts of a rollout that advantages are computed from, all [T, N].

    Attributes:
        rewards: `sum_i gamma^i r_i` of the chunk.
        values: V(observation).
        next_values: V of the observation that followed; ignored where `terminated`.
        discounts: gamma ** executed env steps.
        terminated: bool, the task was solved: nothing follows.
        boundary: bool, the next row is not the same episode's next decision.
    """

    rewards: Tensor
    values: Tensor
    next_values: Tensor
    discounts: Tensor
    terminated: Tensor
    boundary: Tensor

    @property
    def bootstrap(self) -> Tensor:
        """Discounted value of what followed, zero after termination."""
        return torch.where(self.terminated, 0.0, self.discounts * self.next_values)

    @property
    def errors(self) -> Tensor:
        """By how much what a decision led to exceeds its value: r + discount V' - V."""
        return self.rewards + self.bootstrap - self.values

    def without(self, invalid: Tensor) -> Transitions:
        """Return a copy in which nothing spreads from decisions that are `invalid`, [T, N], to those before them."""
        boundary = self.boundary.clone()
        boundary[:-1] |= invalid[1:]
        names = ("rewards", "values", "next_values", "discounts")
        zeroed = {name: getattr(self, name).masked_fill(invalid, 0.0) for name in names}
        return replace(self, boundary=boundary, **zeroed)


def compute_gae(transitions: Transitions, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Return GAE's advantages and returns, both [T, N].

    Args:
        transitions: The rollout.
        gae_lambda: Lambda per decision; 1 gives the Monte Carlo return, bootstrapped at a cut.
    """
    decay = transitions.discounts * gae_lambda * ~transitions.boundary
    running, backwards = torch.zeros_like(transitions.rewards[0]), []
    for delta, factor in zip(transitions.errors.flip(0), decay.flip(0), strict=True):
        running = delta + factor * running
        backwards.append(running)
    advantages = torch.stack(backwards).flip(0)
    return advantages, advantages + transitions.values


def compute_n_step(transitions: Transitions, n_step: int) -> tuple[Tensor, Tensor]:
    """Return advantages and returns of the n-step estimator, both [T, N].

    The return sums the rewards of up to `n_step` decisions and bootstraps after the last of them; it bootstraps
    earlier where the episode or the rollout ends.
    """
    one_step = transitions.rewards + transitions.bootstrap
    returns = one_step
    is_end = transitions.boundary.clone()
    is_end[-1] = True
    for _ in range(min(n_step, len(one_step)) - 1):  # more than a rollout's change nothing
        following = transitions.rewards + transitions.discounts * returns.roll(-1, 0)
        returns = torch.where(is_end, one_step, following)
    return returns - transitions.values, returns
