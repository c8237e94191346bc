"""Reward scaling: rewards divided by the running standard deviation of their discounted sum.

The sum is that of every environment's rewards so far in its episode, discounted per env step; mean and variance of all
sums of a run are updated by every rollout, before its rewards are divided (Engstrom et al., "Implementation Matters in
Deep RL", arXiv:2005.12729, section 3; gymnasium's NormalizeReward). Rewards are not shifted.

Shapes: T decisions, N environments.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

EPSILON = 1e-8


class RewardScale:
    """Running statistics of discounted sums of rewards.

    Attributes:
        state: `sums [N]` of the open episodes, `count`, `mean` and `square` (sum of squared differences from the mean),
            [] float64; empty before the first rollout. Replaced by every rollout, never changed in place.
    """

    def __init__(self) -> None:
        self.state: Mapping[str, Tensor] = {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the `state` of a run that was cut."""
        self.state = dict(state)

    def scale(self, rewards: Tensor, discounts: Tensor, boundary: Tensor, valid: Tensor) -> Tensor:
        """Take the rewards of a rollout into account and return them divided, [T, N]. Reads nothing back.

        Args:
            rewards: [T, N] of chunks.
            discounts: [T, N] of the chunks, gamma ** executed.
            boundary: [T, N] bool, an episode ends here.
            valid: [T, N] bool; other decisions are left out, and the sum begins again behind them.
        """
        zero = torch.zeros((), dtype=torch.float64, device=rewards.device)
        before = self.state or {"sums": zero.expand(rewards.shape[1]), "count": zero, "mean": zero, "square": zero}
        running, sums = before["sums"], []
        for reward, discount, is_end, is_valid in zip(
            rewards.double(), discounts.double(), boundary, valid, strict=True
        ):
            # As in gymnasium it is the past that is discounted: sums spread like returns and need no future.
            now = torch.where(is_valid, running + reward, 0.0)
            sums.append(now)
            running = torch.where(is_end | ~is_valid, 0.0, now * discount)
        seen, weights = torch.stack(sums), valid.double()
        count = weights.sum()
        mean = (seen * weights).sum() / count.clamp(min=1)
        square = ((seen - mean).square() * weights).sum()
        total = before["count"] + count
        shift = mean - before["mean"]
        share = count / total.clamp(min=1)
        self.state = {
            "sums": running,
            "count": total,
            "mean": before["mean"] + shift * share,
            "square": before["square"] + square + shift.square() * before["count"] * share,
        }
        std = (self.state["square"] / total.clamp(min=1) + EPSILON).sqrt()
        return (rewards / std).to(rewards.dtype)
