"""Compare the time of one PPO update with those of the peers; a part of `tools.bench.peers`."""

from __future__ import annotations

import statistics
import time

import torch
from torch.distributions import Distribution

from asyncflow.config.sections import PolicyConfig
from asyncflow.policies import make_policy
from asyncflow.policies.gaussian import GaussianPolicy
from asyncflow.simulators.spec import EnvSpec
from tools.bench.common.report import Finding, Part, isolated
from tools.bench.core.workers import CHUNK_LENGTH, NUM_ENVS
from tools.bench.peers.contenders import Contender, make_asyncflow, make_cleanrl, make_rsl_rl, make_sb3_contender
from tools.bench.peers.setting import (
    ACTION_DIM,
    HIDDEN,
    NUM_EPOCHS,
    NUM_MINIBATCHES,
    STATE_DIM,
    STD,
    make_batch,
)
from tools.bench.peers.settings import Settings

ROLLOUT_SIZES = {960: 5, 8192: 2}  # decisions -> turns per repeat; the default of Lift, and a large one
OURS = "asyncflow"
MIN_RATIOS = {  # decisions -> peer -> times as fast, at least
    960: {"stable-baselines3": 1.15, "rsl_rl": 1.2, "CleanRL's shape": 1.1},
    8192: {"stable-baselines3": 1.05, "rsl_rl": 1.05, "CleanRL's shape": 1.05},
}
TOLERANCE = 1e-3  # of log-probs, which are around -20

UPDATE_NOTE = (
    f"Update: a Gaussian actor and a critic of {HIDDEN} ReLU units each, {STATE_DIM} observations, chunks of "
    f"{CHUNK_LENGTH} x {ACTION_DIM}, {NUM_EPOCHS} epochs of {NUM_MINIBATCHES} minibatches, float32 on one CPU thread, "
    "the same weights before every update, and the same rollout in all; each log-prob of it and the number of "
    "optimizer steps were compared. Timed from a finished rollout to trained weights, advantages included: "
    "stable-baselines3's `compute_returns_and_advantage` and rsl_rl's `compute_returns` count as part of theirs. "
    "asyncflow also computes all values anew, rsl_rl shuffles once for all epochs; nobody clips values or adapts "
    "its step size. `torch.distributions` checks its arguments, its default, but under rsl_rl, which turns that off. "
    "Medians; everyone takes a turn in every round, and ratios are within a round."
)


def measure_update(rollout_size: int, num_turns: int) -> dict[str, list[float]]:
    """Return the seconds of each turn of each contender, [num_turns]; two turns before are warm-up."""
    torch.set_num_threads(1)
    contenders = make_contenders(rollout_size // NUM_ENVS)
    initial = {name: [p.detach().clone() for p in each.parameters] for name, each in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(num_turns + 2):
        for name in sorted(contenders, reverse=bool(turn % 2)):
            seconds[name].append(time_update(contenders[name], initial[name]))
    check_steps(contenders, num_turns + 2)
    return {name: values[2:] for name, values in seconds.items()}


def make_contenders(num_steps: int) -> dict[str, Contender]:
    """Return everyone, with the same weights and the same rollout."""
    batch = make_batch(make_gaussian(), num_steps)
    contenders = {
        OURS: make_asyncflow(make_gaussian(), batch, 0),
        "asyncflow, lag 1": make_asyncflow(make_gaussian(), batch, 1),
        "stable-baselines3": make_sb3_contender(make_gaussian(), batch),
        "rsl_rl": make_rsl_rl(make_gaussian(), batch),
        "CleanRL's shape": make_cleanrl(make_gaussian(), batch),
    }
    for name, contender in contenders.items():
        with torch.no_grad():
            error = (contender.log_probs() - batch.log_probs.flatten()).abs().max()
        if error > TOLERANCE:
            raise SystemExit(f"{name}: its network differs: log-probs are off by {error:.2g}")
    return contenders


def make_gaussian() -> GaussianPolicy:
    """Return the policy that all start from; each call returns the same weights."""
    config = PolicyConfig(
        kind="gaussian", log_prob="joint_sum", hidden_sizes=HIDDEN, critic_hidden_sizes=HIDDEN, initial_std=STD
    )
    policy = make_policy(config, EnvSpec({"state": (STATE_DIM,)}, ACTION_DIM, 10), seed=0)
    assert isinstance(policy, GaussianPolicy)  # its kind
    return policy


@torch.no_grad()
def put_back(contender: Contender, initial: list[torch.Tensor]) -> None:
    """Make the weights what they were, so that every update meets a rollout of its own policy."""
    for parameter, value in zip(contender.parameters, initial, strict=True):
        parameter.copy_(value)


def time_update(contender: Contender, initial: list[torch.Tensor]) -> float:
    """Return the seconds of one update."""
    Distribution.set_default_validate_args(contender.is_validating)  # process-wide, and rsl_rl turns it off
    put_back(contender, initial)
    contender.refill()
    start = time.perf_counter()
    contender.update()
    return time.perf_counter() - start


def check_steps(contenders: dict[str, Contender], num_updates: int) -> None:
    """Refuse a comparison of different numbers of optimizer steps."""
    expected = num_updates * NUM_EPOCHS * NUM_MINIBATCHES
    for name, contender in contenders.items():
        taken = {int(state["step"]) for state in contender.optimizer.state.values()}
        if taken != {expected}:
            raise SystemExit(f"{name}: {taken} optimizer steps, expected {expected}")


def describe_update(rollout_size: int, seconds: dict[str, list[float]]) -> Part:
    """Compare the peers' times with asyncflow's."""
    findings = []
    for name, target in MIN_RATIOS[rollout_size].items():
        ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds[OURS], strict=True)]
        findings.append(compare(f"PPO update of {rollout_size} decisions, times as fast as {name}", ratios, target))
    medians = [f"{name} {1e3 * statistics.median(values):.1f}" for name, values in seconds.items()]
    return Part(findings, [f"Milliseconds of an update of {rollout_size} decisions: {', '.join(medians)}."])


def compare(what: str, ratios: list[float], target: float) -> Finding:
    """Return a row of the table: median and quartiles."""
    median = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [median] * 3
    measured = f"{median:.2f} ({low:.2f} to {high:.2f}, half of {len(ratios)} turns)"
    return Finding(what, measured, f">= {target}", median >= target)


def bench_update(settings: Settings) -> Part:
    """Time updates of a default rollout and of a large one."""
    part = Part([], [UPDATE_NOTE])
    for rollout_size, turns in ROLLOUT_SIZES.items():
        part_of_size = describe_update(rollout_size, isolated(measure_update, rollout_size, turns * settings.turns))
        part.findings.extend(part_of_size.findings)
        part.notes.extend(part_of_size.notes)
    return part
