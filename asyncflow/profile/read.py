"""Legs of a profile: what one run showed in its measured window, read from its trace and its rows of metrics.

Spans and counters become seconds of stages, bubbles and counts here.

Letters as in `model`. Update k trains on rollout k; both are counted from 0 here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from asyncflow.metrics.tracing import Span, union_seconds
from asyncflow.profile.model import StageTimes, mean

Mode = Literal["serial", "standard", "vla"]
COLLECTOR, TRAINER = "collector", "trainer"


class Window(NamedTuple):
    """Which updates of a leg are measured."""

    num_warmup: int
    num_updates: int

    @property
    def last(self) -> int:
        """Updates after which the leg ends."""
        return self.num_warmup + self.num_updates


@dataclass(frozen=True)
class Memory:
    """Memory of a leg, in bytes: the most of this process and the GPU, and the workers' share at the end, or 0."""

    process_bytes: int
    workers_bytes: int
    gpu_bytes: int


@dataclass(frozen=True)
class Leg:
    """One run of one buffer type.

    Attributes:
        mode: `serial` is `standard` with one group of environments: nothing overlaps at all.
        window: Which updates were measured.
        seconds: From the end of the last warm-up update to the end of the last update.
        samples: Seconds by name, in the window. Of each chunk and call of a group: `chunk`, `inference`. Of each
            rollout: `collect`, `env` (any simulator at work), `policy` (the sum of its calls). Of each update:
            `update`, `publish`, `trainer` (whatever is no waiting), `wait_data`, `period`. Of each slot: `wait_slot`.
        collect_s: [R] of every rollout from the first one on.
        trainer_s: [R] of every update from the first one on.
        bubbles: Share of the window in which trainer, collector and simulators had nothing to do.
        counts: Decisions in the window: `fresh`, `reused`, `dropped`.
        lags: Policy lag -> updates in the window.
        memory: The most that it needed.
        spans: All that was traced, for the picture.
        start_s: Beginning of the window, on the spans' clock.
    """

    mode: Mode
    window: Window
    seconds: float
    samples: dict[str, list[float]]
    collect_s: list[float]
    trainer_s: list[float]
    bubbles: dict[str, float]
    counts: dict[str, int]
    lags: dict[int, int]
    memory: Memory
    spans: list[Span]
    start_s: float

    @property
    def decision_s(self) -> float:
        """Seconds per fresh decision."""
        return self.seconds / self.counts["fresh"]


def read_leg(mode: Mode, window: Window, spans: list[Span], rows: Sequence[dict[str, Any]], memory: Memory) -> Leg:
    """Return what a leg showed.

    Args:
        mode: How it ran.
        window: Which updates count.
        spans: Its trace, by their start.
        rows: Its metrics, a row per update.
        memory: The most that it needed.
    """
    named = _by_name(spans)
    ends = [span.end_s for span in named["publish"]]
    start_s, end_s = ends[window.num_warmup - 1], ends[window.last - 1]
    trainer_s = _trainer_seconds(named["wait_data"], ends)
    collects = [span for span in named["collect"] if span.end_s <= end_s]
    simulations = [span for span in spans if span.lane not in (COLLECTOR, TRAINER)]
    updates = slice(window.num_warmup, window.last)
    per_update = {
        name: [span.duration_s for span in named[name][updates]] for name in ("update", "publish", "wait_data")
    }
    per_update |= {
        "trainer": trainer_s[updates],
        "period": [b - a for a, b in pairwise(ends[updates.start - 1 : updates.stop])],
    }
    return Leg(
        mode=mode,
        window=window,
        seconds=end_s - start_s,
        samples=per_update | _collecting(window, collects, named, simulations),
        collect_s=[span.duration_s for span in named["collect"][: window.last]],
        trainer_s=trainer_s[: window.last],
        bubbles={
            "trainer": sum(per_update["wait_data"]) / (end_s - start_s),
            "collector": 1 - _share(named["collect"], start_s, end_s),
            "simulators": 1 - _share(simulations, start_s, end_s),
        },
        counts=_counts(rows[window.num_warmup - 1], rows[window.last - 1]),
        lags=dict(sorted(Counter(round(row["staleness/policy_lag_mean"]) for row in rows[updates]).items())),
        memory=memory,
        spans=spans,
        start_s=start_s,
    )


def _by_name(spans: Iterable[Span]) -> dict[str, list[Span]]:
    named: dict[str, list[Span]] = {
        name: []
        for name in ("collect", "inference", "env_step", "wait_slot", "update", "publish", "wait_data", "chunk")
    }
    for span in spans:
        named[span.name].append(span)
    return named


def _trainer_seconds(waits: Sequence[Span], ends: Sequence[float]) -> list[float]:
    """Return each update's part of the trainer's time that is no waiting: publishing and logging included."""
    first = ends[0] - waits[0].end_s
    return [first] + [
        end - before - wait.duration_s for (before, end), wait in zip(pairwise(ends), waits[1:], strict=False)
    ]


def _collecting(
    window: Window, collects: Sequence[Span], named: dict[str, list[Span]], simulations: Sequence[Span]
) -> dict[str, list[float]]:
    """Return the samples of the rollouts that were collected whole before the window's end, warm-up left out."""
    samples: dict[str, list[float]] = {name: [] for name in ("chunk", "inference", "collect", "env", "policy")}
    chunks_of = _by_rollout(simulations)
    for rollout, collect in enumerate(collects):
        if rollout < window.num_warmup:
            continue
        calls = [span.duration_s for span in named["inference"] if collect.start_s <= span.start_s <= collect.end_s]
        chunks = chunks_of.get(rollout, {})
        samples["collect"].append(collect.duration_s)
        samples["inference"] += calls
        samples["policy"].append(sum(calls))
        samples["chunk"] += [
            max(span.end_s for span in chunk) - min(span.start_s for span in chunk) for chunk in chunks.values()
        ]
        samples["env"].append(union_seconds(span for chunk in chunks.values() for span in chunk))
    start_s, end_s = collects[0].start_s, collects[-1].end_s
    if window.num_warmup < len(collects):
        start_s = collects[window.num_warmup].start_s
    samples["wait_slot"] = [span.duration_s for span in named["wait_slot"] if start_s <= span.end_s <= end_s]
    return samples


def _by_rollout(simulations: Iterable[Span]) -> dict[int, dict[tuple[int, int], list[Span]]]:
    """Return rollout -> (decision, group) -> what each worker did for it."""
    found: dict[int, dict[tuple[int, int], list[Span]]] = {}
    for span in simulations:
        numbers = span.numbers
        chunks = found.setdefault(numbers["rollout"], {})
        chunks.setdefault((numbers["step"], numbers["group"]), []).append(span)
    return found


def _share(spans: Iterable[Span], start_s: float, end_s: float) -> float:
    clipped = [
        span._replace(start_s=max(span.start_s, start_s), end_s=min(span.end_s, end_s))
        for span in spans
        if span.end_s > start_s and span.start_s < end_s
    ]
    return union_seconds(clipped) / (end_s - start_s)


def _counts(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    """Return decisions by fate, from counters that only rise.

    The trainer counts what it trains on, the ring each of its rollouts once; what is in the first and not in the
    second was trained on twice.
    """
    trained, returned, dropped = (
        int(after[name] - before[name]) for name in ("decisions", "buffer/trained", "buffer/dropped")
    )
    return {"fresh": returned, "reused": trained - returned, "dropped": dropped}


def pool(legs: Iterable[Leg], name: str) -> list[float]:
    """Return all samples of a name."""
    return [sample for leg in legs for sample in leg.samples[name]]


def stage_times(serial: Sequence[Leg], others: Sequence[Leg]) -> StageTimes:
    """Return the mean stage times of a rollout.

    Args:
        serial: Where simulators and policy work alone, on all environments.
        others: Where they work by groups.
    """
    return StageTimes(
        env_s=mean(pool(serial, "env")),
        inference_s=mean(pool(serial, "policy")),
        group_inference_s=mean(pool(others, "policy")),
        collect_s=mean(pool(others, "collect")),
        update_s=mean(pool(others, "trainer")),
    )
