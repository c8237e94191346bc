"""Commands that are shown can be copied, whatever a folder is called."""

import shlex
from io import StringIO
from pathlib import Path

import pytest

from asyncflow.config.sections import Config
from asyncflow.metrics.console import ConsoleReporter
from asyncflow.terminal import command

FOLDERS = [Path("a b"), Path("#1"), Path("it's"), Path('say "x"'), Path("$HOME"), Path("a;b"), Path("ü"), Path("-run")]


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_a_shell_gives_back_the_words(folder):
    words = shlex.split(command("train", "--resume", folder, "env.cameras=[agentview]"), comments=True)
    assert words[:3] == ["asyncflow", "train", "--resume"]
    assert Path(words[3]) == folder
    assert words[4] == "env.cameras=[agentview]"
    assert not words[3].startswith("-")


@pytest.mark.parametrize("is_stopped", [True, False])
@pytest.mark.parametrize("model_class", [None, "mine.Model"])
def test_the_end_card_shows_commands_that_work(is_stopped, model_class):
    shown, folder = StringIO(), Path("my runs/#1")
    reporter = ConsoleReporter(shown)
    policy = {"kind": "vla", "vla": {"model_class": model_class}}
    reporter.start(Config.model_validate({"policy": policy}), folder, 1, "cpu")
    reporter.end(folder, folder / "checkpoints" / "last", {}, is_stopped)
    *_, curves, line = shown.getvalue().splitlines()
    assert curves.endswith("tensorboard --logdir 'my runs/#1'")
    words = shlex.split(line.removeprefix("next: "), comments=True)
    expected = ["train", "--resume", "my runs/#1"]
    if not is_stopped:
        expected = ["eval", "my runs/#1/checkpoints/last", "--num-episodes", "200"]
    assert words == ["asyncflow", *expected, *(["--trust-class", "mine.Model"] if model_class else [])]
