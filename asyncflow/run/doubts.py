"""Doubts: what a trainer tells once, because a run may go on with it and yet not be what its user meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensordict import TensorDictBase

from asyncflow.policies.base import Policy, clipped_inputs
from asyncflow.policies.networks.layers import Normalizer
from asyncflow.rollout.episodes import Episode
from asyncflow.rollout.success_value import warn_of_returns, warn_of_shaped_reward
from asyncflow.simulators.spec import EnvSpec

NOTICED_CLIPPED_SHARE = 0.1  # of a rollout's observed numbers


class Doubts:
    """Looks at rewards and observations, and tells each doubt once."""

    def __init__(self, notice: Callable[[str], None], is_success_continued: bool) -> None:
        """Tell by `notice`; where a success pays for ever (`algorithm.success_value`), rewards give no reason to."""
        self._notice = notice
        self._has_told_of_rewards, self._has_told_clipped = is_success_continued, False

    def look_at_rewards(self, env_meta: dict[str, Any]) -> None:
        """Tell of a description by which rewards are shaped, so that a success pays less than going on."""
        self._tell_of_rewards(warn_of_shaped_reward(env_meta))

    def look_at_returns(self, episodes: list[Episode]) -> None:
        """Tell of episodes by which a success pays less than going on."""
        self._tell_of_rewards(warn_of_returns(episodes))

    def look_at_inputs(self, policy: Policy, spec: EnvSpec, obs: TensorDictBase) -> None:
        """Tell of a policy that no longer sees what it observes: its normaliser cuts too much of it."""
        shares = None if self._has_told_clipped else clipped_inputs(policy, obs)
        if shares is None or (share := shares.mean().item()) < NOTICED_CLIPPED_SHARE:  # sync: one number a rollout
            return
        self._has_told_clipped = True
        worst = spec.name_number(int(shares.argmax()))
        self._notice(
            f"{share:.0%} of the numbers observed in a rollout lie beyond {Normalizer.LIMIT:g} times the "
            f"demonstrations' range and are cut there, most often {worst}: the policy was made for other observations"
        )

    def _tell_of_rewards(self, warning: str | None) -> None:
        if warning is not None and not self._has_told_of_rewards:
            self._has_told_of_rewards = True
            self._notice(warning)
