"""The stress suite's common parts: failed checks, rows of the table, and the page."""

from __future__ import annotations

from dataclasses import dataclass, field

from tools.bench.common.pages import Page
from tools.bench.common.report import (
    Finding,
    describe_command,
    describe_machine,
    describe_setting,
    describe_software,
    to_table,
)

GUARANTEES = """
## What is guaranteed, and its limits
**Weights.** The collector's copy of the weights is never half-written. It is the version that was asked for, or the
newest one where that was asked for. One thread publishes and one leases. The race was run on the CPU, where locks order
the copies; on a GPU, CUDA events do.

**The ring.** Every rollout is handed over in order, once and whole. Counted in decisions,
`collected = trained + in_flight + dropped + invalid` holds at every release. With `on_full: overwrite`, finished
rollouts are dropped on purpose and counted. A rollout in training is never touched.

**Policy lag.** Whatever the delays in both stages, fixed lag is exact and bounded lag never exceeds its bound.

**Workers.** A worker that dies, stops or raises is replaced, and the run goes on. A number that is not finite never
reaches the ring.
- What is lost are the open episodes of that worker's environments, or the one episode with the bad number. Their
  decisions in the rollout being collected are marked invalid and not trained on. Their decisions in earlier rollouts
  were trained on and stay so.
- A run ends when workers are replaced more than `env.max_restarts` times within `env.restart_window_s`. Each worker
  that hangs costs `env.step_timeout_s`.
- The moment at which a worker dies decides what is lost, so such a run cannot be repeated.

**A failed collector.** The run ends with exit code 1 and saves the state after the newest update. The rollout under way
is lost; `--resume` collects it again.

**A full disk.** Training goes on. A checkpoint that cannot be written is reported and tried again at the next save. The
checkpoint before it can still be loaded. If the disk is still full when the run ends, the exit code is 1, and
`--resume` goes on from the newest checkpoint.

**Cuts.** SIGINT and SIGTERM save the state after the newest update and lose no finished update. SIGKILL loses the
updates since the newest checkpoint (`trainer.save_interval`). On resume they are computed again. With fixed lag and
simulators that do not fail they come out the same, so that the finished run equals an uncut one, bit for bit. A run
that is killed before its first checkpoint begins again at update 0 when it is resumed. SIGKILL ends processes, not the
machine: loss of power was not tried.
"""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        injected: What was done to the program.
        times: How often.
        lost: What was lost by it, as counted.
        held: What was checked.
        failures: Checks that failed, a line each.
    """

    injected: str
    times: int
    lost: str
    held: str
    failures: tuple[str, ...] = ()

    def to_markdown(self) -> str:
        """Return the row."""
        return "| " + " | ".join(cell.replace("|", "/") for cell in self.cells) + " |"

    @property
    def cells(self) -> list[str]:
        """What the page says; a check that failed stands beside its verdict."""
        verdict = ": ".join([self.finding.verdict, *["; ".join(self.failures)] * bool(self.failures)])
        return [self.injected, f"{self.times:,}", self.lost, self.held, verdict]

    @property
    def finding(self) -> Finding:
        """The row as other checks have it."""
        return Finding(self.injected, self.lost, self.held, not self.failures)


@dataclass
class Checks:
    """Collects failed checks, so that one does not hide the next."""

    failures: list[str] = field(default_factory=list)

    @property
    def is_full(self) -> bool:
        """Whether no more are noted: a broken loop would fail thousands of times."""
        return len(self.failures) >= 5

    def expect(self, is_true: bool, otherwise: str) -> None:
        """Note `otherwise` unless the check holds."""
        if not is_true and not self.is_full:
            self.failures.append(otherwise)


def page(rows: list[Row], seed: int, minutes: float) -> Page:
    """Return `docs/reliability.md`."""
    num_failed = sum(bool(row.failures) for row in rows)
    verdict = "Everything held." if not num_failed else f"**This run failed: {num_failed} of {len(rows)} rows.**"
    setting = describe_setting(describe_machine(), describe_software())
    head = ["what was injected", "how often", "what was lost", "what was checked", "held"]
    return Page(
        "Reliability",
        introduction=f"What the stress suite (`make stress`) injected, what was lost, and what held. {verdict}\n"
        "The page is written by the suite itself.",
        setting=f"{setting}- Command: `{describe_command()}`, seed {seed}, {minutes:.1f} minutes",
        sections=[to_table(head, [row.cells for row in rows]), GUARANTEES],
    )
