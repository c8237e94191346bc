"""The example of a simulator of one's own trains under another interpreter, which has numpy alone, and by its name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import asyncflow as af
from asyncflow import cli
from asyncflow.config import plugins
from asyncflow.errors import ConfigError
from tools.stress.bare_python import make_bare_python

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"


@pytest.fixture
def bare(tmp_path):
    return str(make_bare_python(tmp_path / "bare"))


@pytest.fixture(autouse=True)
def findable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(plugins, "_trusted", set())


def test_the_example_trains_under_another_interpreter(bare, tmp_path):
    words = [sys.executable, str(EXAMPLES / "my_simulator.py"), bare, "1"]
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=variables, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"simulated by {bare}: success \d+%\n", done.stdout)


def test_it_is_trained_resumed_and_evaluated_by_its_name_on_the_users_word_alone(bare, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(EXAMPLES)  # where another interpreter searches
    run, name = str(tmp_path / "run"), "my_simulator:Reach"
    keys = ["buffer.buffer_size=16", "algorithm.num_minibatches=1", "trainer.eval_episodes=2", "env.num_workers=1"]
    train = ["train", f"env.task={name}", f"env.python={bare}", "trainer.total_env_steps=16", "--out", run, *keys]
    assert cli.run(train) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"--python {bare} --trust-class {name}")
    plugins._trusted.clear()
    assert cli.run(["eval", run, "--num-episodes", "2"]) == 2
    assert f"env.task = {name}: named by a file and not by this command" in capsys.readouterr().err
    assert cli.run(["eval", run, "--num-episodes", "2", "--python", bare, "--trust-class", name]) == 0
    plugins._trusted.clear()
    more = ["train", "--resume", run, "trainer.total_env_steps=32"]
    assert cli.run([*more, "--trust-class", name]) == 2
    assert f"env.python = {bare}: named by the run's config.yaml and not by this command" in capsys.readouterr().err
    plugins._trusted.clear()
    assert cli.run([*more, f"env.python={bare}"]) == 2
    assert f"env.task = {name}: named by a file" in capsys.readouterr().err
    assert cli.run([*more, f"env.python={bare}", "--trust-class", name]) == 0


@pytest.mark.parametrize("name", ["my_simulator", "gym:Pendulum-v1", ":Reach", "my simulator:Reach", "a:b.c"])
def test_what_is_no_name_of_a_simulator_is_one_line(name):
    with pytest.raises(ConfigError, match="expected module:Class, as in my_simulator:Reach"):
        af.SimulatorVecEnv(name)


def test_a_name_that_its_module_lacks_is_one_line():
    with pytest.raises(ConfigError, match="my_simulator"):
        af.SimulatorVecEnv("my_simulator:Missing", num_workers=1)


def test_the_page_shows_the_examples_simulator():
    """Line by line, but for docstrings."""
    page = (REPOSITORY / "docs/your_simulator.md").read_text()
    shown = page.partition("class Reach")[2].partition("```")[0]
    lines = [line for line in shown.splitlines() if line.strip()]
    assert set(lines) <= set((EXAMPLES / "my_simulator.py").read_text().replace("class Reach", "").splitlines())
