"""Entry points of other packages."""

import pytest
from silent import TOY, Silent

from asyncflow.build import check_start
from asyncflow.config import EnvConfig, PolicyConfig
from asyncflow.envs import make_vec_env, task_names
from asyncflow.envs.base import EnvSpec
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.errors import ConfigError
from asyncflow.launch import train
from asyncflow.policies import GaussianPolicy, make_policy
from asyncflow.policy_file import save_policy
from asyncflow.presets import load_config

PACKAGE = """
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.policies import make_policy

def build_policy(config, obs_shapes, action_dim, image_shapes):
    return make_policy(config.model_copy(update={"kind": "gaussian"}), obs_shapes, action_dim, 0, image_shapes)

def build_env(config, chunk_length, num_envs, seed):
    return ToyVecEnv(num_envs, chunk_length, config.horizon)
"""
ENTRY_POINTS = """
[asyncflow.policies]
mine = added_package:build_policy
broken = added_package:missing

[asyncflow.envs]
MyTask = added_package:build_env
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


def test_a_registered_policy_and_environment_are_trained_by_name(tmp_path):
    changes = {"env.task": "MyTask", "policy.kind": "mine", "logging.out": str(tmp_path / "run")}
    reporter = Silent()
    done = train(load_config("toy", TOY | changes), reporter)
    assert reporter.rows[-1]["updates"] == 6
    assert isinstance(done.parts.policy, GaussianPolicy)
    assert isinstance(done.parts.env, ToyVecEnv)


def test_a_policy_that_was_trained_in_a_registered_environment_starts_there_again(tmp_path):
    """Nothing is known of its observations before it is built: neither cameras nor names."""
    spec = EnvSpec({"state": (4,)}, 2, 40, obs_keys=("own",), image_shapes={"top": (3, 28, 28)}, task="MyTask")
    policy = make_policy(PolicyConfig(), spec.obs_shapes, 2, 0, spec.image_shapes)
    save_policy(tmp_path / "mine.safetensors", policy, PolicyConfig(), spec)
    changes = {"env.task": "MyTask", "policy.checkpoint": str(tmp_path / "mine.safetensors")}
    folder = check_start(load_config(None, changes | {"logging.out": str(tmp_path / "run")}))
    assert folder == tmp_path / "run"


def test_wrong_observations_are_found_whatever_the_policy_is(tmp_path):
    changes = {"policy.kind": "mine", "env.obs_keys": ["cube"], "logging.out": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match=r"env.obs_keys = \['cube'\]: Lift has no cube"):
        check_start(load_config(None, changes))


def test_a_registered_environment_is_a_task_like_others():
    assert "MyTask" in task_names()
    assert make_vec_env(EnvConfig(task="MyTask", horizon=7), 2, 3, 0).spec.horizon == 7


def test_a_policy_that_cannot_be_imported_is_named():
    config = PolicyConfig(kind="broken", log_prob="joint_sum")
    with pytest.raises(ConfigError, match=r"entry point broken of asyncflow.policies \(added_package:missing\)"):
        make_policy(config, {"state": (4,)}, 2, seed=0)


def test_an_unknown_policy_is_refused_with_those_that_exist():
    with pytest.raises(
        ConfigError, match=r"policy.kind = 'mime': not known; allowed: flow, gaussian, vla, lerobot, broken, mine"
    ):
        load_config("toy", {"policy.kind": "mime"})
