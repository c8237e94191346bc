"""Losses of one minibatch with their gradients, as pure functions.

Owns the objective. It must not know about policies, optimizers or rollouts.

A loss ends at the numbers that a network puts out, and is differentiated by hand down to them: autograd's graph of so
many small operations would cost more than the operations.

The objective is decoupled (AReaL, arXiv:2505.24298): the ratio is taken against the proximal policy, the weights at the
start of the update, and the data's staleness enters as a detached weight `w = pi_proximal / pi_behavior`. For data of
the same version proximal is behavior and `w = 1`: plain PPO (Schulman et al., arXiv:1707.06347) exactly. Negative
advantages are bounded by the dual clip (Ye et al., arXiv:1912.09729, eq. 5). Invalid decisions are in no sum.

Shapes: B decisions of a minibatch, K denoising steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

MAX_LOG_WEIGHT = 5.0


class Loss(NamedTuple):
    """A loss, [], and its gradient with respect to what it is a function of."""

    value: Tensor
    gradient: Tensor


class PolicyStatistics(NamedTuple):
    """What is logged of a policy's step beside its loss, of each minibatch, [...]; detached."""

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


def objective_terms(batch: TensorDictBase, clip_coef: float, dual_clip: float | None) -> dict[str, Tensor]:
    """Return what the losses take of each decision and no step changes, of several minibatches at once.

    With `A < 0`, `max(min(u A, clip(u, 1 - c, 1 + c) A), d A)` is `clip(u, 1 - c, d) A`; else it is `min(u, 1 + c) A`.

    Args:
        batch: [..., B] `advantages`; `weights`, zero where masked; `valid`.
        clip_coef: Half-width c of the ratio's interval around 1.
        dual_clip: Bound d of the ratio for negative advantages; None for none.

    Returns:
        [..., B] `share` in a mean over the minibatch's valid decisions, zero if invalid; `cost`, what a ratio of 1 adds
        to the loss; `lowest_ratio` and `highest_ratio` that still change the objective.
    """
    valid, advantages = batch["valid"], batch["advantages"]
    share = valid.to(advantages.dtype) / valid.sum(-1, keepdim=True).clamp(min=1)
    is_negative, highest = advantages < 0, torch.inf if dual_clip is None else dual_clip
    return {
        "share": share,
        "cost": torch.where(valid, -share * batch["weights"] * advantages, 0.0),
        "lowest_ratio": torch.full_like(advantages, -torch.inf).masked_fill_(is_negative, 1 - clip_coef),
        "highest_ratio": torch.full_like(advantages, 1 + clip_coef).masked_fill_(is_negative, highest),
    }


def policy_loss(log_probs: Tensor, batch: TensorDictBase) -> Loss:
    """Return the decoupled, dual-clipped PPO loss of a minibatch.

    Its gradient is `u cost`, that of `u = exp(log pi - log pi_proximal)`, where u is within its limits, and else zero.

    Args:
        log_probs: [B] or [B, K], today's weights, detached.
        batch: [B] `objective_terms`, `valid`, and `proximal`, log-probs of the weights at the update's start.
    """
    low, high, cost = (_like(batch[name], log_probs) for name in ("lowest_ratio", "highest_ratio", "cost"))
    ratio = _log_ratio(log_probs, batch["proximal"], batch["valid"]).exp()
    bounded = ratio.clamp(low, high)
    costs = bounded * (cost if log_probs.dim() == 1 else cost / log_probs.shape[-1])
    return Loss(costs.sum(), torch.where(bounded == ratio, costs, 0.0))


def policy_statistics(log_probs: Tensor, batch: TensorDictBase, clip_coef: float) -> PolicyStatistics:
    """Return what is logged of `policy_loss`, of several minibatches at once.

    Args:
        log_probs: [..., B] or [..., B, K], detached.
        batch: [..., B] as for `policy_loss`, `advantages`, and `behavior`, log-probs of the weights that acted.
        clip_coef: See `objective_terms`.
    """
    valid, share = batch["valid"], batch["share"]
    behavior, proximal = (_log_ratio(log_probs, batch[name], valid) for name in ("behavior", "proximal"))
    ratio = proximal.exp()
    is_clipped = (ratio - 1).abs() > clip_coef
    is_floored = _like(batch["advantages"] < 0, ratio) & (ratio > _like(batch["highest_ratio"], ratio))
    rows = [kl_estimate(behavior), kl_estimate(proximal), is_clipped.to(ratio.dtype), is_floored.to(ratio.dtype)]
    per_decision = torch.stack(rows) if log_probs.dim() == valid.dim() else torch.stack(rows).mean(-1)
    return PolicyStatistics(*(per_decision * share).sum(-1))


def _log_ratio(log_probs: Tensor, reference: Tensor, valid: Tensor) -> Tensor:
    """Return log(pi / pi_reference), zero where invalid, lest an exponential that overflows there become NaN."""
    return torch.where(_like(valid, log_probs), log_probs - reference, 0.0)


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """Return the unbiased, positive estimate `r - 1 - log r` of KL(old, new); Schulman, "Approximating KL", 2020."""
    return torch.expm1(log_ratio) - log_ratio


def value_loss(values: Tensor, batch: TensorDictBase, clip_coef: float | None) -> Loss:
    """Return half the mean squared error of `values`, [B], over valid decisions.

    Args:
        values: [B], today's weights, detached.
        batch: [B] `returns`, `valid`, `share` of `objective_terms`, and `values` before the update.
        clip_coef: Take the worse of the error and of that after a change of at most this, whose gradient is zero where
            the change was more; None for the error alone.
    """
    error = torch.where(batch["valid"], values - batch["returns"], 0.0)
    squared, gradient = error * error, error * batch["share"]
    if clip_coef is not None:
        change = torch.where(batch["valid"], values - batch["values"], 0.0)
        limited = (error - change + change.clamp(-clip_coef, clip_coef)).square()
        is_moving = (change.abs() <= clip_coef) | (squared >= limited)
        squared, gradient = torch.maximum(squared, limited), torch.where(is_moving, gradient, 0.0)
    return Loss(0.5 * torch.dot(squared, batch["share"]), gradient)


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


def is_constant(x: Tensor, valid: Tensor) -> Tensor:
    """Tell, [], whether `x`, [B], differs over the valid decisions by no more than rounding, or none is valid."""
    spread = torch.where(valid, x, -torch.inf).amax() - torch.where(valid, x, torch.inf).amin()
    return spread <= 4 * torch.finfo(x.dtype).eps * torch.where(valid, x, 0.0).abs().amax()


def can_be_squared(x: Tensor) -> Tensor:
    """Tell of which numbers the squared differences still add up to a finite number over all of `x`."""
    limit = math.sqrt(torch.finfo(x.dtype).max / (4 * x.numel()))
    return x.abs() <= limit  # false for NaN, too


def explained_variance(values: Tensor, returns: Tensor, valid: Tensor) -> Tensor:
    """Return `1 - mean((returns - values)^2) / Var(returns)`, []; NaN where the returns are constant."""
    residual = masked_mean((returns - values).square(), valid)
    variance = masked_mean((returns - masked_mean(returns, valid)).square(), valid)
    return torch.where(is_constant(returns, valid), torch.nan, 1 - residual / variance)


def normalize(advantages: Tensor, valid: Tensor) -> Tensor:
    """Return advantages with mean 0 and standard deviation 1 over the valid decisions, [B]; zero elsewhere.

    Constant advantages, which prefer no action, become zero: the mean is rounded, and dividing that error by its own
    size would give numbers near 1.
    """
    mean = masked_mean(advantages, valid)
    std = masked_mean((advantages - mean).square(), valid).sqrt()
    normalized = (advantages - mean) / (std + 1e-8) * valid
    return torch.where(is_constant(advantages, valid), 0.0, normalized)
