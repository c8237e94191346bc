"""The configuration's part about PPO: objective, advantages, step sizes.

`config.sections` puts it into the whole, which is where the rest of the package takes it from.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from asyncflow.config.plugins import ADVANTAGES, plugin_names
from asyncflow.config.policy import PathText, Section

ADVANTAGE_NAMES = ("gae", "monte_carlo", "n_step")


Schedule = Literal["constant", "linear", "cosine"]


class AuxiliaryConfig(Section):
    """One more term of the loss, `algorithm.auxiliary[i]`."""

    kind: Literal["bc", "reference_kl"] = Field(
        description="bc: imitate demonstrations or the run's own successes; reference_kl: stay near the first policy."
    )
    weight: float = Field(ge=0, description="Factor of the term.")
    weight_final: float = Field(0.0, ge=0, description="Factor at the schedule's end.")
    schedule: Schedule = Field("constant", description="How the factor goes from weight to weight_final.")
    schedule_updates: int | None = Field(
        None, ge=1, description="Updates that the schedule takes; null: those of the whole run."
    )
    dataset: PathText | None = Field(
        None, description="bc: robomimic dataset to imitate; null: the run's own successful episodes."
    )
    batch_size: int = Field(256, ge=1, description="bc: decisions that each minibatch imitates.")
    capacity: int = Field(10_000, ge=1, description="bc: decisions of successful episodes that are kept, the newest.")

    @model_validator(mode="after")
    def _check_dataset(self) -> AuxiliaryConfig:
        if self.kind != "bc" and self.dataset is not None:
            raise ValueError(f"algorithm.auxiliary: kind = {self.kind} takes no dataset ({self.dataset}); bc does")
        return self


class AlgorithmConfig(Section):
    """PPO."""

    gamma: float = Field(0.995, gt=0, le=1, description="Discount per env step.")
    success_value: Literal["zero", "continue"] = Field(
        "zero", description="What follows a success: zero: nothing; continue: its last reward for ever, discounted."
    )
    gae_lambda: float = Field(0.95, ge=0, le=1, description="GAE's lambda, per decision.")
    advantage: str = Field(
        "gae", description="Advantage estimator: gae, monte_carlo, n_step, or one that an installed package registered."
    )
    n_step: int = Field(8, ge=1, description="n_step: decisions before the bootstrap.")
    reward_scaling: bool = Field(
        False, description="Divide rewards by the running standard deviation of their discounted sum."
    )
    normalize_advantages: bool = Field(True, description="Normalise advantages over the valid decisions of a rollout.")
    advantage_scope: Literal["all", "task"] = Field(
        "all",
        description="Over what they are normalised: all decisions, or those of each task (env.tasks) by themselves.",
    )
    update_epochs: int = Field(8, ge=1, le=1000, description="Passes over a rollout per update.")
    num_minibatches: int = Field(4, ge=1, description="Minibatches per pass.")
    learning_rate: float = Field(1e-4, gt=0, description="Adam step size of the actor.")
    critic_learning_rate: float = Field(1e-3, gt=0, description="Adam step size of the critic.")
    lr_schedule: Schedule = Field(
        "constant",
        description="linear, cosine: to zero over total_updates; a larger limit on resuming raises it again.",
    )
    lr_warmup_updates: int = Field(0, ge=0, description="First updates, in which the step sizes rise linearly.")
    critic_warmup_updates: int = Field(1, ge=0, description="First updates, in which only the critic is trained.")
    clip_coef: float = Field(0.01, gt=0, description="PPO's clip of the ratio.")
    clip_coef_base: float | None = Field(
        None,
        gt=0,
        description="Clip of the first denoising step, from which it grows to clip_coef at the last; null: all alike.",
    )
    clip_coef_rate: float = Field(3.0, gt=0, description="How late that clip grows: exponent of its growth.")
    denoising_discount: float = Field(
        1.0, gt=0, le=1, description="Factor of the advantage for every denoising step that still follows."
    )
    dual_clip: float | None = Field(3.0, gt=1, description="Bound of the ratio for negative advantages; null: none.")
    clip_value_loss: bool = Field(
        False,
        description="Take the worse of the value's error and that after a change clipped by clip_coef "
        "(stable-baselines3 takes the latter alone).",
    )
    vf_coef: float = Field(0.5, ge=0, description="Weight of the value loss.")
    ent_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norm limit, of actor and critic separately.")
    target_kl: float | None = Field(None, gt=0, description="End an update after the epoch whose KL exceeds this.")
    decoupled: bool = Field(True, description="Correct stale data by the decoupled objective; false: plain PPO.")
    behavior_weight: Literal["truncate", "mask"] = Field(
        "truncate", description="What happens to behavior weights above behavior_weight_max."
    )
    behavior_weight_max: float = Field(2.0, gt=0, description="Limit of exp(proximal - behavior).")
    auxiliary: list[AuxiliaryConfig] = Field(
        [], description="More terms of the loss, each a mapping: kind (bc, reference_kl), weight, schedule, ..."
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay per update of averaged weights, with which evaluations act and checkpoints decide; null: no "
        "average.",
    )
    max_nonfinite_steps: int = Field(
        20, ge=0, description="Minibatches skipped in a run because a number was not finite; one more ends it."
    )

    @field_validator("advantage")
    @classmethod
    def _check_advantage(cls, name: str) -> str:
        known = [*ADVANTAGE_NAMES, *plugin_names(ADVANTAGES)] if name not in ADVANTAGE_NAMES else [name]
        if name not in known:
            raise ValueError(
                f"algorithm.advantage = {name!a}: expected {', '.join(known)}; an installed package adds names as "
                f"entry points of the group {ADVANTAGES}"
            )
        return name

    @property
    def has_denoising_schedule(self) -> bool:
        """Whether denoising steps are clipped or weighted differently, which needs a log-prob of each."""
        return self.clip_coef_base is not None or self.denoising_discount < 1

    @model_validator(mode="after")
    def _check_clip(self) -> AlgorithmConfig:
        if self.clip_coef_base is not None and self.clip_coef_base > self.clip_coef:
            raise ValueError(
                f"algorithm.clip_coef_base = {self.clip_coef_base} must be at most algorithm.clip_coef = "
                f"{self.clip_coef}"
            )
        return self
