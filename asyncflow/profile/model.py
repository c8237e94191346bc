"""Predict how much time overlap can save: ceilings from stage times, a model of the ring, intervals, advice.

This file is arithmetic only.

Letters: T decisions of an environment in a rollout, N environments, G groups of them, L lag limit; Te, Ti, Tt are the
seconds of a chunk, of a decision call and of an update, Tc those of collecting a rollout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BALANCED = 1.25  # collecting and training are called equally long up to this ratio
_T_95 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
)  # fmt: skip  Student's t, two-sided 95 %, for 1 to 30 degrees of freedom


@dataclass(frozen=True)
class StageTimes:
    """Seconds that one rollout takes in each stage.

    Attributes:
        env_s: In the simulators, all environments: T Te.
        inference_s: In the policy, all environments at once: T Ti(N).
        group_inference_s: In the policy, group by group: G T Ti(N / G).
        collect_s: Collecting, with as many groups: Tc.
        update_s: Training and publishing: Tt.
    """

    env_s: float
    inference_s: float
    group_inference_s: float
    collect_s: float
    update_s: float

    @property
    def serial_s(self) -> float:
        """All stages one after the other: T Te + T Ti + Tt."""
        return self.env_s + self.inference_s + self.update_s


@dataclass(frozen=True)
class Ceilings:
    """The most that overlap can give.

    Attributes:
        two_stage: Over a synchronous run with as many groups: (Tc + Tt) / max(Tc, Tt).
        three_stage: Over one in which nothing overlaps: (T Te + T Ti + Tt) / max(T Te, G T Ti(N / G), Tt).
    """

    two_stage: float
    three_stage: float


def ceilings(alone: StageTimes, at_work: StageTimes | None = None) -> Ceilings:
    """Return what overlap can give at most.

    Args:
        alone: Stage times while nothing else runs; their sum is the synchronous run.
        at_work: Stage times of the run that overlaps them, for the contended ceiling: of these the longest sets the
            pace. None means that they are the same, which is the ideal.
    """
    pace = at_work or alone
    two = (alone.collect_s + alone.update_s) / max(pace.collect_s, pace.update_s)
    three = alone.serial_s / max(pace.env_s, pace.group_inference_s, pace.update_s)
    return Ceilings(two, three)


def ring_seconds(collect_s: Sequence[float], update_s: Sequence[float], max_policy_lag: int) -> list[float]:
    """Return when each update ends, in seconds since the first rollout began, under fixed lag L and L + 1 slots.

    Rollout n needs the version after update n - L - 1, whose slot it also takes; update n needs rollout n.

    Args:
        collect_s: [R] seconds to collect each rollout.
        update_s: [R] seconds to train on it.
        max_policy_lag: L.
    """
    ends: list[float] = []
    collected = updated = 0.0
    for n, (collecting, updating) in enumerate(zip(collect_s, update_s, strict=True)):
        version = n - max_policy_lag - 1
        collected = max(collected, ends[version] if version >= 0 else 0.0) + collecting
        updated = max(updated, collected) + updating
        ends.append(updated)
    return ends


def predict_speedup(collect_s: Sequence[float], update_s: Sequence[float], max_policy_lag: int, skip: int) -> float:
    """Return what the ring gains over collecting and training in turn, the first `skip` updates left out."""
    ends = ring_seconds(collect_s, update_s, max_policy_lag)
    in_turn = sum(collect_s[skip:]) + sum(update_s[skip:])
    return in_turn / (ends[-1] - (ends[skip - 1] if skip else 0.0))


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval, which nobody knows with fewer than two samples."""

    value: float
    low: float | None
    high: float | None


def log_ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """Return the geometric mean of paired ratios with its 95 % interval: Student's t on their logarithms."""
    logs = [math.log(a / b) for a, b in zip(numerators, denominators, strict=True)]
    centre = mean(logs)
    if len(logs) < 2:
        return Interval(math.exp(centre), None, None)
    half = student_t_95(len(logs) - 1) * spread(logs) / math.sqrt(len(logs))
    return Interval(math.exp(centre), math.exp(centre - half), math.exp(centre + half))


def student_t_95(degrees: int) -> float:
    """Return the quantile of Student's t for a two-sided 95 % interval; beyond 30 degrees of freedom, the normal's."""
    return _T_95[degrees - 1] if degrees <= len(_T_95) else 1.96


def mean(samples: Sequence[float]) -> float:
    """Return the mean; 0 without samples."""
    return sum(samples) / len(samples) if samples else 0.0


def spread(samples: Sequence[float]) -> float:
    """Return the sample's standard deviation; 0 with fewer than two samples."""
    if len(samples) < 2:
        return 0.0
    centre = mean(samples)
    return math.sqrt(sum((x - centre) ** 2 for x in samples) / (len(samples) - 1))


@dataclass(frozen=True)
class Situation:
    """The figures that the advice depends on.

    Attributes:
        alone: Stage times while nothing else runs.
        ideal: What overlap can give at most.
        contended: The same while the stages share the machine.
        speedup: What was reached.
        variation: Standard deviation over mean of the stage that varies most from rollout to rollout.
        num_env_groups: G.
        max_policy_lag: L of the `vla` run.
        num_workers: Simulator processes; 0 if there are none.
        num_cores: Processor cores.
    """

    alone: StageTimes
    ideal: Ceilings
    contended: Ceilings
    speedup: float
    variation: float
    num_env_groups: int
    max_policy_lag: int
    num_workers: int
    num_cores: int


def advise(situation: Situation) -> str:
    """Return one sentence: what limits the run, what overlap can give, and what to change."""
    collect_s, update_s = situation.alone.collect_s, situation.alone.update_s
    ceiling = f"overlap can give at most {situation.ideal.two_stage:.2f}"
    if situation.max_policy_lag == 0:
        return f"{ceiling}, but with buffer.max_policy_lag = 0 nothing overlaps: set it to 1"
    if collect_s > BALANCED * update_s:
        return (
            f"collecting takes {collect_s / update_s:.1f} times as long as training: {ceiling}; "
            + _speed_up_collecting(situation)
        )
    if update_s > BALANCED * collect_s:
        return (
            f"training takes {update_s / collect_s:.1f} times as long as collecting: {ceiling}; use fewer epochs or "
            "larger minibatches, more lag would gain nothing"
        )
    return (
        f"collecting and training take equally long: {ceiling}, {situation.speedup:.2f} is reached; "
        + _close_the_gap(situation)
    )


def _speed_up_collecting(situation: Situation) -> str:
    alone = situation.alone
    in_simulators = alone.env_s / max(alone.env_s + alone.inference_s, 1e-9)
    overlap = "two environment groups"
    if in_simulators > 0.5:
        more = "add workers" if situation.num_workers < situation.num_cores else "give the simulators more cores"
        more = more if situation.num_workers else "make the environments faster"
        changes = f"step time is {100 * in_simulators:.0f} % simulator: {more}"
        is_hidden = in_simulators > 0.95
    else:
        changes = (
            f"step time is {100 - 100 * in_simulators:.0f} % inference: use fewer denoising steps or more environments"
        )
        is_hidden = in_simulators < 0.05
    return changes if situation.num_env_groups > 1 or is_hidden else f"{changes}, or {overlap}"


def _close_the_gap(situation: Situation) -> str:
    if situation.contended.two_stage < 0.85 * situation.ideal.two_stage:
        return f"the stages slow each other down on {situation.num_cores} cores: give them more, or train on a GPU"
    if situation.variation > 0.15 and situation.max_policy_lag < 2:
        return "durations vary from rollout to rollout: buffer.max_policy_lag = 2 evens them out"
    if situation.speedup < 0.9 * situation.contended.two_stage:
        return "the rest is lost at the hand-over between the two: see the gaps in the trace"
    return "only making both faster gains more"
