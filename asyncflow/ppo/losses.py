"""The terms of PPO's loss, as pure functions of one minibatch, and the numbers that are logged of them.

    loss = surrogate_loss + vf_coef * value_loss - ent_coef * entropy

The surrogate is decoupled (AReaL, arXiv:2505.24298): the ratio is taken against the proximal policy, the weights at the
start of the update, and the data's staleness enters as a detached weight `w = pi_proximal / pi_behavior`. For data of
the same version proximal is behavior and `w = 1`: plain PPO (Schulman et al., arXiv:1707.06347) exactly. Negative
advantages are bounded by the dual clip (Ye et al., arXiv:1912.09729, eq. 5). Invalid decisions are in no mean.

Shapes: B decisions of a minibatch, K denoising steps.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

MAX_LOG_WEIGHT = 5.0


class PolicyStatistics(NamedTuple):
    """Numbers that are logged of a policy's step beside its loss, one of each minibatch, [...]; detached."""

    approx_kl: Tensor
    prox_kl: Tensor
    clip_fraction: Tensor
    dual_clip_fraction: Tensor


def masked_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Return the mean of `x`, [B] or [B, K], over valid decisions; zero if there are none."""
    per_decision = x if x.dim() == valid.dim() else x.mean(-1)
    return torch.where(valid, per_decision, 0.0).sum() / valid.sum().clamp(min=1)


def _like(per_decision: Tensor, x: Tensor) -> Tensor:
    return per_decision.unsqueeze(-1) if x.dim() > per_decision.dim() else per_decision


def add_gains(batch: TensorDictBase, dual_clip: float | None) -> None:
    """Add what the ratios are multiplied by. No weight of the policy enters it: once for all minibatches of an epoch.

    Args:
        batch: [..., B] `advantages`, which may also be [..., B, K]; `weights`, which correct for staleness; `valid`;
            and `proximal`, log-probs of the weights at the update's start, [..., B] or [..., B, K]. It gets `gain`,
            like `proximal`: the weighted advantage over the number of valid log-probs, so that a mean is a sum. With a
            dual clip it gets `floor` as well, the least objective.
        dual_clip: Bound of the ratio for negative advantages; None for none.
    """
    valid, proximal = batch["valid"], batch["proximal"]
    advantages = _like(batch["advantages"], proximal)
    shares = valid.to(advantages.dtype) / valid.sum(-1, keepdim=True).clamp(min=1)
    gain = torch.where(_like(valid, proximal), _like(shares * batch["weights"], proximal) * advantages, 0.0)
    if proximal.dim() > valid.dim():
        gain = gain / proximal.shape[-1]
    batch["gain"] = gain
    if dual_clip is not None:
        batch["floor"] = torch.where(advantages < 0, dual_clip * gain, -torch.inf)


def surrogate_loss(log_probs: Tensor, batch: TensorDictBase, clip_coef: float | Tensor) -> Tensor:
    """Return the decoupled, dual-clipped surrogate of PPO, negated, [].

    Args:
        log_probs: [B] or [B, K], today's weights.
        batch: [B] `proximal`, `valid`, and what `add_gains` added.
        clip_coef: Half-width of the ratio's interval around 1; a tensor like `log_probs` gives each its own.
    """
    clip: Any = clip_coef  # of which clamp takes both kinds, but not a union of them
    ratio, gain = log_ratio(log_probs, batch["proximal"], batch["valid"]).exp(), batch["gain"]
    objective = torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)
    floor = batch.get("floor", None)
    if floor is not None:
        objective = torch.maximum(objective, floor)
    return -objective.sum()


def log_ratio(log_probs: Tensor, reference: Tensor, valid: Tensor) -> Tensor:
    """Return log(pi / pi_reference), zero where invalid, lest an exponential that overflows there become NaN."""
    return torch.where(_like(valid, log_probs), log_probs - reference, 0.0)


def value_loss(values: Tensor, batch: TensorDictBase, clip_coef: float | None) -> Tensor:
    """Return half the mean squared error of `values`, [B], over valid decisions, [].

    Args:
        values: [B], today's weights.
        batch: [B] `returns`, `valid`, and `values` before the update.
        clip_coef: Take the worse of the error and of that after a change of at most this; None for the error alone.
    """
    valid, returns = batch["valid"], batch["returns"]
    error = torch.where(valid, values - returns, 0.0)
    if clip_coef is None:
        loss: Tensor = 0.5 * torch.dot(error, error) / valid.sum().clamp(min=1)
        return loss
    clipped = batch["values"] + (values - batch["values"]).clamp(-clip_coef, clip_coef)
    limited = torch.where(valid, clipped - returns, 0.0)
    return 0.5 * masked_mean(torch.maximum(error.square(), limited.square()), valid)


def policy_statistics(
    log_probs: Tensor, batch: TensorDictBase, clip_coef: float | Tensor, dual_clip: float | None
) -> PolicyStatistics:
    """Return what is logged of `surrogate_loss`, of several minibatches at once.

    Args:
        log_probs: [..., B] or [..., B, K], detached.
        batch: [..., B] as for `surrogate_loss`, and `behavior`, log-probs of the weights that acted.
        clip_coef: See `surrogate_loss`.
        dual_clip: Likewise.
    """
    valid = batch["valid"]
    behavior, proximal = (log_ratio(log_probs, batch[name], valid) for name in ("behavior", "proximal"))
    ratio = proximal.exp()
    is_clipped = (ratio - 1).abs() > clip_coef
    is_floored = _like(batch["advantages"] < 0, ratio) & (ratio > (torch.inf if dual_clip is None else dual_clip))
    rows = [kl_estimate(behavior), kl_estimate(proximal), is_clipped.to(ratio.dtype), is_floored.to(ratio.dtype)]
    per_decision = torch.stack(rows) if log_probs.dim() == valid.dim() else torch.stack(rows).mean(-1)
    return PolicyStatistics(*(torch.where(valid, per_decision, 0.0).sum(-1) / valid.sum(-1).clamp(min=1)))


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """Return the unbiased, positive estimate `r - 1 - log r` of KL(old, new); Schulman, "Approximating KL", 2020."""
    return torch.expm1(log_ratio) - log_ratio


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


def normalize_by_task(advantages: Tensor, valid: Tensor, num_tasks: int, num_envs: int) -> Tensor:
    """Return what `normalize` makes of the decisions of each task by themselves, [B].

    Args:
        advantages: [B = T * N], those of all environments at one time after those at another.
        valid: [B] bool.
        num_tasks: Tasks, which environments have in turn.
        num_envs: N.
    """
    if num_tasks == 1:
        return normalize(advantages, valid)
    task = torch.arange(len(advantages), device=advantages.device) % num_envs % num_tasks
    each = [normalize(advantages, valid & (task == place)) for place in range(num_tasks)]
    return torch.stack(each).sum(0)  # each is zero outside its task


def normalize(advantages: Tensor, valid: Tensor) -> Tensor:
    """Return advantages with mean 0 and standard deviation 1 over the valid decisions, [B]; zero elsewhere.

    Constant advantages, which prefer no action, become zero: the mean is rounded, and dividing that error by its own
    size would give numbers near 1.
    """
    mean = masked_mean(advantages, valid)
    std = masked_mean((advantages - mean).square(), valid).sqrt()
    normalized = (advantages - mean) / (std + 1e-8) * valid
    return torch.where(is_constant(advantages, valid), 0.0, normalized)
