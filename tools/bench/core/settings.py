"""The settings of `tools.bench.core` and the comparison of steps: how long parts measure, on what they depend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from asyncflow.config.task_table import MEASURED
from tools.bench.common.records import PartSettings


@dataclass(frozen=True)
class Settings(PartSettings):
    """What is measured, and how long.

    Attributes:
        num_writes: Rows written into the ring.
        repeats: Of the workers' turns, there and back.
        block_s: Seconds of such a turn.
        tasks: Whose steps are compared.
        blocks: Of each way to step.
        steps: Environment steps of a block.
        seed: Decides actions and the simulators' constants.
    """

    num_writes: int = 10_000
    repeats: int = 4
    block_s: float = 6.0
    tasks: tuple[str, ...] = tuple(MEASURED)
    blocks: int = 20
    steps: int = 100
    seed: int = 0

    DEPENDS: ClassVar = {
        "workers": ("repeats", "block_s", "seed"),
        "processes": ("seed",),
        "ring": ("num_writes",),
        "tasks": ("tasks", "blocks", "steps", "seed"),
    }
