"""The numbers that an update reports, computed once for all its minibatches, outside the loop that trains.

In every minibatch these numbers would cost as much as the losses themselves.

Shapes: M minibatches of B decisions, K denoising steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from asyncflow.ppo.losses import explained_variance, kl_estimate, masked_mean, policy_statistics

COLUMNS = (
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
OF_THE_BATCH = (
    "behavior_kl",
    "is_weight_mean",
    "is_weight_max",
    "is_weight_clipped_fraction",
    "explained_variance",
    "nonfinite_decisions",
)
LOGGED = ("valid", "is_lost", "advantages", "proximal", "behavior", "clip_coef")  # what is read of a minibatch


class Step(NamedTuple):
    """Statistics of one minibatch, on the device and without gradient.

    Attributes:
        terms: The surrogate, the value loss, the entropy, and the auxiliary losses, without their weights.
        norms: Gradient norms of actor and critic, [2].
        log_probs: [B] or [B, K].
        is_usable: Whether a step was taken, [].
        is_finite: Whether loss and gradients were finite, [].
    """

    terms: Tensor
    norms: Tensor
    log_probs: Tensor
    is_usable: Tensor
    is_finite: Tensor


def tabulate(
    steps: Sequence[Step], minibatches: TensorDict, clip_coef: float | Tensor, dual_clip: float | None
) -> Tensor:
    """Return a row of numbers for each minibatch, [M, columns]; NaN if its step was skipped.

    The columns are `COLUMNS`, then the auxiliary losses; the last one tells whether the step was skipped for a number
    that was not finite.

    Args:
        steps: Of each minibatch.
        minibatches: [M, B] `LOGGED`.
        clip_coef: See `surrogate_loss`.
        dual_clip: Likewise.
    """
    done = Step(*(torch.stack(column) for column in zip(*steps, strict=True)))
    logged = policy_statistics(done.log_probs, minibatches, clip_coef, dual_clip)
    (policy_loss, value_loss, entropy, *auxiliary) = done.terms.unbind(1)
    columns = [policy_loss, value_loss, entropy, *logged, *done.norms.unbind(1), *auxiliary]
    table = torch.where(done.is_usable, torch.stack(columns).float(), torch.nan)
    is_skipped = ~done.is_finite | (minibatches["is_lost"].any(-1) & ~minibatches["valid"].any(-1))
    return torch.cat([table, is_skipped.float().unsqueeze(0)]).T


def summarise(table: Tensor, batch: TensorDict, auxiliary: Sequence[str]) -> dict[str, float]:
    """Return the `train/` metrics of an update.

    Args:
        table: What `tabulate` returned for all its minibatches.
        batch: [T*N] what was trained on.
        auxiliary: Names of the auxiliary losses.
    """
    valid = batch["valid"]
    behavior_kl = masked_mean(kl_estimate(batch["proximal"] - batch["behavior"]), valid)
    extra = torch.stack(
        [
            behavior_kl,
            masked_mean(batch["weights"], valid),
            (batch["weights"] * valid).max(),
            masked_mean(batch["is_weight_clipped"].float(), valid),
            explained_variance(batch["values"], batch["returns"], valid),
            batch["is_lost"].sum().float(),
        ]
    )
    means, num_skipped = table[:, :-1].nanmean(0), table[:, -1:].sum(0)  # over the minibatches that were trained
    numbers = torch.cat([means, num_skipped, extra]).tolist()  # sync: the update's only fetch
    names = [*COLUMNS, *(f"{name}_loss" for name in auxiliary), "nonfinite_skipped", *OF_THE_BATCH]
    return {f"train/{name}": number for name, number in zip(names, numbers, strict=True)}
