"""LIBERO's tasks by name, and what can be said of them without the benchmark."""

import os
from pathlib import Path

import numpy as np
import pytest

from asyncflow.config.libero import DEFAULTS, LIBERO_SUITES, list_tasks
from asyncflow.config.sections import EnvConfig
from asyncflow.config.tasks import is_described, task_names
from asyncflow.envs import make_vec_env
from asyncflow.errors import ConfigError
from asyncflow.run.start import choose_preset
from asyncflow.simulators.libero import scene, simulator


def test_a_suite_means_all_of_its_tasks_and_a_number_one_of_them():
    assert [task.name for task in list_tasks("libero_goal")] == [f"libero_goal/{index}" for index in range(10)]
    assert len(list_tasks("libero_90")) == 90
    assert [(task.number, task.horizon) for task in list_tasks("libero_10/3")] == [(3, 520)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("libero_goal/10", "env.task = libero_goal/10: libero_goal has the tasks libero_goal/0 to libero_goal/9"),
        ("libero_goal/-1", "libero_goal has the tasks libero_goal/0 to libero_goal/9"),
        ("libero_goal/x", "libero_goal has the tasks libero_goal/0 to libero_goal/9"),
        ("libero_gaol", f"LIBERO has no suite 'libero_gaol'; suites: {', '.join(LIBERO_SUITES)}"),
    ],
)
def test_an_unknown_task_or_suite_is_one_line(name, message):
    with pytest.raises(ConfigError) as error:
        choose_preset({"env.task": name})
    assert message in str(error.value)


def test_horizons_are_those_of_the_published_evaluations():
    assert [suite.horizon for suite in LIBERO_SUITES.values()] == [220, 280, 300, 520, 400]


def test_the_defaults_are_those_of_the_configuration():
    assert {key: getattr(EnvConfig(), key) for key in DEFAULTS} == DEFAULTS


def test_tasks_have_a_preset_and_are_no_ones_but_their_simulators_to_describe():
    assert choose_preset({"env.task": "libero_spatial/3"}) == "libero"
    assert not is_described(EnvConfig(task="libero_spatial/3"))
    assert set(LIBERO_SUITES) <= set(task_names())


def test_without_an_interpreter_that_has_it_one_line_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setenv("ASYNCFLOW_HOME", str(tmp_path))
    with pytest.raises(ConfigError) as error:
        make_vec_env(EnvConfig(task="libero_spatial/3"), 1, 1, 0)
    assert "has no package libero; run: asyncflow envs install libero" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_rotation_is_its_axis_times_its_angle():
    half = np.sqrt(0.5)
    assert simulator.axis_angle(np.array([0.0, half, 0.0, half])) == pytest.approx([0.0, np.pi / 2, 0.0])
    assert simulator.axis_angle(np.array([1.0, 0.0, 0.0, 0.0])) == pytest.approx([np.pi, 0.0, 0.0])
    assert simulator.axis_angle(np.array([0.0, 0.0, 0.0, 1.0])).tolist() == [0.0, 0.0, 0.0]
    assert simulator.axis_angle(np.array([0.0, 0.0, 0.0, 1.0 + 1e-9])).tolist() == [0.0, 0.0, 0.0]


@pytest.fixture
def other_package(monkeypatch, tmp_path):
    """Put a package `libero` into the way, as `hf-libero` and the original are; return its folder."""
    (tmp_path / "libero/libero").mkdir(parents=True)
    (tmp_path / "libero/__init__.py").touch()
    (tmp_path / "libero/libero/__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ASYNCFLOW_HOME", str(tmp_path / "caches"))
    monkeypatch.delenv("LIBERO_CONFIG_PATH", raising=False)
    return tmp_path / "libero"


def test_other_packages_find_their_files_without_a_question(other_package):
    scene.set_paths()
    lines = (Path(os.environ["LIBERO_CONFIG_PATH"]) / "config.yaml").read_text().splitlines()
    assert f'bddl_files: "{other_package}/libero/bddl_files"' in lines
    assert Path(os.environ["LIBERO_CONFIG_PATH"]).parent == other_package.parent / "caches/libero"
    assert {line.partition(":")[0] for line in lines} == {
        "benchmark_root",
        "bddl_files",
        "init_states",
        "assets",
        "datasets",
    }


def test_what_the_user_says_of_their_files_is_left_alone(other_package, monkeypatch):
    monkeypatch.setenv("LIBERO_CONFIG_PATH", "/somewhere")
    scene.set_paths()
    assert os.environ["LIBERO_CONFIG_PATH"] == "/somewhere"
    assert not (other_package.parent / "caches").exists()
