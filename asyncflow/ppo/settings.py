"""The settings of PPO as keyword arguments, for those who use it without a configuration.

Their names, defaults and limits are the fields of `AlgorithmConfig`; a test holds both equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from pydantic import ValidationError

from asyncflow.config.sections import AlgorithmConfig, Schedule, explain, nearest
from asyncflow.errors import ConfigError


class PPOSettings(TypedDict, total=False):
    """Fields of `AlgorithmConfig` that `PPO(policy, name=value)` takes; `advantage` and `auxiliary` are arguments."""

    gamma: float
    success_value: Literal["zero", "continue"]
    gae_lambda: float
    n_step: int
    reward_scaling: bool
    normalize_advantages: bool
    advantage_scope: Literal["all", "task"]
    update_epochs: int
    num_minibatches: int
    learning_rate: float
    critic_learning_rate: float
    lr_schedule: Schedule
    lr_warmup_updates: int
    critic_warmup_updates: int
    clip_coef: float
    clip_coef_base: float | None
    clip_coef_rate: float
    denoising_discount: float
    dual_clip: float | None
    clip_value_loss: bool
    vf_coef: float
    ent_coef: float
    max_grad_norm: float
    target_kl: float | None
    decoupled: bool
    behavior_weight: Literal["truncate", "mask"]
    behavior_weight_max: float
    ema_decay: float | None
    max_nonfinite_steps: int


def apply_settings(config: AlgorithmConfig | None, settings: Mapping[str, Any]) -> AlgorithmConfig:
    """Return a configuration of PPO with some settings changed; None stands for the defaults.

    Raises:
        ConfigError: A name is unknown or a value not allowed; one line.
    """
    names = list(AlgorithmConfig.model_fields)
    for name in settings:
        if name not in names:
            near = nearest(name, names)
            raise ConfigError(f"unknown setting {name}" + (f"; did you mean {near}?" if near else ""))
    given = {} if config is None else config.model_dump(exclude_unset=True)
    try:
        return AlgorithmConfig.model_validate({**given, **settings})
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
