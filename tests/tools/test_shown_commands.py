"""Every command that README and the pages of `docs/` show is one that works: parsed here, and the short ones run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.handbook.commands import REPOSITORY, Command, all_commands, find_commands, find_fault

SHOWN = all_commands()
# Runs of the toy, which take seconds; what follows `train` here makes them smaller still.
SHORT = [each for each in SHOWN if each.words[:2] == ("asyncflow", "train") and {"Toy", "toy_vla_tiny"} & {*each.words}]
SMALL = ["trainer.total_updates=1", "trainer.eval_interval=0", "env.num_envs=4", "buffer.buffer_size=16"]
SMALL += ["algorithm.num_minibatches=2"]


@pytest.mark.parametrize("command", dict.fromkeys(SHOWN), ids=lambda each: f"{each.page}:{each.line}")
def test_a_shown_command_is_one_that_exists(command: Command) -> None:
    assert find_fault(command) is None


def test_the_readme_shows_commands() -> None:
    assert {each.words[1] for each in SHOWN if each.page == "README.md" and each.words[0] == "asyncflow"} >= {
        "train", "eval", "demos", "pretrain", "profile", "tasks", "config"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("asyncflow trian --task Toy", "no command 'trian'"),
        ("asyncflow train --tsak Toy", "No such option"),
        ("asyncflow train --seed one", "one"),
        ("asyncflow train algorithm.clip=0.1", "no key 'algorithm.clip'"),
        ("asyncflow train algorithm.clip_coef=-1", "algorithm.clip_coef"),
        ("make trian", "no target 'trian'"),
        ("make train ARGS=--tsak", "No such option"),
        ("python -m tools.nothing", "no module tools.nothing"),
        ("python -m tools.stress --nothing", "tools.stress knows no --nothing"),
    ],
)
def test_a_mistake_in_a_command_is_found(words: str, fault: str) -> None:
    assert fault in (find_fault(Command("page.md", 1, tuple(words.split()))) or "")


def test_commands_are_found_in_blocks_and_in_lines() -> None:
    text = (
        "Run `asyncflow eval RUN` now.\n\n```\nasyncflow train \\\n    --seed 1   # why\nasyncflow 0.1.0\n```\n\n"
        "    PYTHONPATH=x asyncflow tasks\n"
    )
    found = {(each.line, each.words) for each in find_commands(text, "page.md")}
    assert found == {
        (1, ("asyncflow", "eval", "RUN")),
        (4, ("asyncflow", "train", "--seed", "1")),
        (9, ("asyncflow", "tasks")),
    }


@pytest.mark.slow
@pytest.mark.parametrize("command", SHORT, ids=lambda each: f"{each.page}:{each.line}")
def test_a_shown_run_of_the_toy_runs(command: Command, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "examples")])}
    line = [sys.executable, "-m", *command.words, *SMALL, "--out", str(tmp_path / "run")]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1
