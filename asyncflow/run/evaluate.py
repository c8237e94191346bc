"""Evaluate a policy: a fixed number of episodes, fixed start states, and an interval for the success rate.

Every environment has a quota of episodes; several tasks share the episodes evenly. Taking the first episodes to finish
anywhere would favour short ones, and with them success; a quota also makes the result independent of timing and of the
number of workers. Broken episodes do not count: their environment goes on until its quota is filled.

Shapes: N environments, n of them still busy, H executed actions of a chunk, P predicted actions, A action size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from asyncflow.envs.base import ChunkResult, Fault, VecEnv, start_chunk
from asyncflow.errors import ConfigError, EnvError
from asyncflow.policies.base import Policy
from asyncflow.seeding import derive_seed, policy_noise

Z_95 = 1.959964  # quantile of the normal distribution for a two-sided 95 % interval
MAX_BROKEN = 10  # episodes that may break for each one that is asked for


@dataclass(frozen=True)
class EpisodeStats:
    """Outcomes of episodes.

    Attributes:
        num_episodes: Episodes run to their end.
        num_successes: Episodes that solved the task.
        success_rate: Their quotient; NaN where nothing is a success, as its interval.
        success_low: Lower end of its 95 % Wilson interval.
        success_high: Upper end.
        episode_length: Mean env steps of an episode.
        episode_return: Mean undiscounted return of an episode.
        num_broken: Episodes that were lost with a simulator or given up, and do not count.
        num_start_states: Start states that the episodes of a single task took in turn, in their order; 0: each drew its
            own.
    """

    num_episodes: int
    num_successes: int
    success_rate: float
    success_low: float
    success_high: float
    episode_length: float
    episode_return: float
    num_broken: int = field(default=0, kw_only=True)
    num_start_states: int = field(default=0, kw_only=True)


@dataclass(frozen=True)
class TaskResult(EpisodeStats):
    """Result of an evaluation in one of several tasks.

    Attributes:
        name: The task's.
    """

    name: str = field(kw_only=True)


@dataclass(frozen=True)
class EvalResult(EpisodeStats):
    """Result of an evaluation, all tasks together.

    Attributes:
        wall_s: Seconds that the evaluation took.
        faults: What was survived.
        has_success: Whether the environment says what success is; without it there are only returns.
        tasks: Of each task, where they are several.
    """

    wall_s: float
    faults: tuple[Fault, ...] = ()
    has_success: bool = True
    tasks: tuple[TaskResult, ...] = ()

    @property
    def score(self) -> float:
        """The number by which a run chooses its best policy: success rate, or mean return without success."""
        return self.success_rate if self.has_success else self.episode_return

    def as_metrics(self) -> dict[str, float]:
        """Return the logged part under its metric names, all tasks together and each by itself."""
        names = ["success_rate", "success_low", "success_high"] if self.has_success else []
        names += ["episode_length", "episode_return"]
        metrics = {f"eval/{name}": getattr(self, name) for name in names}
        return metrics | {f"eval/{name}/{task.name}": getattr(task, name) for task in self.tasks for name in names}


@dataclass
class _Tally:
    """Sums over finished episodes of one task, and how many broke."""

    num_broken: int = 0
    num_successes: int = 0
    total_length: int = 0
    total_return: float = 0.0

    def add(self, result: ChunkResult, rows: Tensor) -> None:
        """Count the episodes that ended with this chunk in `rows`, [n] bool; all else is zero, broken ones too."""
        self.num_broken += int(result.broken[rows].sum())
        self.num_successes += int(result.is_success[rows].sum())
        self.total_length += int(result.episode_length[rows].sum())
        self.total_return += float(result.episode_return[rows].sum())

    def summarise(self, num_episodes: int, has_success: bool) -> dict[str, Any]:
        """Return the `EpisodeStats` of so many episodes."""
        rate, low, high = math.nan, math.nan, math.nan
        if has_success:
            rate, (low, high) = self.num_successes / num_episodes, wilson_interval(self.num_successes, num_episodes)
        return {
            "num_episodes": num_episodes,
            "num_successes": self.num_successes,
            "success_rate": rate,
            "success_low": low,
            "success_high": high,
            "episode_length": self.total_length / num_episodes,
            "episode_return": self.total_return / num_episodes,
            "num_broken": self.num_broken,
        }


def _add_up(tallies: Sequence[_Tally]) -> _Tally:
    """Return the sums over all tasks."""
    names = [each.name for each in fields(_Tally)]
    return _Tally(*(sum(getattr(tally, name) for tally in tallies) for name in names))


def _check_broken(num_broken: int, num_episodes: int, faults: list[Fault]) -> None:
    """Refuse to go on for ever, as a policy that decides NaN would make it."""
    if num_broken > MAX_BROKEN * num_episodes:
        last = faults[-1].message if faults else "unknown"
        raise EnvError(f"{num_broken} episodes broke in an evaluation of {num_episodes}; the last: {last}")


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
        num_episodes: How many, exactly; tasks share them evenly, the first ones run one more where it does not go up,
            and likewise the first environments of a task.
        seed: The run's seed. Start states and noise are keyed apart from those of training.
        on_decision: Called before every decision with the number of finished episodes; may raise to abandon the
            evaluation.

    Raises:
        ConfigError: There are more tasks than episodes or environments.
        EnvError: Simulators failed too often, or far more episodes broke than are asked for.
        EnvInterrupted: `vec_env.interrupt` was called.
    """
    start = time.perf_counter()
    seed, spec = derive_seed(seed, "evaluation"), vec_env.spec
    remaining = episode_quotas(num_episodes, vec_env.num_envs, len(spec.task_table))
    task = torch.tensor(spec.task_ids(range(vec_env.num_envs)))
    counts = [int(remaining[task == place].sum()) for place in range(len(spec.task_table))]
    obs = vec_env.reset(seed)
    tallies, faults = [_Tally() for _ in counts], list[Fault]()
    decision = 0
    while remaining.any():
        on_decision(num_episodes - int(remaining.sum()))
        busy = remaining.nonzero().flatten().tolist()
        noise = policy_noise(seed, busy, decision, policy.noise_size)
        for env_ids, result in _step(vec_env, busy, _decide(policy, obs[busy], noise)):
            rows = slice(env_ids.start, env_ids.stop)
            obs[rows] = result.obs
            remaining[rows] -= (result.terminated | result.truncated).long()
            for place, tally in enumerate(tallies):
                tally.add(result, task[rows] == place)
            faults += result.faults
        _check_broken(sum(tally.num_broken for tally in tallies), num_episodes, faults)
        decision += 1  # an environment is busy until its quota is done, so this is each one's own count
    total = _add_up(tallies)
    results = [
        TaskResult(name=each.name, **tally.summarise(count, spec.has_success), num_start_states=each.num_start_states)
        for each, tally, count in zip(spec.task_table, tallies, counts, strict=True)
    ]
    return EvalResult(
        **total.summarise(num_episodes, spec.has_success),
        wall_s=time.perf_counter() - start,
        faults=tuple(faults),
        has_success=spec.has_success,
        tasks=tuple(results) if spec.tasks else (),
        num_start_states=spec.num_start_states,
    )


def episode_quotas(num_episodes: int, num_envs: int, num_tasks: int = 1) -> Tensor:
    """Return how many episodes each environment runs, [N] int64.

    Tasks, which environments have in turn, differ by at most one in total, and so do the environments of a task.

    Raises:
        ConfigError: There are more tasks than episodes or environments.
    """
    if num_tasks > min(num_episodes, num_envs):
        raise ConfigError(
            f"an evaluation of {num_tasks} tasks needs as many episodes and environments at least; it has "
            f"{num_episodes} and {num_envs}"
        )
    quotas = torch.zeros(num_envs, dtype=torch.int64)
    for task, of_task in enumerate(_share(num_episodes, num_tasks)):
        quotas[task::num_tasks] = torch.tensor(_share(of_task, len(quotas[task::num_tasks])))
    return quotas


def _share(total: int, parts: int) -> list[int]:
    """Return `total` in whole parts that differ by at most one, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


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
