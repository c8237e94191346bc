"""A run whose disk becomes full in the middle: it goes on, reports, and saves when there is room again.

The disk is a small image in memory (tmpfs). Where mounting is not permitted, a limit on the size of every file that
the process writes stands for it, and the table says so.
"""

from __future__ import annotations

import os
import resource
import subprocess
import time
from abc import ABC, abstractmethod
from contextlib import closing, suppress
from pathlib import Path

from asyncflow.errors import CheckpointError
from asyncflow.run.checkpoint import list_checkpoints, load_checkpoint
from tools.stress.process import Command, check_rows, find_differences
from tools.stress.report import Checks, Row

NUM_UPDATES, SAVE_INTERVAL = 40, 3
_SIZE_MIB = 4
_RUN = (
    "--task", "Toy", "--logger", "none", "env.num_envs=4", "buffer.buffer_size=32", "policy.hidden_sizes=[32]",
    "policy.critic_hidden_sizes=[32]", "algorithm.update_epochs=2",
    "trainer.eval_interval=0", f"trainer.save_interval={SAVE_INTERVAL}", "trainer.keep_last=2", "trainer.device=cpu",
    f"trainer.total_updates={NUM_UPDATES}",
)  # fmt: skip
_INFERENCE_S = 0.02  # so that a rollout takes a while
_REPORT = "could not be written"


class Disk(ABC):
    """A disk that can be filled and freed while a command writes to it."""

    name: str

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def fill(self, command: Command) -> None:
        """Leave no room."""

    @abstractmethod
    def free(self, command: Command) -> None:
        """Make room again."""

    @abstractmethod
    def close(self) -> None:
        """Remove it."""


class ImageDisk(Disk):
    """A file system of a few MiB, mounted at the folder; needs root."""

    name = f"a {_SIZE_MIB} MiB disk image (tmpfs)"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        folder.mkdir(parents=True)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={_SIZE_MIB}m", "tmpfs", str(folder)], check=True, capture_output=True
        )

    def fill(self, command: Command) -> None:
        """Write a file until the system refuses the next byte."""
        with (self.folder / "filler").open("wb", buffering=0) as file:
            for size in (1 << 16, 1):
                with suppress(OSError):
                    while True:
                        file.write(b"\0" * size)

    def free(self, command: Command) -> None:
        """Remove that file."""
        (self.folder / "filler").unlink()

    def close(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", str(self.folder)], check=True, capture_output=True)


class LimitedDisk(Disk):
    """No file of the process may grow beyond 64 bytes while the disk is full."""

    name = "a limit on file sizes in place of a disk image (mounting is not permitted here)"

    def fill(self, command: Command) -> None:
        """Lower the soft limit."""
        resource.prlimit(command.pid, resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))

    def free(self, command: Command) -> None:
        """Lift it."""
        resource.prlimit(command.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def close(self) -> None:
        """Nothing was mounted."""


def make_disk(folder: Path) -> Disk:
    """Return a disk image where one can be mounted."""
    try:
        return ImageDisk(folder)
    except (OSError, subprocess.CalledProcessError):
        return LimitedDisk(folder)


def fill_disk(folder: Path) -> list[Row]:
    """Fill the disk for a while, and in another run until its end, which is resumed."""
    folder.mkdir(parents=True)
    uncut, checks = folder / "uncut", Checks()
    checks.expect(
        Command("train", *_RUN, "--out", str(uncut), inference_s=_INFERENCE_S).finish() == 0, "the uncut run failed"
    )
    return [_fill_for_a_while(folder, uncut), _fill_to_the_end(folder, uncut, checks)]


def _fill_for_a_while(folder: Path, uncut: Path) -> Row:
    checks = Checks()
    with closing(make_disk(folder / "for_a_while")) as disk:
        run = disk.folder / "run"
        command = Command("train", *_RUN, "--out", str(run), inference_s=_INFERENCE_S)
        before = _fill_after(disk, command, run, checks)
        checks.expect(_wait_for_reports(command, 2), "a checkpoint that could not be written was not reported")
        checks.expect(_is_loadable(run, before), f"{before} is not loadable on the full disk")
        disk.free(command)
        command.wait_for_updates(min(NUM_UPDATES, command.num_updates + SAVE_INTERVAL + 2))
        checks.expect(_newest(run) != before, "the next checkpoint was not written")
        _check_end(command, run, uncut, checks)
    held = "the run goes on, reports each, writes the next checkpoint; the one before loads; rows complete; equal"
    lost = f"{_num_reports(command)} checkpoints, reported; made up for by the next"
    return Row(f"disk full for a while during training: {disk.name}", 1, lost, held, tuple(checks.failures))


def _fill_to_the_end(folder: Path, uncut: Path, checks: Checks) -> Row:
    with closing(make_disk(folder / "to_the_end")) as disk:
        run = disk.folder / "run"
        command = Command("train", *_RUN, "--out", str(run), inference_s=_INFERENCE_S)
        before = _fill_after(disk, command, run, checks)
        code = command.finish()
        checks.expect(code == 1, f"exit code {code} at the end on a full disk, not 1")
        checks.expect(before in command.tail, f"the end does not name {before}: {command.tail}")
        checks.expect(_is_loadable(run, before), f"{before} is not loadable on the full disk")
        if isinstance(disk, ImageDisk):  # the limit ended with its process
            disk.free(command)
        _check_end(Command("train", "--resume", str(run), inference_s=_INFERENCE_S), run, uncut, checks)
    lost = f"the updates after {before}, computed again"
    held = "exit code 1 and the newest checkpoint's name; resumed to the end when there was room: equal to an uncut run"
    return Row(f"disk full until the run's end: {disk.name}", 1, lost, held, tuple(checks.failures))


def _fill_after(disk: Disk, command: Command, run: Path, checks: Checks) -> str:
    """Fill the disk once there are checkpoints, and return the newest one's name."""
    checks.expect(command.wait_for_updates(3 * SAVE_INTERVAL), f"the run ended early: {command.tail}")
    time.sleep(0.1)
    disk.fill(command)
    return _newest(run)


def _wait_for_reports(command: Command, num_reports: int) -> bool:
    return command.wait_for(lambda each: _num_reports(each) >= num_reports, timeout_s=60)


def _num_reports(command: Command) -> int:
    return sum("checkpoint" in line and _REPORT in line for line in command.lines)


def _newest(run: Path) -> str:
    return os.path.basename(list_checkpoints(run)[-1])


def _is_loadable(run: Path, name: str) -> bool:
    try:
        load_checkpoint(run / "checkpoints" / name)
    except CheckpointError:
        return False
    return True


def _check_end(command: Command, run: Path, uncut: Path, checks: Checks) -> None:
    code = command.finish()
    checks.expect(code == 0, f"exit code {code}: {command.tail}")
    check_rows(run, NUM_UPDATES, checks)
    different = find_differences(uncut, run)
    checks.expect(not different, f"differs from the uncut run in {different}")
