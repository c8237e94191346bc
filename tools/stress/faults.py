"""Runs with faults: workers killed and stopped, numbers poisoned, simulators and the collector raising, delays.

Every fault that the run reports must be one that was injected, and the other way round.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.stress.process import (
    Command,
    check_rows,
    find_differences,
    find_left_behind,
    find_workers,
    read_faults,
    read_rows,
    shared_memory,
)
from tools.stress.report import Checks, Row

SMALL_RUN = (
    "--task", "Toy", "--logger", "none", "env.num_envs=4", "env.num_workers=2", "buffer.buffer_size=32",
    "policy.kind=flow", "policy.log_prob=joint_mean", "policy.noise_method=flow_sde", "policy.hidden_sizes=[32]",
    "policy.critic_hidden_sizes=[32]", "algorithm.update_epochs=2", "trainer.eval_interval=0", "trainer.device=cpu",
    "env.max_restarts=1000",
)  # fmt: skip
_STANDARD = ("--buffer-type", "standard", "buffer.max_policy_lag=1")
_UPDATES_BETWEEN = 6  # updates from one signal to the next, and from the last one to the end
_STOP_TIMEOUT_S = 5
_SEEDED = {"nonfinite": "observation NaN or reward infinite", "raised": "simulator raises"}


@dataclass(frozen=True)
class Signals:
    """Signals to workers: which, how often, and what the run calls what follows."""

    number: signal.Signals
    times: int
    fault: str
    overrides: tuple[str, ...] = ()

    @property
    def num_updates(self) -> int:
        """Updates that the run needs."""
        return _UPDATES_BETWEEN * (self.times + 2)

    def inject(self, command: Command, seed: int) -> None:
        """Send them, each to a worker and at a moment that the seed decides.

        Every third SIGKILL follows the one before at once, so that it also meets workers that are just starting.
        """
        draws, hit = random.Random(seed), set[int]()
        for index in range(self.times):
            is_at_once = self.number is signal.SIGKILL and index % 3 == 2
            if not is_at_once and not command.wait_for_updates(1 + _UPDATES_BETWEEN * index):
                return  # the run ended; its checks will say so
            time.sleep(draws.random() * (2.0 if is_at_once else 0.3))
            workers = [pid for pid in find_workers(command.pid) if pid not in hit]
            if workers:
                worker = draws.choice(workers)
                hit.add(worker)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, self.number)


@dataclass
class Trial:
    """One run with faults, and what is checked of it.

    Attributes:
        folder: Where its folder and its log lie. A program `python` there is the interpreter that simulates.
        name: Of both.
        plan: What goes wrong inside, without its log.
        arguments: Of the command line, besides `SMALL_RUN`.
        num_updates: Its length.
        seed: Of all that is drawn.
        checks: What did not hold.
    """

    folder: Path
    name: str
    num_updates: int
    plan: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    seed: int = 0
    checks: Checks = field(default_factory=Checks)

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / self.name

    def injected(self, kind: str) -> list[str]:
        """Return the lines of the log that begin with a word."""
        log = self.folder / f"{self.name}.log"
        return [line for line in log.read_text().splitlines() if line.split()[0] == kind] if log.exists() else []

    def start(self, **changes: Any) -> Command:
        """Start the command."""
        length, python = f"trainer.total_updates={self.num_updates}", self.folder / "python"
        elsewhere = (f"env.python={python}",) if python.exists() else ()
        return self._command(("--out", str(self.run), *SMALL_RUN, length, *elsewhere, *self.arguments), changes)

    def resume(self, **changes: Any) -> Command:
        """Start a command that goes on with the run."""
        return self._command(("--resume", str(self.run)), changes)

    def _command(self, arguments: tuple[str, ...], changes: dict[str, Any]) -> Command:
        log = {"log": str(self.folder / f"{self.name}.log"), "seed": self.seed}
        return Command("train", *arguments, plan=self.plan | log | changes)

    def finish(self, command: Command, exit_code: int = 0) -> bool:
        """Wait for the end and check what every end must be like; tell whether the exit code is right."""
        code = command.finish()
        self.checks.expect(code == exit_code, f"{self.name}: exit code {code}, not {exit_code}: {command.tail}")
        left = find_left_behind(command)
        self.checks.expect(not left, f"{self.name}: {len(left)} processes are left")
        return code == exit_code

    def check_end(self, expected: dict[str, int] | None) -> None:
        """Check a finished run: its rows, its books, its faults where they are known, its invalid decisions."""
        check_rows(self.run, self.num_updates, self.checks)
        if expected is not None:
            found = read_faults(self.run)
            wanted = {kind: count for kind, count in expected.items() if count}
            self.checks.expect(found == wanted, f"{self.name}: faults {found}, injected {wanted}")
            counted = sum(int(line.split()[1]) for line in self.injected("invalid"))
            self.checks.expect(
                counted == self.num_lost("invalid"), f"{self.name}: {counted} decisions of the ring are invalid"
            )

    def num_lost(self, name: str) -> int:
        """Return the decisions that the run lost, `invalid` or `dropped`."""
        rows = read_rows(self.run)
        return int(rows[-1][f"buffer/{name}"]) if rows else 0

    def train(self, signals: Signals | None = None) -> bool:
        """Run from beginning to end, with signals; tell whether the exit code is right."""
        command = self.start()
        if signals is not None:
            signals.inject(command, self.seed)
        return self.finish(command)


def _row(injected: str, times: int, trials: list[Trial], held: str) -> Row:
    lost = {name: sum(trial.num_lost(name) for trial in trials) for name in ("invalid", "dropped")}
    named = "; ".join(f"{count:,} decisions, counted as {name}" for name, count in lost.items() if count)
    failures = tuple(failure for trial in trials for failure in trial.checks.failures)
    return Row(injected, times, named or "nothing", held, failures)


def kill_workers(folder: Path, times: int, seed: int) -> Row:
    """SIGKILL to workers, while they step, wait or start."""
    signals = Signals(signal.SIGKILL, times, "died")
    return _signal_workers(folder, "killed", signals, "worker killed (SIGKILL) at a random moment", seed)


def stop_workers(folder: Path, times: int, seed: int) -> Row:
    """SIGSTOP to workers: they are silent from then on."""
    signals = Signals(signal.SIGSTOP, times, "timeout", (f"env.step_timeout_s={_STOP_TIMEOUT_S}",))
    what = f"worker stopped (SIGSTOP), env.step_timeout_s = {_STOP_TIMEOUT_S}"
    return _signal_workers(folder, "stopped", signals, what, seed)


def _signal_workers(folder: Path, name: str, signals: Signals, what: str, seed: int) -> Row:
    plan = {"inference_s": 0.01}
    trial = Trial(folder, name, signals.num_updates, plan, signals.overrides, seed)
    if trial.train(signals):
        trial.check_end({signals.fault: signals.times})
    return _row(what, signals.times, [trial], "the run ends; as many replaced as hit; finite; books; no process left")


def poison(folder: Path, num_updates: int, seed: int) -> Row:
    """Observations and rewards that are not finite; both buffer types must end equal."""
    plan = {"poison": 0.01}
    return _compare_modes(folder, "nonfinite", plan, num_updates, seed)


def raise_in_simulators(folder: Path, num_updates: int, seed: int) -> Row:
    """Simulators that raise; both buffer types must end equal."""
    return _compare_modes(folder, "raised", {"raising": 0.002}, num_updates, seed)


def _compare_modes(folder: Path, kind: str, plan: dict[str, float], num_updates: int, seed: int) -> Row:
    """Run with faults that follow from episodes alone, with both buffer types."""
    trials = [Trial(folder, f"{kind}_vla", num_updates, plan, seed=seed)]
    trials += [Trial(folder, f"{kind}_standard", num_updates, plan, _STANDARD, seed)]
    if all(trial.train() for trial in trials):
        for trial in trials:
            trial.check_end({kind: len(trial.injected(kind))})
        different = find_differences(trials[0].run, trials[1].run)
        trials[0].checks.expect(not different, f"the modes differ in {different}")
    times = sum(len(trial.injected(kind)) for trial in trials)
    trials[0].checks.expect(times > 0, "nothing was injected")
    held = "the run ends; as many reported as injected; both modes (L = 1) equal bit for bit; finite; books"
    return _row(f"{_SEEDED[kind]}, at seeded env steps", times, trials, held)


def delay(folder: Path, num_updates: int, seed: int) -> Row:
    """Pauses in simulators, collector and trainer: with fixed lag they must change nothing."""
    trials = [
        Trial(folder, "undelayed", num_updates),
        Trial(folder, "delayed", num_updates, {"delay_s": 0.05, "update_delay_s": 0.1}, seed=seed),
    ]
    if all(trial.train() for trial in trials):
        for trial in trials:
            trial.check_end({})
        different = find_differences(trials[0].run, trials[1].run)
        trials[1].checks.expect(not different, f"delays changed {different}")
    held = "equal to the run without pauses, bit for bit"
    return _row("runs with random pauses in simulators, collector and trainer, L = 1", 1, trials, held)


def crash_collector(folder: Path, crashes: list[int], seed: int) -> Row:
    """An exception in the collector, then a resume: the end must be that of a run without it."""
    num_updates, trials = 10, [Trial(folder, "uncrashed", 10)]
    is_whole, lost = trials[0].train(), 0
    for index, wait in enumerate(crashes):
        arguments = _STANDARD if index % 2 else ()
        trial = Trial(folder, f"crashed_{wait}", num_updates, arguments=arguments, seed=seed)
        trials.append(trial)
        if trial.finish(trial.start(crash_at=wait), exit_code=1):
            lost += len(read_rows(trial.run)) - _newest(trial.run)
            if trial.finish(trial.resume()) and is_whole:
                trial.check_end(None)
                different = find_differences(trials[0].run, trial.run)
                trial.checks.expect(not different, f"{trial.name}: differs from the uncut run in {different}")
    trials[-1].checks.expect(not lost, f"{lost} finished updates were not saved")
    held = (
        "exit code 1, newest update saved; resumed to the end: equal to an uncut run, bit for bit (L = 1, both types)"
    )
    row = _row("the collector raises", len(crashes), trials, held)
    return Row(row.injected, row.times, "the rollout under way, collected again", row.held, row.failures)


def _newest(run: Path) -> int:
    return int((run / "checkpoints" / "last").resolve().name.removeprefix("update_"))


def mix(folder: Path, times: int, seed: int) -> Row:
    """Everything at once, with bounded lag and a ring that overwrites."""
    signals = Signals(signal.SIGKILL, times, "died")
    plan = {"poison": 0.005, "raising": 0.0005, "delay_s": 0.02, "update_delay_s": 0.4, "inference_s": 0.01}
    arguments = (
        "buffer.lag_mode=bounded", "buffer.on_full=overwrite", "buffer.max_policy_lag=2", "collector.num_env_groups=2",
    )  # fmt: skip
    trial = Trial(folder, "mixed", signals.num_updates, plan, arguments, seed)
    if trial.train(signals):
        trial.check_end(None)
        lag = max(row["staleness/policy_lag_max"] for row in read_rows(trial.run))
        trial.checks.expect(lag <= 2, f"lag {lag:g}, bound 2")
        died = read_faults(trial.run).get("died", 0)
        trial.checks.expect(died == times, f"{died} workers reported as dead, {times} killed")
    total = times + len(trial.injected("nonfinite")) + len(trial.injected("raised"))
    what = "all of these at once: kills, poison, raising, pauses; bounded lag 2, 2 groups, on_full: overwrite"
    return _row(what, total, [trial], "the run ends; every kill reported; lag within its bound; finite; books")


def bound_lag(folder: Path, num_updates: int, seed: int) -> list[Row]:
    """Lag under random pauses in both stages, fixed and bounded, L = 1 to 4."""
    return [_bound_lag(folder, mode, num_updates, seed) for mode in ("fixed", "bounded")]


def _bound_lag(folder: Path, mode: str, num_updates: int, seed: int) -> Row:
    trials, largest = [], []
    for lag in range(1, 5):
        arguments = (f"buffer.lag_mode={mode}", f"buffer.max_policy_lag={lag}")
        trial = Trial(
            folder, f"{mode}_{lag}", num_updates, {"delay_s": 0.02, "update_delay_s": 0.3}, arguments, seed + lag
        )
        trials.append(trial)
        if trial.train():
            trial.check_end({})
            lags = [int(row["staleness/policy_lag_max"]) for row in read_rows(trial.run)]
            largest.append(max(lags))
            exact = [min(n, lag) for n in range(num_updates)]
            is_right = lags == exact if mode == "fixed" else max(lags) <= lag
            trial.checks.expect(is_right, f"{mode} lag {lag}: {lags}")
    held = "lag 0, 1, ..., L, L, L exactly" if mode == "fixed" else f"lag at most L; largest seen {largest}"
    what = f"updates with random pauses in simulators, collector and trainer, {mode} lag, L = 1 to 4"
    return _row(what, 4 * num_updates, trials, held)


def check_nothing_is_left(before: set[str]) -> Row:
    """Look for shared memory that the runs with faults left behind; every run looked for processes itself."""
    left = sorted(shared_memory() - before)
    failures = (f"/dev/shm holds {left}",) if left else ()
    return Row("what all of these runs left behind", 1, "-", "nothing new in shared memory", failures)
