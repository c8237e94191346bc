"""A run that is cut at random points of its life, start-up and saving included, each time followed by a resume."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from asyncflow.run.checkpoint import list_checkpoints
from tools.stress.process import Command, check_rows, find_differences, find_left_behind, read_rows
from tools.stress.report import Checks, Row

NUM_UPDATES = 30
_RUN = (
    "--task", "Toy", "--logger", "none", "env.num_envs=4", "buffer.buffer_size=32", "buffer.max_policy_lag=1",
    "policy.kind=flow", "policy.log_prob=joint_mean", "policy.noise_method=flow_sde", "policy.hidden_sizes=[32]",
    "policy.critic_hidden_sizes=[32]", "algorithm.update_epochs=2", "algorithm.lr_schedule=linear",
    "trainer.save_interval=2", "trainer.eval_interval=6", "trainer.eval_episodes=4",
    "trainer.device=cpu", f"trainer.total_updates={NUM_UPDATES}",
)  # fmt: skip
_INFERENCE_S = 0.012  # so that a cut meets every stage
_FINISHED = "the run is finished"
_NOTHING_YET = ("nothing to go on from", "holds no run")
_STOPPED = {130, -signal.SIGINT, -signal.SIGTERM}  # the negative ones before Python has come to the handler


@dataclass(frozen=True)
class Cut:
    """One point: during start-up, training or the writing of a checkpoint; `after_s` counts from there."""

    stage: str
    after_s: float
    number: signal.Signals

    @classmethod
    def draw(cls, draws: random.Random, index: int, start_s: float) -> Cut:
        """Draw a point; `start_s` is what a start takes up to the first update. Every fifth is a gentle signal."""
        stage = draws.choices(("start", "training", "saving"), (0.3, 0.5, 0.2))[0]
        after_s = draws.random() * (start_s if stage == "start" else 1.5)
        gentle = draws.choice((signal.SIGINT, signal.SIGTERM))
        return cls(stage, after_s, gentle if index % 5 == 4 else signal.SIGKILL)

    def apply(self, command: Command, folder: Path) -> None:
        """Wait for the point and send the signal."""
        if self.stage != "start":
            command.wait_for(lambda each: each.num_updates >= 1, timeout_s=120)
        time.sleep(self.after_s)
        if self.stage == "saving":
            _wait_for_saving(folder)
        command.send(self.number)


def _wait_for_saving(folder: Path) -> None:
    """Wait until a checkpoint is being written; a second at most."""
    end = time.monotonic() + 1
    while time.monotonic() < end and not any((folder / "checkpoints").glob(".*.tmp")):
        time.sleep(0.0005)


@dataclass
class Lane:
    """One run after another in a folder of its own, cut again and again."""

    folder: Path
    uncut: Path
    start_s: float
    num_recomputed: int = 0
    num_finished: int = 0
    num_anew: int = 0
    left: tuple[int, int] = (0, 0)  # rows and newest checkpoint after the last cut
    counts: Counter[str] = field(default_factory=Counter)
    checks: Checks = field(default_factory=Checks)

    def cut_often(self, cuts: list[Cut]) -> None:
        """Cut at all points, then let the run end; stop early where too much has failed."""
        command = self.launch()
        for cut in cuts:
            while not self.cut(command, cut) and not self.checks.is_full:
                command = self.launch()
            command = self.launch()
        while not self._judge_end(command, command.finish()):
            command = self.launch()

    def launch(self) -> Command:
        """Go on with the run, or begin it where there is none."""
        if (self.folder / "config.yaml").exists():
            return Command("train", "--resume", str(self.folder), inference_s=_INFERENCE_S)
        shutil.rmtree(self.folder, ignore_errors=True)
        return Command("train", *_RUN, "--out", str(self.folder), inference_s=_INFERENCE_S)

    def cut(self, command: Command, cut: Cut) -> bool:
        """Cut a command, and see to the run if it ended before; tell which of them."""
        cut.apply(command, self.folder)
        code = command.finish()
        if code >= 0 and code != 130:
            self._judge_end(command, code)
            return False
        self.counts[f"{cut.number.name} in {cut.stage}"] += 1
        self._check_cut(cut, code)
        left = find_left_behind(command)
        self.checks.expect(not left, f"{len(left)} processes are left")
        return True

    def _check_cut(self, cut: Cut, code: int) -> None:
        num_lost = self._count_lost()
        self.num_recomputed += num_lost
        if cut.number is not signal.SIGKILL:
            self.checks.expect(code in _STOPPED, f"exit code {code} after {cut.number.name}")
            self.checks.expect(code != 130 or not num_lost, f"{num_lost} updates lost by {cut.number.name}")

    def _count_lost(self) -> int:
        """Return the updates that are not in a checkpoint; a cut in start-up leaves what the cut before it left."""
        saved = list_checkpoints(self.folder)
        left = len(read_rows(self.folder)), int(saved[-1].name.removeprefix("update_")) if saved else 0
        is_old, self.left = left == self.left, left
        return 0 if is_old else max(0, left[0] - left[1])

    def _judge_end(self, command: Command, code: int) -> bool:
        """Check a run that has ended by itself, and remove it; false if there was nothing to go on from."""
        output = "".join(command.lines)
        has_nothing = code == 2 and any(reason in output for reason in _NOTHING_YET)
        self.num_anew += has_nothing
        if code == 0 or (code == 2 and _FINISHED in output):
            self.num_finished += 1
            check_rows(self.folder, NUM_UPDATES, self.checks)
            different = find_differences(self.uncut, self.folder)
            self.checks.expect(not different, f"differs from the uncut run in {different}")
        else:
            self.checks.expect(has_nothing, f"exit code {code}: {command.tail}")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.left = (0, 0)
        return not has_nothing


def run_uncut(folder: Path) -> float:
    """Train the run that all others must equal; return the seconds up to its first update."""
    start = time.monotonic()
    command = Command("train", *_RUN, "--out", str(folder), inference_s=_INFERENCE_S)
    command.wait_for(lambda each: each.num_updates >= 1, timeout_s=120)
    start_s = time.monotonic() - start
    command.finish()
    return start_s


def draw_cuts(num_cuts: int, seed: int, start_s: float) -> list[Cut]:
    """Return seeded points."""
    draws = random.Random(seed)
    return [Cut.draw(draws, index, start_s) for index in range(num_cuts)]


def report_cuts(lanes: list[Lane]) -> list[Row]:
    """Return the rows of all lanes together."""
    counts = sum((lane.counts for lane in lanes), Counter())
    num_finished = sum(lane.num_finished for lane in lanes)
    num_recomputed = sum(lane.num_recomputed for lane in lanes)
    num_anew = sum(lane.num_anew for lane in lanes)
    failures = tuple(failure for lane in lanes for failure in lane.checks.failures)
    if not num_finished:
        failures += ("no run came to its end",)
    stages = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return [
        Row(
            f"run cut and resumed: {stages}",
            sum(counts.values()),
            f"{num_recomputed} updates, computed again; {num_anew} runs without a checkpoint yet, started anew",
            f"{num_finished} runs came to their end, each equal to the uncut one bit for bit; every update once",
            failures,
        )
    ]
