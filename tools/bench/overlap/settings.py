"""The settings of `tools.bench.overlap`: how long its parts measure, and on what a part depends.

Owns the settings. It must not know what a part measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from asyncflow.config.presets import load_config, parse_overrides
from tools.bench.common.records import PartSettings

NAME = "overlap"
CURVES = "emulated"  # the learning curves, a folder among the data
FINE_CURVES = "emulated_fine"  # their ends, with more episodes
TINY_LIFT = (
    "env.num_envs=4", "env.num_workers=2", "env.horizon=40", "buffer.buffer_size=32", "algorithm.num_minibatches=2",
    "trainer.total_updates=3",
)  # fmt: skip


# What a part depends on: a record is good for other settings that agree in these.
DEPENDS = {
    "balance": ("toy_inference_s", "lift_inference_s", "balance_updates", "lift_overrides"),
    "two_stages": ("toy_inference_s", "profile_arguments"),
    "three_stages": ("three_stages_s", "profile_arguments"),
    "sweep": ("sweep_repeats", "profile_arguments"),
    "overhead_toy": ("toy_blocks", "toy_window"),
    "overhead_lift": ("lift_blocks", "lift_window", "overhead_rollout", "lift_overrides"),
    "lift": ("lift_inference_s", "profile_arguments", "lift_overrides"),
    "train": ("lift_inference_s", "lift_overrides", "seeds"),
    "evaluate": ("lift_inference_s", "lift_overrides", "seeds", "curve_episodes", "final_episodes"),
    "evaluate_fine": (
        "lift_inference_s", "lift_overrides", "seeds", "fine_from", "fine_curve_episodes", "fine_final_episodes",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Settings(PartSettings):
    """How long and how much is measured; latencies are seconds that a rollout takes longer.

    Attributes:
        toy_inference_s: Emulated inference where the toy's two stages are equally long.
        three_stages_s: Each of the toy's three emulated stages.
        lift_inference_s: Emulated inference on Lift: 1.5 s are 25 ms for a decision of all environments.
        sweep_repeats: Blocks of each ratio of the sweep: of one block, a single disturbed leg would decide.
        profile_arguments: For every `asyncflow profile`; none means its defaults.
        balance_updates: Updates by which the real seconds of a stage are measured.
        toy_blocks: Times off, on, on, off, of each of two runs of the toy.
        lift_blocks: The same of Lift.
        toy_window: Updates of the toy with recording on, or off.
        lift_window: The same of Lift.
        overhead_rollout: Decisions of Lift's rollouts there: half a second instead of five, so that turns are short.
        lift_overrides: Keys of every run of Lift, of its training too.
        seeds: Of the training.
        curve_episodes: Episodes of every checkpoint but the last one.
        final_episodes: Episodes of the last one.
        fine_from: Checkpoint from which on the ends of the curves are evaluated once more, with more episodes.
        fine_curve_episodes: As `curve_episodes`, of these.
        fine_final_episodes: As `final_episodes`, of these.
    """

    toy_inference_s: float = 1.5
    three_stages_s: float = 1.5
    lift_inference_s: float = 1.5
    sweep_repeats: int = 3
    profile_arguments: tuple[str, ...] = ()
    balance_updates: int = 15
    toy_blocks: int = 48
    lift_blocks: int = 48
    toy_window: int = 8
    lift_window: int = 3
    overhead_rollout: int = 96
    lift_overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    curve_episodes: int = 100
    final_episodes: int = 200
    fine_from: int = 24
    fine_curve_episodes: int = 200
    fine_final_episodes: int = 1000

    DEPENDS: ClassVar = DEPENDS
    UNTIMED: ClassVar = frozenset({"evaluate", "evaluate_fine"})

    def inference_s(self, task: str) -> float:
        """Return the emulated inference of a rollout where collecting and training are equally long."""
        return self.toy_inference_s if task == "Toy" else self.lift_inference_s

    def overrides(self, task: str) -> tuple[str, ...]:
        """Return the keys that every run of a task has."""
        return () if task == "Toy" else self.lift_overrides

    def load(self, task: str, changes: Mapping[str, Any] | None = None) -> Any:
        """Return a task's preset with its keys of every run, and changes on top."""
        return load_config(task.lower(), parse_overrides(list(self.overrides(task))) | dict(changes or {}))


FULL = Settings()
TINY = replace(
    FULL,
    toy_inference_s=0.2,
    three_stages_s=0.2,
    lift_inference_s=0.3,
    sweep_repeats=1,
    profile_arguments=("--num-repeats", "1", "--num-updates", "2"),
    balance_updates=2,
    toy_blocks=2,
    lift_blocks=2,
    toy_window=2,
    lift_window=1,
    overhead_rollout=32,
    lift_overrides=TINY_LIFT,
    curve_episodes=4,
    final_episodes=8,
    fine_from=2,
    fine_curve_episodes=6,
    fine_final_episodes=12,
)
