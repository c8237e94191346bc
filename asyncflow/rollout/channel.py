"""Channel: what connects the collector with the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field

from asyncflow.metrics.timing import OverlapClock
from asyncflow.metrics.tracing import Tracer
from asyncflow.rollout.ring import RolloutRing
from asyncflow.rollout.weights import WeightPublisher


@dataclass(frozen=True)
class Channel:
    """The objects that collector and trainer share: ring, weights, and the clock of who did what when."""

    buffer: RolloutRing
    publisher: WeightPublisher
    clock: OverlapClock
    tracer: Tracer = field(default_factory=Tracer)
