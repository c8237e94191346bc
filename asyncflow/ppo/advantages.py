"""Advantage estimators: asyncflow's own by name, and those of other packages.

An estimator is any function or object that takes a rollout's `Transitions` and returns advantages and returns. The
configuration chooses one by name (`algorithm.advantage`); `PPO(policy, advantage=...)` takes one as it is.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from asyncflow.config.contracts import broken, name_of
from asyncflow.config.plugins import ADVANTAGES, build_plugin, refuse_taken_name
from asyncflow.config.sections import ADVANTAGE_NAMES, AlgorithmConfig
from asyncflow.ppo.gae import Transitions, compute_gae, compute_n_step


@runtime_checkable
class AdvantageEstimator(Protocol):
    """Computes how much better every decision of a rollout turned out than its value."""

    def __call__(self, transitions: Transitions) -> tuple[Tensor, Tensor]:
        """Return advantages and returns, both [T, N], in units of discounted reward.

        PPO normalises the advantages (`algorithm.normalize_advantages`) and trains the critic towards the returns.
        Called once an update, without gradient. It must not read the device back, and it must keep no state: a
        resumed run would begin with another. Decisions that are invalid have zeros, and end an episode.
        """


def make_estimator(config: AlgorithmConfig) -> AdvantageEstimator:
    """Return the estimator that `algorithm.advantage` names.

    An entry point of the group `asyncflow.advantages` is called with the `AlgorithmConfig` and returns an estimator.

    Raises:
        ConfigError: It cannot be imported, or a package registered one of asyncflow's own names.
        ContractError: What a package registered cannot be called so, or returns no estimator.
    """
    if config.advantage not in ADVANTAGE_NAMES:
        arguments = (config.model_copy(deep=True),)
        return build_plugin(ADVANTAGES, config.advantage, arguments, AdvantageEstimator)  # type: ignore[type-abstract]
    refuse_taken_name(ADVANTAGES, config.advantage, "algorithm.advantage")
    if config.advantage == "n_step":
        return partial(compute_n_step, n_step=config.n_step)
    return partial(compute_gae, gae_lambda=1.0 if config.advantage == "monte_carlo" else config.gae_lambda)


def check_estimate(estimator: AdvantageEstimator, estimate: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return what an estimator returned, if it is two tensors like `like`, [T, N].

    Raises:
        ContractError: It is something else.
    """
    is_pair = isinstance(estimate, tuple | list) and len(estimate) == 2
    if not is_pair or not all(isinstance(x, Tensor) and x.shape == like.shape for x in estimate):
        expected = f"advantages and returns, two tensors of shape {tuple(like.shape)}"
        raise broken(f"advantage estimator {name_of(estimator)}", "returned", estimate, expected)
    advantages, returns = (x.to(like) for x in estimate)
    return advantages, returns
