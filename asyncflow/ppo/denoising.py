"""Clip and weight of every denoising step, as in DPPO (arXiv:2409.00588, section 4.2 and appendix).

Early steps, which work on noise, may change less than late ones, which decide on the action; and an early step's
advantage is discounted by the steps that follow it, as if denoising were time.

Shapes: B decisions, J denoising steps, the noisiest first.
"""

from __future__ import annotations

import math

import torch
from tensordict import TensorDictBase
from torch import Tensor

from asyncflow.config.sections import AlgorithmConfig
from asyncflow.errors import ConfigError


def step_clips(config: AlgorithmConfig, num_steps: int) -> Tensor:
    """Return the clip of every step, [J]: `base + (clip - base) (e^(rate t) - 1) / (e^rate - 1)`, t from 0 to 1.

    All are `clip_coef` without `clip_coef_base`, and a single step has it.
    """
    last, rate = config.clip_coef, config.clip_coef_rate
    base = last if config.clip_coef_base is None or num_steps == 1 else config.clip_coef_base
    t = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    return (base + (last - base) * torch.expm1(rate * t) / math.expm1(rate)).float()


def step_discounts(config: AlgorithmConfig, num_steps: int) -> Tensor:
    """Return the factor of the advantage at every step, [J]: `denoising_discount ** (steps that follow)`."""
    following = torch.arange(num_steps - 1, -1, -1, dtype=torch.float64)
    return (config.denoising_discount**following).float()


def treat_steps_differently(batch: TensorDictBase, config: AlgorithmConfig, num_steps: int) -> None:
    """Give a batch [B] the clip of every log-prob, `clip_coef`, and discount its `advantages`, each like `log_probs`.

    Raises:
        ConfigError: A log-prob is not that of a single step.
    """
    device = batch["advantages"].device
    clips, discounts = (table(config, num_steps).to(device) for table in (step_clips, step_discounts))
    if "denoise_inds" in batch.keys():  # noqa: SIM118  a TensorDict iterates rows
        steps = batch["denoise_inds"]
        batch["clip_coef"], batch["advantages"] = clips[steps], batch["advantages"] * discounts[steps]
    elif batch["log_probs"].dim() == 2:
        batch["clip_coef"] = clips.expand(len(batch), -1)
        batch["advantages"] = batch["advantages"].unsqueeze(-1) * discounts
    else:
        raise ConfigError(
            "clip_coef_base and denoising_discount need the log-prob of every denoising step: policy.log_prob = "
            "per_step or single_step"
        )
