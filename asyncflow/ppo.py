"""PPO on one rollout: pure losses, and the update that applies them.

Owns the objective and the optimizer. It must not know which thread collected the rollout, nor which policy it trains.

The objective is decoupled (AReaL, arXiv:2505.24298): the ratio is taken against the proximal policy, the weights at the
start of the update, and the data's staleness enters as a detached weight `w = pi_proximal / pi_behavior`. For data of
the same version proximal is behavior and `w = 1`: plain PPO (Schulman et al., arXiv:1707.06347) exactly. Negative
advantages are bounded by the dual clip (Ye et al., arXiv:1912.09729, eq. 5).

Shapes: T decisions, N environments, B decisions of a minibatch, K denoising steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from asyncflow.buffer import Rollout
from asyncflow.config import AlgorithmConfig
from asyncflow.gae import Transitions, compute_gae, compute_n_step
from asyncflow.policies.base import Policy
from asyncflow.seeding import permutation

MAX_LOG_WEIGHT = 5.0


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped objective and what to log of it; scalars on the device."""

    loss: Tensor
    approx_kl: Tensor
    prox_kl: Tensor
    clip_fraction: Tensor
    dual_clip_fraction: Tensor


def masked_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Return the mean of `x`, [B] or [B, K], over valid decisions; zero if there are none."""
    mask = _like(valid, x).expand_as(x)
    return (x * mask).sum() / mask.sum().clamp(min=1)


def _like(per_decision: Tensor, x: Tensor) -> Tensor:
    return per_decision.unsqueeze(-1) if x.dim() > per_decision.dim() else per_decision


def policy_loss(log_probs: Tensor, batch: TensorDictBase, clip_coef: float, dual_clip: float | None) -> PolicyLoss:
    """Return the decoupled, dual-clipped PPO loss.

    Args:
        log_probs: [B] or [B, K], today's weights, with gradient.
        batch: [B] `proximal` (weights at the update's start) and `behavior` (weights that acted) in the shape of
            `log_probs`; `advantages`; `weights`, zero where masked; `valid`, which the denominator counts.
        clip_coef: Half-width of the ratio's interval around 1.
        dual_clip: Bound of the ratio for negative advantages; None for none.
    """
    valid = batch["valid"]
    advantages, weights = _like(batch["advantages"], log_probs), _like(batch["weights"], log_probs)
    log_ratio = log_probs - batch["proximal"]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    floor = torch.full_like(objective, -torch.inf) if dual_clip is None else dual_clip * advantages
    is_floored = (advantages < 0) & (objective < floor)
    loss = -masked_mean(weights * torch.where(is_floored, floor, objective), valid)
    with torch.no_grad():
        return PolicyLoss(
            loss=loss,
            approx_kl=masked_mean(kl_estimate(log_probs - batch["behavior"]), valid),
            prox_kl=masked_mean(kl_estimate(log_ratio), valid),
            clip_fraction=masked_mean(((ratio - 1).abs() > clip_coef).float(), valid),
            dual_clip_fraction=masked_mean(is_floored.float(), valid),
        )


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """Return the unbiased, positive estimate `r - 1 - log r` of KL(old, new); Schulman, "Approximating KL", 2020."""
    return torch.expm1(log_ratio) - log_ratio


def value_loss(values: Tensor, batch: TensorDictBase, clip_coef: float | None) -> Tensor:
    """Return half the mean squared error of `values`, [B], over valid decisions.

    Args:
        values: [B], today's weights, with gradient.
        batch: [B] `returns`, `valid`, and `values` before the update.
        clip_coef: Take the worse of the error and of that after a change of at most this; None for the error alone.
    """
    error = (values - batch["returns"]).square()
    if clip_coef is not None:
        clipped = batch["values"] + (values - batch["values"]).clamp(-clip_coef, clip_coef)
        error = torch.maximum(error, (clipped - batch["returns"]).square())
    return 0.5 * masked_mean(error, batch["valid"])


def behavior_weights(log_weight: Tensor, kind: str, limit: float) -> tuple[Tensor, Tensor]:
    """Return (weights, whether the limit was exceeded), both [B], from log(pi_proximal / pi_behavior), [B].

    `truncate` caps a weight at `limit`; `mask` sets it to zero.
    """
    raw = log_weight.clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT).exp()
    is_over = raw > limit
    capped = raw.clamp(max=limit) if kind == "truncate" else torch.where(is_over, torch.zeros_like(raw), raw)
    return capped, is_over


def sum_steps(log_probs: Tensor) -> Tensor:
    """Return log-probs of whole decisions, [B], from [B] or [B, K]."""
    return log_probs.flatten(1).sum(-1) if log_probs.dim() > 1 else log_probs


def normalize(advantages: Tensor, valid: Tensor) -> Tensor:
    """Return advantages with mean 0 and standard deviation 1 over the valid decisions, [B]; zero elsewhere."""
    mean = masked_mean(advantages, valid)
    std = masked_mean((advantages - mean).square(), valid).sqrt()
    return (advantages - mean) / (std + 1e-8) * valid


class PPO:
    """Trains one policy on one rollout after another. Used by the main thread only."""

    def __init__(self, policy: Policy, config: AlgorithmConfig, seed: int, total_updates: int | None = None) -> None:
        """Create the optimizer: Adam, with a step size each for actor and critic."""
        self.policy = policy
        self.config = config
        self._seed, self._total_updates = seed, total_updates
        self._actor = [p for p in policy.actor_parameters() if p.requires_grad]
        self._critic = [p for p in policy.critic_parameters() if p.requires_grad]
        groups = [
            {"params": self._actor, "lr": config.learning_rate},
            {"params": self._critic, "lr": config.critic_learning_rate},
        ]
        self.optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)

    def update(self, rollout: Rollout, version: int, on_minibatch: Callable[[], None]) -> dict[str, float]:
        """Train on a rollout and return the `train/` metrics.

        Args:
            rollout: What to train on; only read.
            version: Updates that the policy has seen.
            on_minibatch: Called before every minibatch; may raise to abandon the update.
        """
        self._set_learning_rates(version)
        batch = self._prepare(rollout, version)
        is_warmup = version < self.config.critic_warmup_updates
        rows: list[Tensor] = []
        for epoch in range(self.config.update_epochs):
            order = permutation(self._seed, version, epoch, len(batch)).to(batch.device)
            epoch_rows = []
            for indices in order.chunk(self.config.num_minibatches):
                on_minibatch()
                epoch_rows.append(self._step(batch[indices], is_warmup))
            rows += epoch_rows
            if self._is_kl_exceeded(epoch_rows):
                break
        return self._summarise(rows, batch, epoch + 1)

    def _is_kl_exceeded(self, rows: list[Tensor]) -> bool:
        if self.config.target_kl is None:
            return False
        kl = torch.stack(rows)[:, _METRICS.index("prox_kl")].mean()
        return bool(kl > self.config.target_kl)  # sync: once per epoch, only with target_kl

    def _set_learning_rates(self, version: int) -> None:
        config, fraction = self.config, 1.0
        if config.lr_schedule == "linear" and self._total_updates:
            fraction = 1 - version / self._total_updates
        for group, rate in zip(
            self.optimizer.param_groups, (config.learning_rate, config.critic_learning_rate), strict=True
        ):
            group["lr"] = rate * fraction

    def _prepare(self, rollout: Rollout, version: int) -> TensorDict:
        """Return the flat batch [T*N] with proximal log-probs, behavior weights, advantages and returns."""
        batch: TensorDict = rollout.data.clone()
        piece = batch.numel() // self.config.num_minibatches
        with torch.no_grad():
            self._add_advantages(batch, rollout, piece)
            batch["obs"] = rollout.obs[:-1].clone()
            batch = batch.flatten(0, 1)
            self._add_proximal(batch, rollout.policy_version != version, piece)
            if self.config.normalize_advantages:
                batch["advantages"] = normalize(batch["advantages"], batch["valid"])
        return batch

    def _add_advantages(self, batch: TensorDict, rollout: Rollout, piece: int) -> None:
        """Add `values`, `advantages` and `returns`, [T, N], from today's value function."""
        values = self._values(rollout.obs, piece)
        batch["values"] = values[:-1]
        finals = self._values(rollout.final_obs, piece).gather(0, batch["final_index"])
        next_values = torch.where(batch["truncated"], finals, values[1:])
        boundary = batch["terminated"] | batch["truncated"]
        boundary[:-1] |= ~batch["valid"][1:]
        transitions = Transitions(
            batch["rewards"], batch["values"], next_values, batch["discounts"], batch["terminated"], boundary
        )
        config = self.config
        if config.advantage == "n_step":
            advantages, returns = compute_n_step(transitions, config.n_step)
        else:
            gae_lambda = 1.0 if config.advantage == "monte_carlo" else config.gae_lambda
            advantages, returns = compute_gae(transitions, gae_lambda)
        batch["advantages"], batch["returns"] = advantages, returns

    def _values(self, obs: TensorDictBase, piece: int) -> Tensor:
        """Return V of observations [R, N], computed `piece` at a time, [R, N]."""
        pieces = obs.clone().flatten(0, 1).split(piece)
        return torch.cat([self.policy.get_value(p) for p in pieces]).view(obs.batch_size)

    def _add_proximal(self, batch: TensorDict, is_stale: bool, piece: int) -> None:
        """Add `proximal` log-probs and the `weights` that correct for staleness.

        Data of the version that is being trained keeps its stored log-probs, so that it is plain PPO exactly.
        """
        batch["behavior"] = batch["log_probs"]
        batch["proximal"] = batch["log_probs"]
        batch["weights"] = torch.ones_like(batch["advantages"])
        batch["is_weight_clipped"] = torch.zeros_like(batch["valid"])
        if not (is_stale and self.config.decoupled):
            return
        pieces = [self.policy.default_forward(p)["log_probs"] for p in batch.split(piece)]
        batch["proximal"] = torch.cat(pieces)
        log_weight = sum_steps(batch["proximal"] - batch["behavior"]) * self.policy.log_prob_terms
        batch["weights"], batch["is_weight_clipped"] = behavior_weights(
            log_weight, self.config.behavior_weight, self.config.behavior_weight_max
        )

    def _step(self, batch: TensorDict, is_warmup: bool) -> Tensor:
        """Take one optimizer step and return its metrics in the order of `_METRICS`, on the device."""
        config = self.config
        if config.emulated_latency_s:
            time.sleep(config.emulated_latency_s)
        out = self.policy.default_forward(batch)
        actor = policy_loss(out["log_probs"], batch, config.clip_coef, config.dual_clip)
        critic = value_loss(out["values"], batch, config.clip_coef if config.clip_value_loss else None)
        entropy = masked_mean(out["entropy"], batch["valid"])
        loss = config.vf_coef * critic
        if not is_warmup:
            loss = loss + actor.loss - config.ent_coef * entropy
        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self._actor, config.max_grad_norm)
        critic_grad_norm = torch.nn.utils.clip_grad_norm_(self._critic, config.max_grad_norm)
        self.optimizer.step()
        row = [
            actor.loss,
            critic,
            entropy,
            actor.approx_kl,
            actor.prox_kl,
            actor.clip_fraction,
            actor.dual_clip_fraction,
            grad_norm,
            critic_grad_norm,
        ]
        return torch.stack([x.detach().float().to(loss.device) for x in row])  # an absent gradient's norm is on the CPU

    def _summarise(self, rows: list[Tensor], batch: TensorDict, num_epochs: int) -> dict[str, float]:
        valid = batch["valid"]
        behavior_kl = masked_mean(kl_estimate(batch["proximal"] - batch["behavior"]), valid)
        residual = masked_mean((batch["returns"] - batch["values"]).square(), valid)
        mean_return = masked_mean(batch["returns"], valid)
        variance = masked_mean((batch["returns"] - mean_return).square(), valid)
        extra = torch.stack(
            [
                behavior_kl,
                masked_mean(batch["weights"], valid),
                (batch["weights"] * valid).max(),
                masked_mean(batch["is_weight_clipped"].float(), valid),
                1 - residual / variance.clamp(min=1e-12),
            ]
        )
        numbers = torch.cat([torch.stack(rows).mean(0), extra]).tolist()  # sync: the update's only fetch
        names = (*_METRICS, "behavior_kl", "is_weight_mean", "is_weight_max", "is_weight_clipped_fraction")
        metrics = dict(zip((*names, "explained_variance"), numbers, strict=True))
        return {f"train/{name}": number for name, number in (metrics | {"num_epochs": num_epochs}).items()}


_METRICS = (
    "policy_loss",
    "value_loss",
    "entropy",
    "approx_kl",
    "prox_kl",
    "clip_fraction",
    "dual_clip_fraction",
    "grad_norm",
    "critic_grad_norm",
)
