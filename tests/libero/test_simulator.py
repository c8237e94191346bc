"""LIBERO's simulators beside the benchmark's own environments, under the interpreter that has both."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from asyncflow.config.libero import LIBERO_SUITES

pytestmark = [pytest.mark.sim, pytest.mark.timeout(600)]
FIRST_AND_LAST = [f"{name}/{index}" for name, suite in LIBERO_SUITES.items() for index in (0, suite.num_tasks - 1)]


def ask_inside(python: str, *words: str) -> dict[str, bool]:
    command = [python, str(Path(__file__).with_name("inside.py")), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment)
    assert answer.returncode == 0, answer.stderr
    found: dict[str, bool] = json.loads(answer.stdout)  # nothing else has printed there
    return found


@pytest.mark.parametrize("task", FIRST_AND_LAST)
def test_episodes_and_images_are_the_benchmarks_bit_for_bit(libero_python: str, task: str) -> None:
    assert [what for what, is_so in ask_inside(libero_python, "compare", task).items() if not is_so] == []


@pytest.mark.parametrize("task", ["libero_10/9", "libero_90/0"])  # a microwave and a cabinet, whose places are drawn
def test_a_seed_means_one_of_the_initial_states(libero_python: str, task: str) -> None:
    assert [what for what, is_so in ask_inside(libero_python, "initial", task).items() if not is_so] == []


def test_success_is_the_benchmarks_predicate_and_its_burner_is_seen(libero_python: str) -> None:
    assert [what for what, is_so in ask_inside(libero_python, "solve", "libero_goal/7").items() if not is_so] == []


def test_where_the_fast_step_is_not_equal_the_benchmarks_is_taken(libero_python: str) -> None:
    assert [
        what for what, is_so in ask_inside(libero_python, "obstacles", "libero_object/3").items() if not is_so
    ] == []


def test_no_generator_is_left_changed_and_rotations_are_robosuites(libero_python: str) -> None:
    assert [what for what, is_so in ask_inside(libero_python, "draws", "libero_spatial/0").items() if not is_so] == []
