"""Time updates with a backbone that is trained, run again, or not run at all, and count the ring's bytes.

Owns the rollouts that are updated on, which hold random numbers: only their shapes cost anything. It must not know
which configurations are compared. Needs no simulator.

Shapes: T decisions, N environments, M rows of true final observations, E epochs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from asyncflow.config.sections import Config
from asyncflow.devices import check_memory
from asyncflow.policies import Policy
from asyncflow.ppo.ppo import PPO
from asyncflow.ppo.report import Step
from asyncflow.profile.leg import change
from asyncflow.rollout.plan import RingPlan, plan_ring
from asyncflow.rollout.ring import Rollout, RolloutInfo
from asyncflow.run.collecting import NUM_OPTIMIZER_COPIES
from asyncflow.simulators.spec import EnvSpec
from tools.bench.policies.inference import build, randomised

# How a backbone is treated: `trained`, or frozen and `run_again` by the update on what was observed, or frozen and its
# features `kept` in the ring.
TRAINED, RUN_AGAIN, KEPT = VARIANTS = ("trained", "run_again", "kept")
LAG = 1  # as in `vla`: proximal log-probs are computed, with another pass over the rollout


@dataclass(frozen=True)
class Extent:
    """How much an update works on.

    Attributes:
        num_decisions: T N.
        num_obs: (T + 1 + M) N, of which values are computed.
        num_epochs: E.
    """

    num_decisions: int
    num_obs: int
    num_epochs: int


def extent_of(config: Config, horizon: int) -> Extent:
    """Return the extent of a configuration's updates, for episodes that a horizon cuts."""
    num_envs, num_steps = config.env.num_envs, config.num_steps
    num_obs = (num_steps + 1 + num_truncations(config, horizon)) * num_envs
    return Extent(num_steps * num_envs, num_obs, config.algorithm.update_epochs)


def num_truncations(config: Config, horizon: int) -> int:
    """Return M."""
    decisions_per_episode = -(-horizon // config.policy.n_action_steps)
    return -(-config.num_steps // decisions_per_episode)


def flops_per_decision(flops: Mapping[str, float], extent: Extent, other: Extent) -> float:
    """Return the operations of an update of another extent, per decision of its rollout.

    Args:
        flops: Of an update of `extent`, by what they were for: `values`, `proximal`, `steps`.
        extent: What was counted.
        other: What is asked for. The operations of each kind are proportional to what it works on.
    """
    values = flops["values"] / extent.num_obs * other.num_obs
    proximal = flops["proximal"] / extent.num_decisions * other.num_decisions
    steps = flops["steps"] / (extent.num_decisions * extent.num_epochs) * other.num_decisions * other.num_epochs
    return (values + proximal + steps) / other.num_decisions


class CountedPPO(PPO):
    """Counts the floating-point operations of an update, by what they are for; matrix products and attention."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        """Build as `PPO`; nothing is counted yet."""
        super().__init__(*arguments, **settings)
        self.flops: Counter[str] = Counter()
        self.is_counting = False

    def _values(self, obs: TensorDictBase, piece: int) -> Tensor:
        with self._counted("values"):
            return super()._values(obs, piece)

    def _add_proximal(self, batch: TensorDict, is_stale: bool, piece: int) -> None:
        with self._counted("proximal"):
            super()._add_proximal(batch, is_stale, piece)

    def _step(self, batch: TensorDict, is_warmup: bool) -> Step:
        with self._counted("steps"):
            return super()._step(batch, is_warmup)

    @contextmanager
    def _counted(self, what: str) -> Iterator[None]:
        if not self.is_counting:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops[what] += counter.get_total_flops()


def measure_updates(config: Config, spec: EnvSpec, variant: str, num_updates: int) -> dict[str, Any]:
    """Time updates on one rollout; a first one, whose operations are counted, is warm-up.

    Returns:
        `seconds` of each update, `flops` of one by what they are for, `extent`, and `num_skipped` minibatches.

    Raises:
        ConfigError: Optimizer and gradients do not fit into memory.
    """
    config = change(config, {"policy.freeze_backbone": variant != TRAINED})
    policy = build(config, spec)
    device = next(policy.parameters()).device
    trainable = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    check_memory((NUM_OPTIMIZER_COPIES + 1) * trainable, device, "policy.vla.size")
    rollout = make_rollout(policy, spec, config, variant == KEPT)
    ppo = CountedPPO(policy, config.algorithm, total_updates=config.trainer.total_updates)
    version = rollout.policy_version + LAG

    def update() -> float:
        start = time.perf_counter()
        ppo.update(rollout, version, lambda: None)  # sync: it ends with its metrics on the CPU
        return time.perf_counter() - start

    ppo.is_counting = True
    update()
    ppo.is_counting = False
    return {
        "seconds": [update() for _ in range(num_updates)],
        "flops": dict(ppo.flops),
        "extent": asdict(extent_of(config, spec.horizon)),
        "num_skipped": ppo.num_nonfinite_steps,
    }


def make_rollout(policy: Policy, spec: EnvSpec, config: Config, is_encoded: bool) -> Rollout:
    """Return a rollout that is a version old, of observations or of what the policy makes of them.

    Args:
        policy: Whose decisions it holds, on the device of the rollout.
        spec: Of the environments.
        config: T, N, and how many updates train the critic alone, which are over.
        is_encoded: Whether it holds what `Policy.encode_obs` returns.
    """
    num_envs, num_steps = config.env.num_envs, config.num_steps
    device = next(policy.parameters()).device
    with torch.no_grad():
        obs = randomised(spec.empty_obs(num_envs)).to(device)
        obs = policy.encode_obs(obs) if is_encoded else obs
        noise = torch.randn(num_envs, policy.noise_size, device=device)
        decision = policy.sample_actions(obs, "train", noise)
    data = decision.expand(num_steps, num_envs).clone()
    data.update(_outcome(config, (num_steps, num_envs), device))
    rows, finals = num_steps + 1, num_truncations(config, spec.horizon)
    info = RolloutInfo(policy_version=config.algorithm.critic_warmup_updates)
    return Rollout(0, 0, info, data, _repeated(obs, rows), _repeated(obs, finals))


def _repeated(obs: TensorDictBase, num_rows: int) -> TensorDict:
    return randomised(obs.expand(num_rows, len(obs)).clone())


def _outcome(config: Config, size: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    """Return what decisions led to: random rewards, no end of an episode."""
    executed = config.policy.n_action_steps
    false = torch.zeros(size, dtype=torch.bool, device=device)
    return {
        "rewards": torch.rand(size, device=device),
        "discounts": torch.full(size, config.algorithm.gamma**executed, device=device),
        "executed": torch.full(size, executed, device=device),
        "terminated": false,
        "truncated": false.clone(),
        "succeeded": false.clone(),
        "valid": ~false,
        "final_index": torch.zeros(size, dtype=torch.int64, device=device),
    }


# The ring.


def plan_bytes(config: Config, spec: EnvSpec, num_slots: int) -> dict[str, int]:
    """Return the bytes of an observation in the ring, and of a ring of the configuration's rollouts."""
    plan = _plan_one(config, spec, num_slots)
    return {"obs_bytes": int(plan.obs.bytes()), "ring_bytes": plan.num_bytes * config.env.num_envs}


def _plan_one(config: Config, spec: EnvSpec, num_slots: int) -> RingPlan:
    """Return the plan for one environment: planning decides once, and bytes are proportional to environments."""
    return plan_ring(build(config, spec), spec, 1, config.num_steps, num_slots)
