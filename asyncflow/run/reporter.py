"""Reporter: who watches a trainer, and who watches a run with a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from asyncflow.config.sections import Config
from asyncflow.run.evaluate import EvalResult

Row = dict[str, float]  # metrics of one update


class Reporter(Protocol):
    """Watches a trainer."""

    def update(self, row: Row) -> None:
        """An update was finished; `row` holds its metrics by the names of `docs/metrics.md`."""

    def notice(self, text: str) -> None:
        """Something was survived, or was not as expected."""


class RunReporter(Reporter, Protocol):
    """Watches a run with a folder."""

    def start(self, config: Config, run_dir: Path, ring_bytes: int, device: str) -> None:
        """Everything is planned, nothing large is allocated yet."""

    def evaluation(self, updates: int, result: EvalResult) -> None:
        """An evaluation was finished."""

    def end(self, run_dir: Path, checkpoint: Path, row: Row, is_stopped: bool) -> None:
        """The run is over and saved; `row` is that of its last update."""
