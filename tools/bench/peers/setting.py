"""The common task of `tools.bench.peers`: sizes, PPO's settings, and one rollout that everyone is given.

Shapes: T decisions, N environments, D state size, H executed actions, A action size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from asyncflow.envs.base import ChunkResult
from asyncflow.policies.gaussian import GaussianPolicy
from asyncflow.rollout.plan import outcome_fields
from asyncflow.rollout.ring import Rollout, RolloutInfo
from tools.bench.core.workers import CHUNK_LENGTH, HORIZON, NUM_ENVS

STATE_DIM, ACTION_DIM, HIDDEN, STD = 19, 7, [256, 256], 0.5
CHUNK_DIM = CHUNK_LENGTH * ACTION_DIM
NUM_EPOCHS, NUM_MINIBATCHES, CLIP, LEARNING_RATE = 8, 4, 0.2, 3e-4
VF_COEF, ENT_COEF, MAX_GRAD_NORM = 0.5, 0.0, 1.0
GAMMA, LAMBDA = 0.995, 0.95  # per env step; per decision
CHUNK_GAMMA = GAMMA**CHUNK_LENGTH
ALGORITHM: dict[str, Any] = {  # asyncflow's own names for them
    "gamma": GAMMA,
    "gae_lambda": LAMBDA,
    "update_epochs": NUM_EPOCHS,
    "num_minibatches": NUM_MINIBATCHES,
    "learning_rate": LEARNING_RATE,
    "critic_learning_rate": LEARNING_RATE,
    "critic_warmup_updates": 0,
    "clip_coef": CLIP,
    "vf_coef": VF_COEF,
    "ent_coef": ENT_COEF,
    "max_grad_norm": MAX_GRAD_NORM,
}


@dataclass(frozen=True)
class Batch:
    """A rollout that everyone trains on: `rollout` as asyncflow stores it, the rest as tensors.

    Attributes:
        rollout: The rollout itself.
        obs: [T, N, D].
        actions: [T, N, H*A].
        log_probs: [T, N].
        values: [T, N].
        rewards: [T, N].
        dones: [T, N] bool, the decision was its episode's last.
        last_obs: [N, D].
        last_values: [N].
    """

    rollout: Rollout
    obs: Tensor
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    rewards: Tensor
    dones: Tensor
    last_obs: Tensor
    last_values: Tensor


def make_batch(policy: GaussianPolicy, num_steps: int) -> Batch:
    """Let a policy act on random observations; one decision in fifty solves the task."""
    rng = torch.Generator().manual_seed(1)
    shape = [num_steps + 1, NUM_ENVS]
    obs = TensorDict({"state": torch.randn(*shape, STATE_DIM, generator=rng)}, shape)
    noise = torch.randn(num_steps, NUM_ENVS, policy.noise_size, generator=rng)
    rows = []
    for t in range(num_steps):
        outcome = outcome_fields(random_result(obs[t], rng), GAMMA, torch.zeros(NUM_ENVS, dtype=torch.int64))
        rows.append(policy.sample_actions(obs[t], "train", noise[t]).update(outcome))
    data = TensorDict.stack(rows).contiguous()
    rows_of_finals = -(-num_steps * CHUNK_LENGTH // HORIZON)
    return Batch(
        rollout=Rollout(0, 0, RolloutInfo(0), data, obs, obs[:rows_of_finals]),
        obs=obs["state"][:-1],
        actions=data["raw_actions"].flatten(2),
        log_probs=data["log_probs"],
        values=data["values"],
        rewards=data["rewards"],
        dones=data["terminated"],
        last_obs=obs["state"][-1],
        last_values=policy.get_value(obs[-1]).detach(),
    )


def random_result(obs: TensorDict, rng: torch.Generator) -> ChunkResult:
    """Return what whole chunks in all environments did."""
    rewards = torch.rand(NUM_ENVS, CHUNK_LENGTH, generator=rng)
    terminated = torch.rand(NUM_ENVS, generator=rng) < 0.02
    false, executed = torch.zeros(NUM_ENVS, dtype=torch.bool), torch.full((NUM_ENVS,), CHUNK_LENGTH)
    return ChunkResult(obs, obs, rewards, executed, terminated, false, torch.zeros(NUM_ENVS), executed, false)
