"""Entry points of other packages."""

from pathlib import Path

import pytest
import torch
from silent import TOY, Silent, record

from asyncflow.config.presets import load_config
from asyncflow.config.sections import EnvConfig, PolicyConfig
from asyncflow.envs import make_vec_env, task_names
from asyncflow.envs.checked_env import CheckedVecEnv
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.errors import ConfigError, ContractError
from asyncflow.policies import GaussianPolicy, make_policy
from asyncflow.policies.policy_file import save_policy
from asyncflow.run.build import check_start
from asyncflow.run.evaluate_file import evaluate_checkpoint
from asyncflow.run.launch import train
from asyncflow.run.start import choose_preset
from asyncflow.simulators.spec import EnvSpec

PACKAGE = """
import os
from dataclasses import replace
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.policies import make_policy

class Hasty(ToyVecEnv):
    # It cuts episodes long before its horizon, as gymnasium's environments may.
    def step_wait(self, env_ids):
        result = super().step_wait(env_ids)
        cut = ~result.terminated & (result.obs["state"][:, 0] > 0)
        return replace(result, truncated=cut | result.truncated)

def build_policy(config, spec):
    return make_policy(config.model_copy(update={"kind": "gaussian"}), spec, 0)

def build_env(config, chunk_length, num_envs, seed):
    os.chdir("/")
    return ToyVecEnv(num_envs, chunk_length, config.horizon)

def build_hasty(config, chunk_length, num_envs, seed):
    return Hasty(num_envs, chunk_length, config.horizon)

def build_nothing(*arguments):
    return None

def build_from_nothing():
    return None

def build_raising(*arguments):
    raise KeyError("no robot at this address")

class Sticky(ToyVecEnv):
    def close(self):
        raise RuntimeError("the door is stuck")

def build_sticky(config, chunk_length, num_envs, seed):
    return Sticky(num_envs, chunk_length, config.horizon)

def build_unnamed(config, chunk_length, num_envs, seed):
    env = ToyVecEnv(num_envs, chunk_length, config.horizon)
    env.spec = replace(env.spec, task="")
    return env
"""
ENTRY_POINTS = """
[asyncflow.policies]
mine = added_package:build_policy
broken = added_package:missing
nothing = added_package:build_nothing

[asyncflow.envs]
Hasty = added_package:build_hasty
Nothing = added_package:build_nothing
FromNothing = added_package:build_from_nothing
Raising = added_package:build_raising
Sticky = added_package:build_sticky
MyTask = added_package:build_env
Unnamed = added_package:build_unnamed
"""


@pytest.fixture(autouse=True)
def _installed(tmp_path, monkeypatch):
    """A package that registers a policy and an environment, as a wheel would lie in site-packages."""
    (tmp_path / "added_package.py").write_text(PACKAGE)
    metadata = tmp_path / "added_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: added-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))


def install(folder, monkeypatch, entry_points):
    """Another package, whose entry points are these."""
    metadata = folder / "other_package-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(entry_points)
    monkeypatch.syspath_prepend(str(folder))


def test_a_registered_policy_and_environment_are_trained_by_name(tmp_path):
    changes = {"env.task": "MyTask", "policy.kind": "mine", "logging.out": str(tmp_path / "run")}
    reporter = Silent()
    done = train(load_config("toy", TOY | changes), reporter)
    assert reporter.rows[-1]["updates"] == 6
    assert isinstance(done.trainer.policy, GaussianPolicy)
    assert isinstance(done.trainer.env.env, ToyVecEnv)


def test_a_policy_that_was_trained_in_a_registered_environment_starts_there_again(tmp_path):
    """Nothing is known of its observations before it is built: neither cameras nor names."""
    spec = EnvSpec({"state": (4,), "images.top": (3, 28, 28)}, 2, 40, obs_keys=("own",), task="MyTask")
    policy = make_policy(PolicyConfig(), spec, 0)
    save_policy(tmp_path / "mine.safetensors", policy, PolicyConfig(), spec)
    changes = {"env.task": "MyTask", "policy.checkpoint": str(tmp_path / "mine.safetensors")}
    folder = check_start(load_config(None, changes | {"logging.out": str(tmp_path / "run")}))
    assert folder == tmp_path / "run"


def test_wrong_observations_are_found_whatever_the_policy_is(tmp_path):
    changes = {"policy.kind": "mine", "env.obs_keys": ["cube"], "logging.out": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match=r"env.obs_keys = \['cube'\]: Lift has no cube"):
        check_start(load_config(None, changes))


def test_the_process_stays_in_its_folder_whatever_building_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_vec_env(EnvConfig(task="MyTask"), 2, 3, 0)
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize(
    ("task", "named"),
    [
        ("Nothing", "returned None; expected asyncflow.envs.base.VecEnv"),
        ("FromNothing", r"cannot be called with 4 argument\(s\)"),
    ],
)
def test_an_entry_point_that_builds_no_environment_is_named(task, named):
    with pytest.raises(ContractError, match=rf"entry point {task} of asyncflow.envs \(added_package:.*{named}"):
        make_vec_env(EnvConfig(task=task), 2, 3, 0)


def test_what_an_entry_point_raises_itself_is_told_in_one_line():
    with pytest.raises(ConfigError, match=r"entry point Raising .*: raised KeyError: .*no robot") as caught:
        make_vec_env(EnvConfig(task="Raising"), 2, 3, 0)
    assert "\n" not in str(caught.value)


def test_environments_that_raise_when_they_are_closed_end_nothing(capsys):
    make_vec_env(EnvConfig(task="Sticky"), 2, 3, 0).close()
    assert "Sticky.close raised RuntimeError: the door is stuck" in capsys.readouterr().err


def test_an_entry_point_that_builds_no_policy_is_named():
    with pytest.raises(ContractError, match=r"entry point nothing .* returned None; expected asyncflow\.policies"):
        make_policy(PolicyConfig(kind="nothing", log_prob="joint_sum"), EnvSpec({"state": (4,)}, 2, 10), seed=0)


def test_episodes_that_are_cut_before_the_horizon_are_trained_alike_in_both_modes(tmp_path):
    changes = TOY | {"env.task": "Hasty", "buffer.max_policy_lag": 1, "trainer.total_updates": 4}
    runs = [record(tmp_path / mode, "toy", changes | {"trainer.buffer_type": mode}) for mode in ("vla", "standard")]
    assert all(map(torch.equal, runs[0][0], runs[1][0]))
    assert max(len(batch["truncated"].nonzero()) for batch in runs[0][1]) > 4  # of four environments, by the horizon
    assert runs[0][2] == runs[1][2]


def test_a_registered_environment_is_a_task_like_others():
    assert "MyTask" in task_names()
    assert make_vec_env(EnvConfig(task="MyTask", horizon=7), 2, 3, 0).spec.horizon == 7


def test_a_policy_that_cannot_be_imported_is_named():
    config = PolicyConfig(kind="broken", log_prob="joint_sum")
    with pytest.raises(ConfigError, match=r"entry point broken of asyncflow.policies \(added_package:missing\)"):
        make_policy(config, EnvSpec({"state": (4,)}, 2, 10), seed=0)


def test_an_unknown_policy_is_refused_with_those_that_exist():
    allowed = "flow, gaussian, vla, lerobot, broken, mine, nothing"
    with pytest.raises(ConfigError, match=rf"policy.kind = 'mime': not known; allowed: {allowed}"):
        load_config("toy", {"policy.kind": "mime"})


@pytest.mark.parametrize("task", ["Lift", "Toy", "ToyImages"])
def test_a_package_cannot_take_the_place_of_asyncflows_own_task(tmp_path, monkeypatch, task):
    install(tmp_path / "other", monkeypatch, f"[asyncflow.envs]\n{task} = added_package:build_env\n")
    said = f"env.task = {task}: asyncflow's own, and also an installed package's .*added_package:build_env of other-"
    with pytest.raises(ConfigError, match=said):
        check_start(load_config("toy", {"env.task": task, "logging.out": str(tmp_path / "run")}))
    with pytest.raises(ConfigError, match=said):
        make_vec_env(EnvConfig(task=task), 2, 3, 0)


def test_a_package_cannot_take_the_place_of_asyncflows_own_policy(tmp_path, monkeypatch):
    install(tmp_path / "other", monkeypatch, "[asyncflow.policies]\nflow = added_package:build_policy\n")
    with pytest.raises(ConfigError, match=r"policy.kind = flow: asyncflow's own, and also an installed package's"):
        check_start(load_config("toy", {"policy.kind": "flow", "logging.out": str(tmp_path / "run")}))


def test_a_package_task_does_not_get_the_preset_of_one_that_is_spelled_alike(tmp_path, monkeypatch):
    install(tmp_path / "other", monkeypatch, "[asyncflow.envs]\nLIFT = added_package:build_env\n")
    with pytest.raises(ConfigError, match=r"env.task = 'LIFT': no preset and no shipped weights"):
        choose_preset({"env.task": "LIFT"})


def test_one_name_of_two_packages_is_refused(tmp_path, monkeypatch):
    install(tmp_path / "other", monkeypatch, "[asyncflow.envs]\nMyTask = added_package:build_unnamed\n")
    with pytest.raises(ConfigError, match=r"entry point MyTask of asyncflow.envs: several are installed \(.*build_env"):
        make_vec_env(EnvConfig(task="MyTask"), 2, 3, 0)


@pytest.mark.parametrize("task", ["MyTask", "Toy"])
def test_a_task_and_a_description_of_another_environment_are_refused(tmp_path, task):
    (tmp_path / "meta.json").write_text("{}")
    config = EnvConfig(task=task, env_meta=str(tmp_path / "meta.json"))
    with pytest.raises(ConfigError, match=f"describes another environment than env.task = {task}"):
        make_vec_env(config, 2, 3, 0)


@pytest.mark.parametrize("task", ["MyTask", "Unnamed"])
def test_a_checkpoint_is_evaluated_in_the_registered_environment(tmp_path, task, monkeypatch):
    """Whatever the package's own environment says of its name, the toy's for one."""
    config = load_config(
        "toy", TOY | {"env.task": task, "trainer.total_updates": 1, "logging.out": str(tmp_path / "run")}
    )
    train(config, Silent())
    built = []
    monkeypatch.setattr(CheckedVecEnv, "close", lambda env: built.append(env.simulator_spec.task))
    evaluate_checkpoint(str(tmp_path / "run"), config, 2)
    assert built == [task]
