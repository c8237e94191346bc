"""How often a policy succeeds: a fixed number of episodes, fixed start states, and an interval for the rate.

This file holds the quotas of episodes and the statistics.

Every environment has a quota of episodes. Taking the first episodes to finish anywhere would favour short ones, and
with them success; a quota also makes the result independent of timing and of the number of workers. Broken episodes do
not count: their environment goes on until its quota is filled.

Shapes: N environments, n of them still busy, H executed actions of a chunk, P predicted actions, A action size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from tensordict import TensorDict
from torch import Tensor

from asyncflow.envs.base import ChunkResult, Fault, VecEnv, start_chunk
from asyncflow.errors import EnvError
from asyncflow.policies.base import Policy
from asyncflow.seeding import derive_seed, policy_noise

Z_95 = 1.959964  # quantile of the normal distribution for a two-sided 95 % interval
MAX_BROKEN = 10  # episodes that may break for each one that is asked for


@dataclass(frozen=True)
class EvalResult:
    """Result of an evaluation.

    Attributes:
        num_episodes: Episodes run to their end.
        num_successes: Episodes that solved the task.
        success_rate: Their quotient; NaN where nothing is a success, as its interval.
        success_low: Lower end of its 95 % Wilson interval.
        success_high: Upper end.
        episode_length: Mean env steps of an episode.
        episode_return: Mean undiscounted return of an episode.
        wall_s: Seconds that the evaluation took.
        num_broken: Episodes that were lost with a simulator or given up, and do not count.
        faults: What was survived.
        has_success: Whether the environment says what success is; without it there are only returns.
    """

    num_episodes: int
    num_successes: int
    success_rate: float
    success_low: float
    success_high: float
    episode_length: float
    episode_return: float
    wall_s: float
    num_broken: int = 0
    faults: tuple[Fault, ...] = ()
    has_success: bool = True

    @property
    def score(self) -> float:
        """The number by which a run chooses its best policy: success rate, or mean return without success."""
        return self.success_rate if self.has_success else self.episode_return

    def as_metrics(self) -> dict[str, float]:
        """Return the logged part under its metric names."""
        names = ("success_rate", "success_low", "success_high") if self.has_success else ()
        values = asdict(self)
        return {f"eval/{name}": values[name] for name in (*names, "episode_length", "episode_return")}


@dataclass
class _Tally:
    """Sums over finished episodes, and how many broke."""

    num_broken: int = 0
    num_successes: int = 0
    total_length: int = 0
    total_return: float = 0.0
    faults: list[Fault] = field(default_factory=list)

    def add(self, result: ChunkResult) -> None:
        """Count the episodes that ended with this chunk; the other rows are zero, those of broken episodes too."""
        self.num_broken += int(result.broken.sum())
        self.faults += result.faults
        self.num_successes += int(result.is_success.sum())
        self.total_length += int(result.episode_length.sum())
        self.total_return += float(result.episode_return.sum())

    def check_broken(self, num_episodes: int) -> None:
        """Refuse to go on for ever, as a policy that decides NaN would make it."""
        if self.num_broken > MAX_BROKEN * num_episodes:
            last = self.faults[-1].message if self.faults else "unknown"
            raise EnvError(f"{self.num_broken} episodes broke in an evaluation of {num_episodes}; the last: {last}")


@torch.no_grad()
def evaluate(
    policy: Policy,
    vec_env: VecEnv,
    num_episodes: int,
    seed: int,
    on_decision: Callable[[int], None] = lambda _: None,
) -> EvalResult:
    """Run episodes in deterministic mode; afterwards the environments stand in the middle of new ones.

    Args:
        policy: Acts in `eval` mode; neither its parameters nor its train/eval flag are touched.
        vec_env: Environments of the evaluation's own, never a collector's.
        num_episodes: How many, exactly; the first environments run one more where N does not divide it.
        seed: The run's seed. Start states and noise are keyed apart from those of training.
        on_decision: Called before every decision with the number of finished episodes; may raise to abandon the
            evaluation.

    Raises:
        EnvError: Simulators failed too often, or far more episodes broke than are asked for.
        EnvInterrupted: `vec_env.interrupt` was called.
    """
    start = time.perf_counter()
    seed = derive_seed(seed, "evaluation")
    remaining = episode_quotas(num_episodes, vec_env.num_envs)
    obs = vec_env.reset(seed)
    tally = _Tally()
    decision = 0
    while remaining.any():
        on_decision(num_episodes - int(remaining.sum()))
        busy = remaining.nonzero().flatten().tolist()
        noise = policy_noise(seed, busy, decision, policy.noise_size)
        for env_ids, result in _step(vec_env, busy, _decide(policy, obs[busy], noise)):
            rows = slice(env_ids.start, env_ids.stop)
            obs[rows] = result.obs
            remaining[rows] -= (result.terminated | result.truncated).long()
            tally.add(result)
        tally.check_broken(num_episodes)
        decision += 1  # an environment is busy until its quota is done, so this is each one's own count
    return _summarise(tally, num_episodes, time.perf_counter() - start, vec_env.spec.has_success)


def episode_quotas(num_episodes: int, num_envs: int) -> Tensor:
    """Return how many episodes each environment runs, [N] int64; they differ by at most one."""
    quotas = torch.full((num_envs,), num_episodes // num_envs)
    quotas[: num_episodes % num_envs] += 1
    return quotas


def _decide(policy: Policy, obs: TensorDict, noise: Tensor) -> Tensor:
    """Return the first H of the actions decided on, [n, H, A] on CPU."""
    device = next(policy.parameters()).device
    decided = policy.sample_actions(obs.to(device), "eval", noise.to(device))
    actions: Tensor = decided["actions"]
    return actions[:, : policy.n_action_steps].float().cpu()


def _step(vec_env: VecEnv, env_ids: list[int], actions: Tensor) -> list[tuple[range, ChunkResult]]:
    """Step some environments at once and wait for all of them; actions are [n, H, A]."""
    runs = contiguous_runs(env_ids)
    parts = actions.split([len(run) for run in runs])
    for run, part in zip(runs, parts, strict=True):
        start_chunk(vec_env, part, run)
    return [(run, vec_env.step_wait(run)) for run in runs]


def contiguous_runs(ids: list[int]) -> list[range]:
    """Return the fewest ranges that cover rising ids, which is how a VecEnv addresses environments."""
    runs: list[range] = []
    for index in ids:
        if runs and runs[-1].stop == index:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    return runs


def wilson_interval(num_successes: int, num_trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a success rate (Wilson, "Probable inference", JASA 22, 1927, equation 4)."""
    rate = num_successes / num_trials
    shrink = 1 + Z_95**2 / num_trials
    centre = (rate + Z_95**2 / (2 * num_trials)) / shrink
    half = Z_95 * math.sqrt(rate * (1 - rate) / num_trials + Z_95**2 / (4 * num_trials**2)) / shrink
    # Exact where it is known: rounding would end the interval of a policy that never failed below 1.
    low = 0.0 if num_successes == 0 else max(0.0, centre - half)
    high = 1.0 if num_successes == num_trials else min(1.0, centre + half)
    return low, high


def _summarise(tally: _Tally, num_episodes: int, wall_s: float, has_success: bool) -> EvalResult:
    low, high = wilson_interval(tally.num_successes, num_episodes) if has_success else (math.nan, math.nan)
    return EvalResult(
        num_episodes=num_episodes,
        num_successes=tally.num_successes,
        success_rate=tally.num_successes / num_episodes if has_success else math.nan,
        success_low=low,
        success_high=high,
        episode_length=tally.total_length / num_episodes,
        episode_return=tally.total_return / num_episodes,
        wall_s=wall_s,
        num_broken=tally.num_broken,
        faults=tuple(tally.faults),
        has_success=has_success,
    )
