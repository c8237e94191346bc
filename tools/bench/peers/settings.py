"""The settings of `tools.bench.peers`: how long its parts measure, and on what a part depends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tools.bench.common.records import PartSettings


@dataclass(frozen=True)
class Settings(PartSettings):
    """How much is measured.

    Attributes:
        turns: Of the large rollout's update; five times as many of the small one's.
        repeats: Runs of each contender, end to end.
        updates: Measured in such a run.
        rollout: Decisions of its rollouts.
    """

    turns: int = 6
    repeats: int = 2
    updates: int = 4
    rollout: int = 480

    DEPENDS: ClassVar = {"update": ("turns",), "end_to_end": ("repeats", "updates", "rollout")}
