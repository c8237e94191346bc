"""A run's folder: whole checkpoints or none, and links that always point at one."""

import json

import pytest

from asyncflow import checkpoint
from asyncflow.checkpoint import create_run_folder, describe_versions, name_run_folder, point_at, save_checkpoint
from asyncflow.config import PolicyConfig, load_config
from asyncflow.envs.base import EnvSpec
from asyncflow.errors import ConfigError
from asyncflow.policies import make_policy
from asyncflow.policy_file import load_policy_file, resolve_checkpoint

CONFIG = PolicyConfig(kind="gaussian", hidden_sizes=[8], critic_hidden_sizes=[8], log_prob="joint_sum")
SPEC = EnvSpec({"state": (3,)}, action_dim=2, horizon=10)
POLICY = make_policy(CONFIG, SPEC.obs_shapes, SPEC.action_dim, seed=0)


def save(run, updates):
    return save_checkpoint(run, POLICY, CONFIG, SPEC, {"updates": updates, "env_steps": 7, "decisions": 5})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def test_a_checkpoint_is_named_by_its_update_and_holds_policy_and_clocks(folder):
    path = save(folder, 12)
    assert path.name == "update_000012"
    assert json.loads((path / "state.json").read_text())["updates"] == 12
    assert load_policy_file(path / "policy.safetensors").env_spec == SPEC


def test_last_is_the_newest_and_a_run_folder_means_it(folder):
    save(folder, 1)
    save(folder, 2)
    assert resolve_checkpoint(str(folder)).resolve() == folder / "checkpoints/update_000002/policy.safetensors"


def test_a_link_can_be_moved(folder):
    first, second = save(folder, 1), save(folder, 2)
    point_at(folder, "best", first)
    point_at(folder, "best", second)
    assert (folder / "checkpoints/best").resolve() == second


def test_saving_an_update_twice_keeps_the_first(folder):
    assert save(folder, 3) == save(folder, 3)
    assert len(list((folder / "checkpoints").iterdir())) == 2  # the checkpoint and `last`


def test_a_full_disk_harms_neither_the_last_checkpoint_nor_the_folder(folder, monkeypatch):
    save(folder, 1)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_atomically", fail)
    with pytest.raises(OSError, match="No space left"):
        save(folder, 2)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["last", "update_000001"]
    assert load_policy_file(resolve_checkpoint(str(folder))).env_spec == SPEC


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    config = load_config("toy", {"logging.out": str(tmp_path / "run")})
    create_run_folder(name_run_folder(config), config)
    with pytest.raises(ConfigError, match=r"logging.out = .*already holds a run"):
        name_run_folder(config)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    config = load_config("toy", {"logging.out": str(tmp_path / "file" / "run")})
    with pytest.raises(ConfigError, match=r"logging.out = .*: Not a directory"):
        create_run_folder(name_run_folder(config), config)


def test_versions_name_what_a_result_depends_on():
    versions = describe_versions()
    assert {"python", "git_commit", "torch", "mujoco", "robosuite"} <= set(versions)
