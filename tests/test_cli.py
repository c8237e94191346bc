"""The command line, in a process of its own as a user runs it."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from asyncflow import cli
from asyncflow.ppo import ppo

RunCli = Callable[..., CompletedProcess[str]]
PROBE = "import sys; sys.argv = ['asyncflow', '--help']; from asyncflow.cli import run; run(['--help']); "


def refusal(result: CompletedProcess[str]) -> str:
    """Return the one line with which a user's mistake is refused."""
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("asyncflow: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_help_imports_nothing_slow() -> None:
    probe = PROBE + "print([name for name in ('torch', 'numpy', 'pydantic', 'yaml', 'h5py') if name in sys.modules])"
    command = [sys.executable, "-c", probe]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "[]"


def test_help_answers_within_three_tenths_of_a_second() -> None:
    """Of a core: other programs may be running. On a slow machine, within thrice what its libraries take to load."""

    def seconds(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    libraries_s = min(seconds("-c", "import typer, rich.console, rich.panel, rich.table") for _ in range(5))
    assert min(seconds("-m", "asyncflow", "--help") for _ in range(5)) < max(0.3, 3 * libraries_s)


@pytest.mark.parametrize("command", ["train", "eval", "demos", "pretrain", "profile", "tasks", "config"])
def test_every_command_has_help(run_cli: RunCli, command: str) -> None:
    result = run_cli(command, "--help")
    assert result.returncode == 0
    assert f"asyncflow {command}" in result.stdout


def test_nothing_at_all_shows_the_help(run_cli: RunCli) -> None:
    result = run_cli()
    assert result.returncode == 0
    assert "pretrain" in result.stdout


def test_version(run_cli: RunCli) -> None:
    assert run_cli("--version").stdout.startswith("asyncflow 0.")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["trian"], ["trian", "train"]),
        (["train", "--nun-envs", "3"], ["--nun-envs", "--num-envs"]),
        (["train", "--num-envs", "x"], ["--num-envs", "'x'"]),
        (["train", "--num-envs", "7"], ["buffer.buffer_size = 960", "env.num_envs = 7"]),
        (["train", "--buffer-type", "vlaa"], ["trainer.buffer_type", "'vlaa'", "'vla' or 'standard'"]),
        (["train", "algorithm.clip_coeff=1"], ["algorithm.clip_coeff", "algorithm.clip_coef?"]),
        (["train", "foo"], ["'foo'", "section.key=value"]),
        (["train", "--config", "lfit"], ["lfit", "lift"]),
        (["train", "--task", "Lfit"], ["'Lfit'", "did you mean Lift"]),
        (["train", "--task", "Can"], ["'Can'", "--checkpoint"]),
        (["eval"], ["checkpoint is missing", "a run folder", "lift_flow"]),
        (["train", "algorithm.advantage=gea"], ["'gea'", "gae, monte_carlo, n_step", "asyncflow.advantages"]),
        (["eval", "lift_flow", "--num-episodes", "0"], ["--num-episodes 0"]),
        (["eval", "lift_flow", "--num-envs", "0"], ["--num-envs 0"]),
        (["pretrain"], ["--dataset"]),
    ],
    ids=" ".join,
)
def test_a_mistake_is_refused_in_one_line(run_here: RunCli, arguments: list[str], named: list[str]) -> None:
    line = refusal(run_here(*arguments))
    assert [words for words in named if words not in line] == []


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize(
    "flag",
    [
        "demos --action-noise", "demos --grasp-offset", "pretrain --learning-rate", "profile --env-latency-s",
        "profile --inference-latency-s", "profile --update-latency-s", "profile --variation",
    ],
)  # fmt: skip
def test_a_flag_takes_no_number_that_is_not_finite(run_here: RunCli, flag: str, number: str) -> None:
    assert f"'{number}' is not a finite number" in refusal(run_here(*flag.split(), number))


def test_a_refusal_is_the_exit_code_of_the_process(run_cli: RunCli) -> None:
    assert "'trian'" in refusal(run_cli("trian"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--task", "Toy", "--device", "cuda:99"], ["trainer.device = 'cuda:99'", "available: auto, cpu"]),
        (["train", "--task", "Toy", "--device", "tpu"], ["trainer.device = 'tpu'", "cuda:N"]),
        (["train", "--task", "Toy", "--checkpoint", "nowhere"], ["nowhere", "not found"]),
        (["eval", "nowhere"], ["nowhere", "not found"]),
        (["demos", "--task", "Can"], ["Can", "Lift"]),
        (["pretrain", "--dataset", "nowhere.hdf5"], ["nowhere.hdf5"]),
    ],
    ids=" ".join,
)
def test_what_does_not_exist_is_refused_and_leaves_nothing(
    run_here: RunCli, tmp_path: Path, arguments: list[str], named: list[str]
) -> None:
    line = refusal(run_here(*arguments))
    assert [words for words in named if words not in line] == []
    assert list(tmp_path.iterdir()) == []


def test_tasks_lists_tasks_and_horizons(run_cli: RunCli) -> None:
    lines = run_cli("tasks").stdout.splitlines()
    assert any(line.startswith("Lift\t400\t") for line in lines)
    assert any(line.startswith("Toy\t") for line in lines)


def test_config_shows_value_default_and_meaning_of_every_key(run_cli: RunCli) -> None:
    lines = run_cli("config", "algorithm.gamma=0.5").stdout.splitlines()
    assert lines[0] == "key\tvalue\tdefault\tmeaning"
    assert "algorithm.gamma\t0.5\t0.995\tDiscount per env step." in lines
    assert "env.horizon\t120\tnull" in "\n".join(lines)


def test_config_of_a_task_takes_the_tasks_preset(run_cli: RunCli) -> None:
    assert "policy.kind\tgaussian" in run_cli("config", "env.task=Toy").stdout


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m asyncflow config | head -1"
    assert "Traceback" not in subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stderr


def test_a_crash_shows_its_traceback_and_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def crash(*_: object) -> None:
        raise RuntimeError("lost\nthe plot")

    monkeypatch.setattr(cli, "_load", crash)
    assert cli.run(["config"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1] == "asyncflow: crashed: RuntimeError: lost the plot"


@pytest.mark.parametrize("flag", ["--config", "--resume", "--checkpoint", "--out", "env.env_meta="])
def test_a_name_that_is_too_long_is_one_line(run_here: RunCli, flag: str) -> None:
    name = "n" * 300
    words = [flag + name] if flag.endswith("=") else ["--task", "Toy", flag, name]
    assert name in refusal(run_here("train", *words))


@pytest.mark.parametrize("is_cause", [False, True])
def test_too_many_open_files_are_one_line_that_names_the_limit(
    run_here: RunCli, monkeypatch: pytest.MonkeyPatch, is_cause: bool
) -> None:
    def open_files(*_: object) -> None:
        error = OSError(errno.EMFILE, "Too many open files")
        if is_cause:
            raise RuntimeError("collecting failed") from error
        raise error

    monkeypatch.setattr(cli, "_load", open_files)
    assert "raise the limit with `ulimit -n`" in refusal(run_here("config"))


def test_a_superscript_is_no_number(run_here: RunCli) -> None:
    assert "'²' is not a whole number" in refusal(run_here("train", "--seed", "²"))
    assert "camera_size" in refusal(run_here("demos", "--camera-size", "8²,84"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SystemExit(0), "ended the program: sys.exit(0)"),
        (EOFError("no input"), "EOFError: no input"),
        (BrokenPipeError(32, "Broken pipe"), "BrokenPipeError: [Errno 32] Broken pipe"),
    ],
    ids=["SystemExit", "EOFError", "BrokenPipeError"],
)
def test_an_end_that_nobody_asked_for_is_a_crash_that_saves(
    run_here: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, said: str
) -> None:
    """Whatever a model raises, such as `sys.exit` in a library: by its exit code alone the run would look well."""
    update, updates = ppo.PPO.update, iter(range(2))

    def end(*arguments: Any) -> Any:
        if next(updates) == 1:
            raise error
        return update(*arguments)

    monkeypatch.setattr(ppo.PPO, "update", end)
    result = run_here(*toy_run(tmp_path / "run", "trainer.eval_interval=0"))
    assert result.returncode == 1
    assert said in result.stderr.splitlines()[-1]
    assert "update_000001; go on with: asyncflow train --resume" in result.stdout


def test_a_run_folder_that_is_renamed_under_a_run_is_told_and_fails_it(
    run_here: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, updates = ppo.PPO.update, iter(range(4))

    def rename(*arguments: Any) -> Any:
        if next(updates) == 1:
            (tmp_path / "run").rename(tmp_path / "moved")
        return update(*arguments)

    monkeypatch.setattr(ppo.PPO, "update", rename)
    short = ["trainer.eval_interval=0", "trainer.total_updates=4", "trainer.save_interval=2"]
    result = run_here(*toy_run(tmp_path / "run", *short))
    assert result.returncode == 1
    assert result.stdout.count("metrics.jsonl: was removed, renamed or replaced under the run") == 1
    assert "checkpoint of update 2 could not be written" in result.stdout
    assert "the run's end could not be saved" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def toy_run(out: Path, *more: str) -> list[str]:
    """Return the arguments of a short run on the toy task."""
    return ["train", "--task", "Toy", "--device", "cpu", "--logger", "none", "--out", str(out), *more]


@pytest.mark.parametrize(("buffer_type", "runner"), [("vla", "run_cli"), ("standard", "run_here")])
def test_a_toy_run_trains_and_says_what_comes_next(
    request: pytest.FixtureRequest, run_here: RunCli, tmp_path: Path, buffer_type: str, runner: str
) -> None:
    out = tmp_path / "run"
    short = ["trainer.total_updates=3", "trainer.eval_interval=0"]
    result = request.getfixturevalue(runner)(*toy_run(out, "--buffer-type", buffer_type, *short))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("update ")] == ["1/3", "2/3", "3/3"]
    assert lines[-1].startswith("next: asyncflow eval ")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["updates"] for row in rows] == [1, 2, 3]
    evaluation = run_here(*lines[-1].split()[2:], "--num-envs", "7")  # of which no run collects a multiple
    assert evaluation.stdout.endswith("exactly 200 episodes\n"), evaluation.stderr
    assert "already holds a run" in refusal(run_here(*toy_run(out)))


def test_a_resumed_run_takes_the_flags_it_was_begun_with_and_no_others(run_here: RunCli, tmp_path: Path) -> None:
    out, short = tmp_path / "run", ["trainer.eval_interval=0", "env.num_envs=4"]
    assert run_here(*toy_run(out, *short, "trainer.total_updates=1")).returncode == 0
    again = ["train", "--resume", str(out), *toy_run(out, *short, "trainer.total_updates=2")[1:]]
    line = refusal(run_here(*again, "--seed", "1"))
    assert "trainer.seed = 1: cannot change with --resume, the run has 0; may change: " in line
    assert run_here(*again, "--seed", "0").returncode == 0
