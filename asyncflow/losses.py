"""Losses of one minibatch, as pure functions.

Owns the objective. It must not know about policies, optimizers or rollouts.

The objective is decoupled (AReaL, arXiv:2505.24298): the ratio is taken against the proximal policy, the weights at the
start of the update, and the data's staleness enters as a detached weight `w = pi_proximal / pi_behavior`. For data of
the same version proximal is behavior and `w = 1`: plain PPO (Schulman et al., arXiv:1707.06347) exactly. Negative
advantages are bounded by the dual clip (Ye et al., arXiv:1912.09729, eq. 5). Invalid decisions are in no sum.

Shapes: B decisions of a minibatch, K denoising steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from torch import Tensor

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
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


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
    # Masked before the exponential: where it overflows, a gradient of zero would become NaN.
    log_ratio = torch.where(_like(valid, log_probs), log_probs - batch["proximal"], 0.0)
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
