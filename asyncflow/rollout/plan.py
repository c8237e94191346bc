"""The plan of the ring: which tensors a decision leaves behind, and how many bytes rollouts of them take.

The plan is made before anything large is allocated, so that a run that does not fit is refused first.

Shapes: S slots, T decisions, N environments, n of them in a group, H executed actions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from asyncflow.envs.base import ChunkResult
from asyncflow.policies.base import Policy
from asyncflow.rollout.weights import make_acting_copy
from asyncflow.simulators.spec import EnvSpec


@dataclass(frozen=True)
class RingPlan:
    """Shapes and bytes of a ring, known before it is allocated.

    Attributes:
        fields: Example of one decision of all environments, [N]; only names, shapes and dtypes are used.
        obs: Example of one observation of all environments, [N].
        num_slots: S.
        num_steps: T.
        max_truncations: Episodes of one environment that the horizon can cut within one rollout.
    """

    fields: TensorDictBase
    obs: TensorDictBase
    num_slots: int
    num_steps: int
    max_truncations: int

    @property
    def num_envs(self) -> int:
        """N."""
        return int(self.fields.batch_size[0])

    @property
    def num_decisions(self) -> int:
        """Decisions of one rollout, T x N."""
        return self.num_steps * self.num_envs

    @property
    def slot_bytes(self) -> int:
        """Bytes of one rollout."""
        num_obs = self.num_steps + 1 + self.max_truncations
        return int(self.num_steps * self.fields.bytes() + num_obs * self.obs.bytes())

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole ring."""
        return self.num_slots * self.slot_bytes

    def allocate(self, device: torch.device) -> TensorDict:
        """Return the ring: `data [S, T, N]`, `obs [S, T+1, N]`, `final_obs [S, max_truncations, N]`."""
        num_rows = {"data": self.num_steps, "obs": self.num_steps + 1, "final_obs": self.max_truncations}
        rows = {"data": self.fields, "obs": self.obs, "final_obs": self.obs}
        ring = {name: allocate_rows(rows[name], (self.num_slots, count), device) for name, count in num_rows.items()}
        return TensorDict(ring, batch_size=[self.num_slots], device=device)


def allocate_rows(row: TensorDictBase, leading: tuple[int, ...], device: torch.device) -> TensorDict:
    """Return zeros of the shape [*leading, N] for every field of `row`."""
    shape = [*leading, *row.batch_size]
    ring = TensorDict({}, batch_size=shape, device=device)
    for name, value in leaves(row):
        ring[name] = torch.zeros(*leading, *value.shape, dtype=value.dtype, device=device)
    return ring


def leaves(fields: Any) -> Iterator[tuple[Any, Tensor]]:
    """Return (name, tensor) of a TensorDict's fields; the name of a nested one is a tuple."""
    return iter(fields.items(include_nested=True, leaves_only=True))


def outcome_fields(result: ChunkResult, gamma: float, final_index: Tensor) -> dict[str, Tensor]:
    """Return what the ring stores of a chunk's outcome, each [n].

    A chunk's reward is `sum_i gamma^i r_i`, its discount `gamma ** executed`.
    """
    powers = gamma ** torch.arange(result.rewards.shape[1], dtype=torch.float32)
    return {
        "rewards": (result.rewards * powers).sum(-1),
        "discounts": gamma ** result.executed.float(),
        "executed": result.executed,
        "terminated": result.terminated,
        "truncated": result.truncated,
        "succeeded": result.is_success,
        "valid": ~result.broken,
        "final_index": final_index,
    }


def plan_ring(policy: Policy, spec: EnvSpec, num_envs: int, num_steps: int, num_slots: int) -> RingPlan:
    """Return the ring that rollouts of this policy in these environments need; allocates nothing of that size.

    The horizon cuts an environment's episode at most once per `ceil(horizon / H)` decisions.
    """
    device = next(policy.parameters()).device
    acting = make_acting_copy(policy)
    with torch.no_grad():
        noise = torch.zeros(num_envs, policy.noise_size, device=device)
        encoded = acting.encode_obs(spec.empty_obs(num_envs).to(device))
        decision = acting.sample_actions(encoded, "train", noise)
    obs = encoded.cpu()
    outcome = outcome_fields(_empty_result(obs, policy.n_action_steps), 1.0, torch.zeros(num_envs, dtype=torch.int64))
    fields = dict(decision.cpu().items()) | outcome
    decisions_per_episode = -(-spec.shortest_horizon // policy.n_action_steps)
    max_truncations = -(-num_steps // decisions_per_episode)
    return RingPlan(TensorDict(fields, [num_envs]), obs, num_slots, num_steps, max_truncations)


def _empty_result(obs: TensorDictBase, chunk_length: int) -> ChunkResult:
    num_envs = len(obs)
    zeros, counts = torch.zeros(num_envs), torch.zeros(num_envs, dtype=torch.int64)
    false = torch.zeros(num_envs, dtype=torch.bool)
    return ChunkResult(obs, obs, torch.zeros(num_envs, chunk_length), counts, false, false, zeros, counts, false)
