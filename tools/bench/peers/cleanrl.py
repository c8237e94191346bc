"""A PPO update of the shape that CleanRL's single-file scripts have, in plain PyTorch.

Written from the published description (Huang et al., "The 37 implementation details of PPO", 2022; CleanRL, JMLR
2022): GAE in a loop over time, minibatches by NumPy's shuffle, advantages normalised in each of them, Adam with an
epsilon of 1e-5, one gradient norm, and the numbers that are logged read back in every minibatch.

Shapes: T decisions, N environments, B decisions of a minibatch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from asyncflow.policies.networks.layers import mlp
from tools.bench.peers.setting import (
    CHUNK_GAMMA,
    CLIP,
    ENT_COEF,
    LAMBDA,
    MAX_GRAD_NORM,
    NUM_EPOCHS,
    NUM_MINIBATCHES,
    VF_COEF,
    Batch,
)


class CleanRLAgent(nn.Module):
    """Actor and critic in one module; the standard deviation does not see the state."""

    def __init__(self, state_dim: int, action_dim: int, hidden: list[int], std: float) -> None:
        super().__init__()
        self.actor_mean = mlp([state_dim, *hidden, action_dim], 0.01)
        self.actor_logstd = nn.Parameter(torch.full((1, action_dim), float(np.log(std))))
        self.critic = mlp([state_dim, *hidden, 1])

    def evaluate(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probs, entropies and values, each [B]."""
        mean = self.actor_mean(obs)
        normal = Normal(mean, self.actor_logstd.expand_as(mean).exp())
        return normal.log_prob(actions).sum(1), normal.entropy().sum(1), self.critic(obs).view(-1)


@torch.no_grad()
def compute_advantages(batch: Batch) -> Tensor:
    """Return GAE's advantages, [T, N]; Schulman et al., arXiv:1506.02438, eq. 16."""
    advantages, last = torch.zeros_like(batch.rewards), torch.zeros_like(batch.last_values)
    next_values = batch.last_values
    for t in reversed(range(len(batch.rewards))):
        goes_on = 1.0 - batch.dones[t].float()
        delta = batch.rewards[t] + CHUNK_GAMMA * next_values * goes_on - batch.values[t]
        last = delta + CHUNK_GAMMA * LAMBDA * goes_on * last
        advantages[t], next_values = last, batch.values[t]
    return advantages


def train_like_cleanrl(agent: CleanRLAgent, optimizer: torch.optim.Optimizer, batch: Batch) -> dict[str, float]:
    """Train on a rollout; return what is logged."""
    advantages = compute_advantages(batch)
    rows = {name: getattr(batch, name).flatten(0, 1) for name in ("obs", "actions", "log_probs", "values")}
    rows |= {"advantages": advantages.flatten(), "returns": (advantages + batch.values).flatten()}
    order = np.arange(len(rows["obs"]))
    clip_fractions: list[float] = []
    for _ in range(NUM_EPOCHS):
        np.random.shuffle(order)
        for indices in np.split(order, NUM_MINIBATCHES):
            minibatch = {name: values[indices] for name, values in rows.items()}
            logged = train_minibatch(agent, optimizer, minibatch)
            clip_fractions.append(float(logged["clip_fraction"]))
    residual, variance = np.var((rows["returns"] - rows["values"]).numpy()), np.var(rows["returns"].numpy())
    numbers = {name: value.item() for name, value in logged.items() if isinstance(value, Tensor)}
    return numbers | {"clip_fraction": np.mean(clip_fractions), "explained_variance": 1 - residual / variance}


def train_minibatch(
    agent: CleanRLAgent, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]
) -> dict[str, Tensor | float]:
    """Take one optimizer step; return tensors, and the fraction of clipped ratios as a number."""
    log_probs, entropies, values = agent.evaluate(batch["obs"], batch["actions"])
    log_ratio = log_probs - batch["log_probs"]
    ratio = log_ratio.exp()
    with torch.no_grad():
        old_approx_kl, approx_kl = (-log_ratio).mean(), ((ratio - 1) - log_ratio).mean()
        clip_fraction = ((ratio - 1.0).abs() > CLIP).float().mean().item()
    advantages = (batch["advantages"] - batch["advantages"].mean()) / (batch["advantages"].std() + 1e-8)
    policy_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
    value_loss = 0.5 * ((values - batch["returns"]) ** 2).mean()
    entropy = entropies.mean()
    optimizer.zero_grad()
    (policy_loss - ENT_COEF * entropy + VF_COEF * value_loss).backward()
    nn.utils.clip_grad_norm_(agent.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    losses = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    return {**losses, "old_approx_kl": old_approx_kl, "approx_kl": approx_kl, "clip_fraction": clip_fraction}
