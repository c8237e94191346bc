"""What a run shows, on a terminal and through a pipe."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncflow.config.presets import load_config
from asyncflow.metrics.console import (
    ConsoleReporter,
    describe_evaluation,
    format_bytes,
    format_duration,
    format_metric,
    progress_bar,
)
from asyncflow.metrics.glossary import GLOSSARY

ROW = dict.fromkeys(GLOSSARY, 1.0) | {
    "updates": 5,
    "env_steps": 19200,
    "wall_s": 30.0,
    "async/collector_busy": 0.98,
    "async/trainer_busy": 0.43,
    "staleness/policy_lag_mean": 1.0,
    "rollout/success_rate": 0.8125,
    "train/explained_variance": -0.71234,
}
RESULT = SimpleNamespace(
    num_episodes=50, num_successes=42, success_rate=0.84, success_low=0.71, success_high=0.92, episode_length=61.25,
    episode_return=-150.26, has_success=True, wall_s=6.2, tasks=(), num_start_states=0, num_broken=0,
)  # fmt: skip
RUN = Path("runs/Lift_vla_seed0_20260101-000000")


class Terminal(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


class Unwritable(io.StringIO):
    """A file to which nothing can be written."""

    def __init__(self, number: int, is_terminal: bool) -> None:
        super().__init__()
        self.number, self.is_terminal, self.num_attempts = number, is_terminal, 0

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> int:
        self.num_attempts += 1
        raise OSError(self.number, "cannot be written")


def show(file: io.StringIO, row: dict[str, Any] | None = None, is_stopped: bool = False) -> str:
    """Return what a whole run of one update shows."""
    row = ROW if row is None else row
    reporter = ConsoleReporter(file)
    reporter.start(load_config("lift", {"trainer.total_updates": 20}), RUN, 1_234_567, "cpu")
    reporter.update(row)
    reporter.evaluation(5, RESULT)
    reporter.end(RUN, RUN / "checkpoints/last", row, is_stopped)
    return file.getvalue()


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")


def test_a_pipe_gets_one_line_per_update() -> None:
    file = io.StringIO()
    reporter = ConsoleReporter(file)
    reporter.start(load_config("lift"), RUN, 1, "cpu")
    before = file.getvalue().count("\n")
    for _ in range(3):
        reporter.update(ROW)
    assert file.getvalue().count("\n") == before + 3


@pytest.mark.parametrize(("logger", "is_named"), [("tensorboard", True), ("none", False)])
def test_curves_are_named_where_there_are_any(logger: str, is_named: bool) -> None:
    file = io.StringIO()
    reporter = ConsoleReporter(file)
    reporter.start(load_config("toy", {"logging.logger": logger}), RUN, 1, "cpu")
    reporter.end(RUN, RUN / "checkpoints/last", ROW, is_stopped=False)
    assert ("curves" in file.getvalue()) == is_named


def show_progress(file: io.StringIO) -> str:
    """Return what a command of 50 episodes shows of its progress."""
    with progress_bar("episodes", 50, file) as show_done:
        print("the command's own")
        show_done(49)
        show_done(50)
    return file.getvalue()


def test_a_terminal_sees_how_far_a_long_command_is_until_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    text = show_progress(Terminal())
    assert "episodes" in text
    assert "50/50" in text
    assert text.endswith("\x1b[2K")  # the line is erased
    assert capsys.readouterr().out == "the command's own\n"


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_elsewhere_nothing_is_shown_of_progress(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert show_progress(io.StringIO()) == ""
    monkeypatch.setenv("TERM", "dumb")
    assert show_progress(Terminal()) == ""


def test_a_terminal_that_left_ends_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    left = Unwritable(errno.EIO, is_terminal=True)
    assert show_progress(left) == ""
    assert left.num_attempts > 0
    assert capsys.readouterr().out == "the command's own\n"


def test_a_pipe_gets_no_escape_codes_and_no_boxes() -> None:
    assert show(io.StringIO()).isascii()
    assert "\x1b" not in show(io.StringIO())


@pytest.mark.parametrize("file", [io.StringIO(), Terminal()], ids=["pipe", "terminal"])
def test_three_numbers_explain_asynchrony(file: io.StringIO) -> None:
    text = show(file)
    for words in ("collector_busy 98.0%", "trainer_busy 43.0%", "policy_lag_mean 1"):
        assert words in text


def test_everything_but_the_next_command_fits_into_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")  # no escape codes to count
    wide = {name: 1.0 if GLOSSARY[name].unit == "fraction" else 12345.6 for name in GLOSSARY}
    wide |= {"train/explained_variance": -1234.5, "train/approx_kl": -1.2345e-5, "rollout/episode_return": -10.55}
    lines = show(Terminal(), wide | {"env_steps": 10**8, "updates": 9999})
    assert [line for line in lines.splitlines() if len(line) > 80 and not line.startswith("next: ")] == []


def test_no_color_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    codes = {part.split("m")[0] for part in show(Terminal()).split("\x1b[")[1:]}
    assert codes <= {"0", "1"}  # bold, and its end


def test_the_start_card_says_what_differs_from_the_defaults() -> None:
    text = show(io.StringIO())
    assert "env.horizon=120" in text
    assert "policy.checkpoint=lift_flow" in text
    assert "gae_lambda" not in text
    assert "1.23 MB" in text
    assert str(RUN) in text


def test_the_end_card_names_the_next_command() -> None:
    last = show(Terminal()).splitlines()[-1]
    assert last == f"next: asyncflow eval {RUN}/checkpoints/last --num-episodes 200"


def test_a_stopped_run_says_so_and_how_to_go_on() -> None:
    text = show(io.StringIO(), is_stopped=True)
    assert "stopped, and saved" in text
    assert text.splitlines()[-1] == f"next: asyncflow train --resume {RUN}"


def test_a_run_stopped_before_its_first_update_ends_too() -> None:
    assert "checkpoint" in show(io.StringIO(), row={})


@pytest.mark.parametrize(
    ("number", "is_terminal"),
    [(errno.ENOSPC, False), (errno.EPIPE, False), (errno.EIO, True)],
    ids=["full disk", "dead reader", "closed terminal"],
)
def test_output_that_cannot_be_written_ends_no_run(number: int, is_terminal: bool) -> None:
    assert show(Unwritable(number, is_terminal)) == ""


@pytest.mark.parametrize(("interval", "left"), [(0, 0), (10, 2), (3, 6), (7, 3)])
def test_eta_includes_the_evaluations_to_come(interval: int, left: int) -> None:
    """`wall_s` leaves them out; at least the last update is evaluated."""
    file = io.StringIO()
    reporter = ConsoleReporter(file)
    config = load_config("lift", {"trainer.total_updates": 20, "trainer.eval_interval": interval})
    reporter.start(config, RUN, 0, "cpu")
    reporter.evaluation(0, SimpleNamespace(**(vars(RESULT) | {"wall_s": 60.0})))
    reporter.update(ROW)
    assert f"eta {1 + left}:30" in file.getvalue()
    reporter.update(ROW | {"updates": 20})  # its evaluation comes before its line
    assert "update 20/20 env_steps 19200 wall_s 30 eta 0:00" in file.getvalue()


def test_eta_extrapolates_the_time_so_far() -> None:
    assert "update 5/20 env_steps 19200 wall_s 30 eta 1:30" in show(io.StringIO())


def test_where_nothing_is_a_success_an_evaluation_is_a_return() -> None:
    result = SimpleNamespace(**(vars(RESULT) | {"has_success": False}))
    assert describe_evaluation(result).startswith("episode_return -150.3, episode_length 61.2, wall_s 6.2, exactly 50")
    file = Terminal()
    ConsoleReporter(file).evaluation(5, result)
    assert file.getvalue().strip() == "eval    episode_return -150.3, 50 episodes"


def test_an_evaluation_names_its_interval_and_ends_with_its_episodes() -> None:
    text = describe_evaluation(RESULT)
    assert "success_rate 84.0% (95% interval 71.0% to 92.0%)" in text
    assert "episode_length 61.2" in text
    assert text.endswith("exactly 50 episodes")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("rollout/success_rate", 1.0, "100.0%"),
        ("train/approx_kl", 0.0031234, "0.00312"),
        ("train/approx_kl", float("nan"), "-"),
        ("env_steps", 76800, "76800"),
        ("health/rss_bytes", 1.5e9, "1.5 GB"),
        ("time/update_s", 2.0, "2.00"),
    ],
)
def test_a_value_is_shown_by_its_unit(name: str, value: float, text: str) -> None:
    assert format_metric(name, value) == text


def test_durations_and_sizes() -> None:
    assert [format_duration(s) for s in (0, 61, 3661.4)] == ["0:00", "1:01", "1:01:01"]
    assert [format_bytes(n) for n in (0, 999, 1000, 2.5e12)] == ["0 B", "999 B", "1 kB", "2.5 TB"]


def test_a_table_is_tab_separated_in_a_pipe_and_whole_on_a_terminal() -> None:
    for file, line in ((io.StringIO(), "Lift\t400"), (Terminal(), "Lift")):
        ConsoleReporter(file).table(["task", "horizon"], [["Lift", "400"]])
        assert line in file.getvalue()


def task(name, **keys):
    return SimpleNamespace(**(vars(RESULT) | {"name": name} | keys))


def test_an_evaluation_of_several_tasks_has_a_line_for_each() -> None:
    file = io.StringIO()
    tasks = (task("Lift"), task("libero_goal/3", num_successes=10, success_rate=0.2, num_start_states=50))
    ConsoleReporter(file).evaluation(5, SimpleNamespace(**(vars(RESULT) | {"tasks": tasks})))
    first, *lines = file.getvalue().splitlines()
    assert first.startswith("evaluation after update 5: success_rate 84.0%")
    assert lines[0].strip() == "Lift: success_rate 84.0% (95% interval 71.0% to 92.0%), 50 episodes"
    assert lines[1].strip().endswith("each of 50 start states once, 50 episodes")


@pytest.mark.parametrize(
    ("num_episodes", "num_broken", "words"),
    [
        (100, 0, "each of 50 start states 2 times, wall_s"),
        (120, 0, "each of 50 start states 2 to 3 times, wall_s"),
        (100, 1, "each of 50 start states 2 times, but for 1 lost with a simulator, wall_s"),
    ],
)
def test_an_evaluation_says_how_often_each_start_state_was_run(num_episodes, num_broken, words) -> None:
    keys = {"num_start_states": 50, "num_episodes": num_episodes, "num_broken": num_broken}
    assert words in describe_evaluation(SimpleNamespace(**(vars(RESULT) | keys)))


def test_an_update_names_the_success_of_a_few_tasks_and_the_ends_of_many() -> None:
    few = {f"rollout/success_rate/{name}": rate for name, rate in {"A": 0.5, "B": 0.25}.items()}
    many = {f"rollout/success_rate/suite/{n}": n / 10 for n in range(10)}
    for rates, words in ((few, "A 50.0% B 25.0%"), (many, "lowest suite/0 0.0% highest suite/9 90.0%")):
        for file in (io.StringIO(), Terminal()):
            ConsoleReporter(file).update(ROW | rates)
            assert words in file.getvalue()
