"""Progress: how far a run is, as a checkpoint stores it.

It holds the three clocks and what is counted beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from asyncflow.config.contracts import check_count
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.errors import ConfigError
from asyncflow.metrics.glossary import is_known
from asyncflow.rollout.episodes import Episode, split_by_start
from asyncflow.rollout.ring import Rollout
from asyncflow.run.state import Books, RunState

_PLAIN = (
    "env_steps",
    "decisions",
    "updates",
    "next_rollout",
    "best_success",
    "best_update",
)  # the same in a `RunState`


@dataclass(frozen=True)
class Limits:
    """Limits of training; the first one reached ends it, None is no limit. Both count from the beginning of the run."""

    total_updates: int | None = None
    total_env_steps: int | None = None


@dataclass
class Progress:
    """A run's counters, between two updates. The three clocks are never mixed.

    Attributes:
        env_steps: Executed simulator steps of all trained decisions.
        decisions: Trained decisions.
        updates: Updates, which is the version of the weights.
        next_rollout: Number of the rollout that the next update trains on, or a later one.
        faults: How many of each kind were survived.
        best_success: Score of the best evaluation after an update that was saved: its success rate, or its mean return
            where nothing is a success; -1 before the first.
        best_update: That update; 0 before the first.
        episodes: Those that ended and are not counted in a row yet: others that began with them may be open still.
        journal: What rebuilds the episodes that are open where the next rollout begins; None at the beginning.
    """

    env_steps: int = 0
    decisions: int = 0
    updates: int = 0
    next_rollout: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    best_success: float = -1.0
    best_update: int = 0
    episodes: list[Episode] = field(default_factory=list, repr=False)
    journal: EpisodeJournal | None = field(default=None, repr=False)  # pages of actions

    @classmethod
    def from_state(cls, state: RunState, journal: EpisodeJournal | None) -> Progress:
        """Return how far the run was that stored a state, and beside it the journal."""
        plain = {name: getattr(state, name) for name in _PLAIN}
        return cls(**plain, faults=Counter(state.faults), episodes=list(state.episodes), journal=journal)

    def to_state(
        self, books: Mapping[str, int], num_nonfinite_steps: int, is_evaluation_owed: bool, row: dict[str, float]
    ) -> RunState:
        """Return what a checkpoint stores, but for the journal.

        Args:
            books: The buffer's `settled_books`.
            num_nonfinite_steps: Minibatches that PPO skipped.
            is_evaluation_owed: Whether the evaluation of this update is still due.
            row: The last row of metrics; a callback's own numbers in it are not stored.
        """
        return RunState(
            **{name: getattr(self, name) for name in _PLAIN},
            faults=dict(self.faults),
            books=Books(**books),
            num_nonfinite_steps=num_nonfinite_steps,
            is_evaluation_owed=is_evaluation_owed,
            row={name: value for name, value in row.items() if is_known(name)},
            episodes=list(self.episodes),
        )

    @property
    def clocks(self) -> dict[str, int]:
        """The three clocks by their metric names."""
        return {"env_steps": self.env_steps, "decisions": self.decisions, "updates": self.updates}

    def advance(self, rollout: Rollout) -> None:
        """Move to the boundary after the update on `rollout`; nothing in it can fail."""
        valid = rollout.data["valid"]
        self.updates += 1
        self.decisions += int(valid.sum())  # sync: the update's metrics were just fetched
        self.env_steps += int((rollout.data["executed"] * valid).sum())  # sync: likewise
        self.next_rollout = rollout.index + 1
        self.journal = rollout.info.journal
        self.faults.update(fault.kind for fault in rollout.info.faults)

    def take_episodes(self, ended: Iterable[Episode], end: int) -> list[Episode]:
        """Take over episodes that ended, and return those that began before decision `end`, which count now."""
        counted, self.episodes = split_by_start([*self.episodes, *ended], end)
        return counted

    def fault_metrics(self) -> dict[str, float]:
        """Return the `health/` counts of what was survived."""
        restarts = self.faults["died"] + self.faults["raised"] + self.faults["timeout"]
        return {
            "health/worker_restarts": float(restarts),
            "health/env_timeouts": float(self.faults["timeout"]),
            "health/nonfinite_episodes": float(self.faults["nonfinite"]),
        }

    def is_best(self, score: float) -> bool:
        """Tell whether an evaluation of this update beats all before."""
        return self.updates > 0 and (not self.best_update or score > self.best_success)

    def limits_after(self, total_updates: int | None, total_env_steps: int | None) -> Limits:
        """Return the limits that lie so many updates or env steps ahead.

        Raises:
            ConfigError: Neither is given, or one is no whole number or below 1.
        """
        given = {"total_updates": total_updates, "total_env_steps": total_env_steps}
        if all(value is None for value in given.values()):
            raise ConfigError("train() needs total_updates or total_env_steps")
        done = {"total_updates": self.updates, "total_env_steps": self.env_steps}
        return Limits(
            **{name: done[name] + check_count("train", name, n) for name, n in given.items() if n is not None}
        )

    def is_at_end(self, limits: Limits) -> bool:
        """Tell whether a limit of the run is reached."""
        return (limits.total_updates is not None and self.updates >= limits.total_updates) or (
            limits.total_env_steps is not None and self.env_steps >= limits.total_env_steps
        )
