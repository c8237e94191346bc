"""Signals to a real command: saved and gone after the first, gone at once after the second, nothing left behind.

A run that has to be at a certain place when the signal comes is held there (`held_run`).
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from asyncflow.signals import ENDING_SIGNALS, interrupt_on_signals, signals_held, stop_on_signals

TOY = ["train", "--task", "Toy", "--logger", "none", "trainer.eval_interval=0"]
ENDLESS = ["trainer.total_updates=100000"]
TWO_WORKERS = ["env.num_envs=2", "env.num_workers=2", "buffer.buffer_size=8", "algorithm.num_minibatches=2"]
HELD_RUN = str(Path(__file__).parent / "support" / "held_run.py")
PATIENCE_S = 120.0  # what is waited for comes in a second; a busy machine may take longer


@pytest.fixture
def launch():
    """Return a function that starts Python in a process group of its own; what is left of it ends with the test."""
    started = []

    def start(*arguments, **streams):
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | streams
        started.append(subprocess.Popen([sys.executable, *arguments], text=True, start_new_session=True, **streams))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture
def hold(launch):
    """Return a function that starts a command and returns when it is held at a place."""

    def start(place, *arguments, count=1, environment="own", **streams):
        process = launch(HELD_RUN, place, str(count), environment, *arguments, **streams)
        wait_for_line(process, "held")
        return process

    return start


@pytest.fixture
def hold_run(hold, tmp_path):
    """Return a function that starts a run of the toy and returns when it is held at a place."""

    def start(place, *overrides, **where):
        return hold(place, *TOY, "--out", str(tmp_path / "run"), *overrides, **where)

    return start


def wait_for_line(process, beginning):
    """Read the output up to a line."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(beginning):
            return
    raise AssertionError(f"the run ended before {beginning!r}: {''.join(seen)}")


class End(NamedTuple):
    """How a command ended: its exit code, what it said, and the processes that are left of it."""

    code: int
    output: str
    processes: list[int]

    @property
    def is_clean(self):
        return self.code == 130 and "Traceback" not in self.output and not self.processes


def interrupt(process, number=signal.SIGINT, within_s=PATIENCE_S):
    """Send a signal as a terminal does, to the whole group, and wait until nobody can say more."""
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=within_s)  # workers, too, would keep the pipe open
    return End(process.returncode, output, survivors(process.pid))


def survivors(group):
    """Return the processes of a group that do not end."""
    for pid in members(group):
        with contextlib.suppress(ProcessLookupError), os.fdopen(os.pidfd_open(pid)) as ended:
            select.select([ended], [], [], PATIENCE_S / 4)
    return members(group)


def members(group):
    """Return the processes of a group that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def saved_state(run):
    return json.loads((run / "checkpoints/last/state.json").read_text())


def num_rows(run):
    return len((run / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("number", "buffer_type"),
    [
        (signal.SIGINT, "vla"),
        pytest.param(signal.SIGTERM, "standard", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, "standard", marks=pytest.mark.slow),
    ],
)
def test_the_first_signal_saves_and_leaves_with_130_within_ten_seconds(launch, tmp_path, number, buffer_type):
    run = tmp_path / "run"
    process = launch("-m", "asyncflow", *TOY, "--out", str(run), "--buffer-type", buffer_type, *ENDLESS)
    wait_for_line(process, "update 1")
    end = interrupt(process, number, within_s=10)
    assert end.is_clean, end
    assert "stopping: saving" in end.output
    assert "stopped, and saved" in end.output
    assert saved_state(run)["updates"] == num_rows(run)
    assert list((run / "checkpoints/last").glob("*.safetensors"))


def test_a_signal_after_the_reader_of_the_output_has_died_saves_too(hold_run, tmp_path):
    """Ctrl-C reaches the whole pipeline: in `asyncflow train |& tee log` the reader dies first."""
    process = hold_run("asyncflow.run.trainer:Trainer._check_update", count=2)
    process.stdout.close()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=PATIENCE_S) == 130
    assert saved_state(tmp_path / "run")["updates"] == num_rows(tmp_path / "run") == 1


@pytest.mark.slow
def test_a_run_whose_output_goes_to_a_full_disk_trains_to_its_end(launch, tmp_path):
    """A run's length of what `test_terminal` shows of a command."""
    run = tmp_path / "run"
    with Path("/dev/full").open("w") as full:
        process = launch(
            "-m", "asyncflow", *TOY, "--out", str(run), "trainer.total_updates=2", stdout=full, stderr=subprocess.PIPE
        )
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, "")
    assert saved_state(run)["updates"] == num_rows(run) == 2


def test_a_closed_terminal_that_tells_twice_does_not_cut_the_save_short(hold_run, tmp_path):
    """Its shell sends SIGHUP to its jobs, and the kernel sends it again."""
    process = hold_run("asyncflow.run.trainer:Trainer._check_update", count=2)
    os.killpg(process.pid, signal.SIGHUP)
    end = interrupt(process, signal.SIGHUP)
    assert end.is_clean, end
    assert saved_state(tmp_path / "run")["updates"] == num_rows(tmp_path / "run") == 1


def test_what_nohup_has_a_program_ignore_stays_ignored():
    handlers = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        interrupt_on_signals()
        stop_on_signals(lambda: None)
        with signals_held():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) is signal.getsignal(signal.SIGTERM) is not handlers[signal.SIGTERM]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.slow
def test_workers_ignore_what_the_parent_handles(hold_run):
    """In a run what `test_workers` shows of one worker.

    At the first decision both simulate; the signals reach them and multiprocessing's helper alike.
    """
    process = hold_run("asyncflow.run.trainer:Trainer._check_update", *TWO_WORKERS, environment="fake", count=2)
    others = [pid for pid in members(process.pid) if pid != process.pid]
    assert len(others) >= 3
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(os.fdopen(os.pidfd_open(pid))) for pid in others]
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU):
            for pid in others:
                os.kill(pid, number)
        assert select.select(ends, [], [], 0.5)[0] == []
    assert interrupt(process).is_clean


def test_a_signal_before_the_run_is_built_ends_it(hold_run, tmp_path):
    end = interrupt(hold_run("asyncflow.run.launch:build_trainer"), signal.SIGTERM)
    assert end.is_clean, end
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("place", "count"),
    [
        ("asyncflow.envs.worker:start_worker", 2),
        pytest.param("asyncflow.envs.worker:Worker.wait_ready", 1, marks=pytest.mark.slow),
    ],
    ids=["second process just started", "simulators under construction"],
)
def test_a_signal_while_workers_are_started_leaves_none(hold_run, place, count):
    end = interrupt(hold_run(place, *TWO_WORKERS, count=count, environment="stuck"))
    assert end.is_clean, end  # the workers would not see their pipe close


@pytest.mark.slow
def test_an_update_that_takes_too_long_is_abandoned_and_the_boundary_before_it_is_saved(hold_run, tmp_path):
    """At full scale what `test_trainer` shows of an update abandoned after a stop; it waits out the time of grace."""
    slow_update = ["algorithm.update_epochs=1000", "algorithm.num_minibatches=8"]
    process = hold_run("asyncflow.run.trainer:Trainer._check_update", *slow_update, count=2)
    end = interrupt(process)
    assert end.is_clean, end
    assert saved_state(tmp_path / "run")["updates"] == 0


@pytest.mark.slow
def test_a_signal_during_an_evaluation_leaves_it_owed(hold_run, tmp_path):
    """In a process what `test_launch` shows of an evaluation that a stop cut."""
    end = interrupt(
        hold_run("asyncflow.run.recorded:RecordedRun._check_evaluation", "trainer.eval_interval=1", count=2)
    )
    assert end.is_clean, end
    assert saved_state(tmp_path / "run")["is_evaluation_owed"]


def test_a_signal_during_the_final_save_leaves_a_whole_checkpoint(hold_run, tmp_path):
    end = interrupt(
        hold_run("asyncflow.run.checkpoint:publish_file", "trainer.total_updates=1", "trainer.save_interval=1000")
    )
    assert end.is_clean, end
    assert saved_state(tmp_path / "run")["updates"] == 1
    assert [path.name for path in (tmp_path / "run/checkpoints").glob(".*")] == []


def test_a_signal_in_a_profile_leaves_nothing(hold, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    profile = ["profile", "--task", "Toy", "--out", str(tmp_path / "profile")]
    process = hold("asyncflow.run.trainer:Trainer._check_update", *profile, count=2)
    assert len(list(tmp_path.glob("asyncflow_profile_*"))) == 1
    end = interrupt(process)
    assert end.is_clean, end
    assert list(tmp_path.glob("asyncflow_profile_*")) == []


@pytest.mark.parametrize("environment", ["fake", pytest.param("own", marks=pytest.mark.slow)])
def test_the_second_signal_leaves_at_once_whatever_the_policy_does(hold_run, environment):
    process = hold_run("held_run:decide_for_ever", *TWO_WORKERS, environment=environment, count=1)
    os.killpg(process.pid, signal.SIGINT)
    wait_for_line(process, "stopping")
    end = interrupt(process)
    assert end.is_clean, end


@pytest.mark.sim
@pytest.mark.parametrize("num_signals", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_neither_signal_leaves_a_process(launch, tmp_path, num_signals):
    lift = ["train", "--task", "Lift", "--logger", "none", "trainer.eval_interval=0", *TWO_WORKERS, *ENDLESS]
    process = launch("-m", "asyncflow", *lift, "--out", str(tmp_path / "run"))
    wait_for_line(process, "update 1")
    if num_signals == 2:
        os.killpg(process.pid, signal.SIGINT)
        wait_for_line(process, "stopping")
    end = interrupt(process)
    assert end.is_clean, end
