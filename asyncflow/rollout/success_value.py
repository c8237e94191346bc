"""The value of a success, which ends its episode and with it every reward that would have followed.

With a sparse reward, 1 at success, that is right. With a shaped one, which also pays for being near success, solving
the task earns less than nearly solving it until the horizon, the more so as truncation bootstraps from the value of
what would follow, without end. PPO then unlearns success. `algorithm.success_value: continue` lets a success be
followed by its last reward, likewise without end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from asyncflow.envs.base import ChunkResult
from asyncflow.rollout.episodes import Episode

_ADVICE = "PPO learns to avoid it. Set algorithm.success_value=continue, or take a sparse reward"


def rewards_after_success(result: ChunkResult, gamma: float) -> Tensor:
    """Return what a success is followed by if its last reward goes on; zero elsewhere, [n].

    That reward r is paid in every env step after the chunk: `gamma^executed r / (1 - gamma)`.
    """
    last = result.rewards.gather(1, (result.executed - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(
        result.terminated & result.is_success, gamma ** result.executed.float() * last / (1 - gamma), 0.0
    )


def warn_of_shaped_reward(env_meta: Mapping[str, Any]) -> str | None:
    """Return a line about an environment whose description asks for a shaped reward; None about any other."""
    kwargs = env_meta.get("env_kwargs")  # a package's description may hold anything
    is_shaped_by_default = env_meta.get("env_name") == "Wipe"
    if not isinstance(kwargs, Mapping) or not kwargs.get("reward_shaping", is_shaped_by_default):
        return None
    return (
        "the environment's reward_shaping is true, and an episode ends at success: solving the task may pay less than "
        f"nearly solving it until the horizon. {_ADVICE} (reward_shaping: false)"
    )


def warn_of_returns(episodes: list[Episode]) -> str | None:
    """Return a line if episodes that solved the task earned less on average than the others; else None."""
    solved, failed = ([e.episode_return for e in episodes if e.is_success is wanted] for wanted in (True, False))
    if not solved or not failed:
        return None
    earned, missed = sum(solved) / len(solved), sum(failed) / len(failed)
    if earned >= missed:
        return None
    return (
        f"episodes that solved the task earned {earned:.3g} on average, the others {missed:.3g}: a success ends its "
        f"episode and pays less than going on. {_ADVICE}"
    )
