"""Tasks by name, and environment descriptions from files; every mistake is one line."""

import json
import re
import subprocess
import sys

import h5py
import pytest
import torch

from asyncflow.config import tasks
from asyncflow.config.presets import load_config
from asyncflow.config.sections import EnvConfig
from asyncflow.config.task_table import TASKS
from asyncflow.config.tasks import load_env_meta, resolve_task
from asyncflow.errors import ConfigError
from asyncflow.run.start import choose_preset

META = {"env_name": "Lift", "type": 1, "env_version": "1.5.2", "env_kwargs": {"robots": ["Panda"]}}


def test_the_task_table_is_read_without_torch_or_a_simulator():
    code = "import sys, asyncflow.envs; print({'torch', 'robosuite', 'numpy'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "set()\n"


@pytest.mark.parametrize(("name", "near"), [("lift", "Lift"), ("Lfit", "Lift"), ("Toolhang", "ToolHang")])
def test_an_unknown_task_is_one_line_with_the_nearest_name_and_where_all_are_listed(name, near):
    with pytest.raises(ConfigError) as error:
        resolve_task(EnvConfig(task=name))
    message = str(error.value)
    assert "\n" not in message
    assert f"did you mean {near}" in message
    assert "`asyncflow tasks` lists them" in message


@pytest.mark.parametrize(("name", "own"), [("PickPlaceCan", "Can"), ("TwoArmTransport", "Transport"), ("Wipe", "Wipe")])
def test_robosuites_own_names_are_taken(name, own):
    assert resolve_task(EnvConfig(task=name)).task is TASKS[own]
    assert load_config(None, {"env.task": name}).env.task == own
    assert choose_preset({"env.task": name, "policy.checkpoint": None}) is None


def test_robosuites_name_of_the_object_is_taken():
    values = {"env.obs_keys": ["object-state"], "policy.mapping.obs.state": [{"key": "object-state"}]}
    config = load_config(None, values)
    assert config.env.obs_keys == ["object"]
    assert [part.key for part in config.policy.mapping.obs.state] == ["object"]


def test_the_configuration_wins_over_the_tasks_defaults():
    settings = resolve_task(EnvConfig(task="ToolHang", obs_keys=["object"]))
    assert (settings.horizon, settings.obs_keys) == (700, ("object",))
    assert resolve_task(EnvConfig(task="ToolHang", horizon=30)).horizon == 30


def test_an_observation_that_a_task_lacks_is_one_line_with_all_that_it_has():
    with pytest.raises(
        ConfigError, match=r"env.obs_keys = .*: Lift has no cube_colour; it has object, .*_vel$"
    ) as error:
        resolve_task(EnvConfig(obs_keys=["object", "cube_colour"]))
    assert "\n" not in str(error.value)


def test_the_observations_of_an_env_meta_are_left_to_its_simulator(tmp_path):
    path = save_json(tmp_path / "meta.json", META)
    assert resolve_task(EnvConfig(env_meta=str(path), obs_keys=["cube_colour"])).obs_keys == ("cube_colour",)


def test_env_meta_is_read_from_json_and_from_a_dataset_alike(tmp_path):
    text = json.dumps(META)
    (tmp_path / "meta.json").write_text(text)
    with h5py.File(tmp_path / "demo.hdf5", "w") as file:
        file.create_group("data").attrs["env_args"] = text
    assert load_env_meta(tmp_path / "meta.json") == load_env_meta(tmp_path / "demo.hdf5") == META


def test_env_meta_brings_its_own_tasks_horizon(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(META | {"env_name": "ToolHang"}))
    assert resolve_task(EnvConfig(env_meta=str(path))).horizon == 700


def test_env_meta_of_another_packages_environment_needs_horizon_and_observations(tmp_path, monkeypatch):
    path = save_json(tmp_path / "meta.json", META | {"env_name": "Knead"})
    monkeypatch.setattr(tasks, "plugin_names", lambda group: ["Knead"])
    with pytest.raises(ConfigError, match=r"does not know Knead; set env\.horizon and env\.obs_keys"):
        resolve_task(EnvConfig(env_meta=str(path)))
    assert resolve_task(EnvConfig(env_meta=str(path), horizon=50, obs_keys=["dough"])).task.env_name == "Knead"


def test_an_environment_that_robosuite_lacks_is_refused_with_the_nearest(tmp_path):
    path = save_json(tmp_path / "meta.json", META | {"env_name": "Stackk"})
    assert re.search(r"env_name = 'Stackk' is no environment of robosuite; did you mean Stack\?", refused(path))


def test_a_robot_with_two_arms_observes_under_other_names(tmp_path):
    meta = META | {"env_name": "TwoArmLift", "env_kwargs": {"robots": "Baxter"}}
    settings = resolve_task(EnvConfig(env_meta=str(save_json(tmp_path / "meta.json", meta))))
    assert settings.obs_keys[:2] == ("robot0_right_eef_pos", "robot0_right_eef_quat")
    assert "robot0_left_eef_pos" in settings.obs_keys


def test_env_meta_that_cannot_be_used_is_one_line(tmp_path):
    (tmp_path / "broken.json").write_text('{"env_name":\n')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "text.hdf5").write_text("no dataset")
    h5py.File(tmp_path / "empty.hdf5", "w").close()
    reasons = {"none.json": "no such file", "broken.json": "not valid JSON", "list.json": "expected a mapping"}
    for name, reason in (reasons | {"text.hdf5": "env_args", "empty.hdf5": "env_args"}).items():
        with pytest.raises(ConfigError, match=reason) as error:
            load_env_meta(tmp_path / name)
        assert "\n" not in str(error.value)


def save_checkpoint(path, meta):
    """Write what asyncflow needs of a checkpoint that robomimic saved."""
    torch.save({"model": {}, "config": "{}", "algo_name": "bc", "env_metadata": meta, "shape_metadata": {}}, path)
    return path


def save_dataset(path, meta):
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps(meta)
    return path


def save_json(path, meta):
    path.write_text(json.dumps(meta))
    return path


WRITERS = {"model.pth": save_checkpoint, "demo.hdf5": save_dataset, "meta.json": save_json}


def refused(path):
    with pytest.raises(ConfigError) as error:
        load_env_meta(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"env.env_meta = {path}: ")
    return str(error.value)


def test_env_meta_is_read_from_a_checkpoint_of_robomimic(tmp_path):
    path = save_checkpoint(tmp_path / "model.pth", META)
    assert load_env_meta(path) == META
    assert resolve_task(EnvConfig(env_meta=str(path))).horizon == 400


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(("kind", "shown"), [(2, r"2 \(gym\)"), (3, r"3 \(iGibson"), (99, "99;"), ("a", "'a';")])
def test_env_meta_of_another_simulator_names_its_type(tmp_path, name, kind, shown):
    path = WRITERS[name](tmp_path / name, META | {"type": kind})
    assert re.search(rf"type {shown}.*allowed: 1 \(robosuite\)", refused(path))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("change", [{"env_name": ["Lift"]}, {"env_kwargs": None}], ids=str)
def test_env_meta_of_the_wrong_types_is_one_line(tmp_path, name, change):
    assert "env_name must be text and env_kwargs a mapping" in refused(WRITERS[name](tmp_path / name, META | change))


def test_env_meta_of_a_hostile_checkpoint_is_refused_without_running_it(tmp_path):
    path, mark = tmp_path / "model.pth", tmp_path / "mark"
    path.write_bytes(f"cos\nsystem\n(Vtouch {mark}\ntR.".encode())
    assert "os.system" in refused(path)
    assert not mark.exists()


def test_env_meta_of_a_broken_dataset_is_one_line(tmp_path):
    path = save_dataset(tmp_path / "demo.hdf5", META)
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a robomimic dataset" in refused(path)
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["env_args"] = 3
    assert "not valid JSON" in refused(path)


def test_env_meta_nested_without_end_is_one_line(tmp_path):
    (tmp_path / "meta.json").write_text("[" * 100_000)
    assert "not valid JSON" in refused(tmp_path / "meta.json")
