"""Time the writing of one decision of all environments into the ring; a part of `tools.bench.core`."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asyncflow.config.presets import load_config
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import load_policy_file, resolve_checkpoint
from asyncflow.rollout.plan import RingPlan, plan_ring
from asyncflow.rollout.ring import RolloutInfo, RolloutRing
from tools.bench.common.report import Finding, Part, isolated
from tools.bench.core.settings import Settings
from tools.bench.core.workers import NUM_ENVS

MAX_ROW_US = 100.0


def make_flow_row() -> tuple[RingPlan, Any]:
    """Return the ring of the default Lift run and one decision of its policy."""
    config = load_config("lift")
    spec = load_policy_file(resolve_checkpoint(config.policy.checkpoint or "")).env_spec
    policy = make_policy(config.policy, spec, config.trainer.seed)
    plan = plan_ring(policy, spec, config.env.num_envs, config.num_steps, num_slots=2)
    with torch.no_grad():
        return plan, policy.sample_actions(plan.obs, "train", torch.zeros(plan.num_envs, policy.noise_size))


def measure_row_writes(num_writes: int) -> tuple[NDArray[np.float64], int]:
    """Return the microseconds of each write of one row and the row's bytes."""
    torch.set_num_threads(1)
    plan, decision = make_flow_row()
    ring, everyone = RolloutRing(plan, torch.device("cpu")), range(plan.num_envs)
    outcome: Any = dict(plan.fields.exclude(*decision.keys()).items())  # as the collector makes it
    microseconds = np.zeros(num_writes)
    for index in range(num_writes):
        t = index % plan.num_steps
        if t == 0:
            slot = ring.begin_rollout()
        start = time.perf_counter_ns()
        slot.add(t, everyone, plan.obs, decision)
        slot.add_outcome(t, everyone, outcome)
        microseconds[index] = (time.perf_counter_ns() - start) / 1000
        if t == plan.num_steps - 1:
            slot.finish(RolloutInfo(0))
            ring.release(ring.take())
    return microseconds, plan.obs.bytes() + plan.fields.bytes()


def bench_ring(settings: Settings) -> Part:
    """Time the writing of one decision of all environments."""
    microseconds, num_bytes = isolated(measure_row_writes, settings.num_writes)
    median, high = np.median(microseconds), np.quantile(microseconds, 0.99)
    what = "microseconds to write one row of the ring, median"
    finding = Finding(what, f"{median:.1f} (99 %: {high:.1f})", f"< {MAX_ROW_US:g}", bool(median < MAX_ROW_US))
    note = (
        f"Ring: observation, decision and outcome of {NUM_ENVS} environments under the default flow policy, "
        f"{num_bytes} bytes in all, {len(microseconds)} writes over every row of both slots, CPU."
    )
    return Part([finding], [note])
