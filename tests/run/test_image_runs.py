"""Runs on images: the same function of configuration and seed in both modes and across a cut, and what is refused."""

import pytest
import torch
from command_line import CommandLine
from silent import LIFT, TOY, outcome, start

from asyncflow.config.presets import load_config
from asyncflow.config.sections import PolicyConfig
from asyncflow.errors import CheckpointError
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import save_policy
from asyncflow.run.build import check_start
from asyncflow.run.evaluate_file import evaluate_checkpoint
from asyncflow.simulators.spec import EnvSpec

TOY_IMAGES = TOY | {"env.task": "ToyImages", "policy.kind": "flow", "policy.hidden_sizes": [32]}
SMALL_POLICY = {"policy.checkpoint": None, "policy.hidden_sizes": [32], "policy.critic_hidden_sizes": [16]}
LIFT_IMAGE = LIFT | SMALL_POLICY | {"env.camera_size": [24, 20], "env.num_envs": 2, "buffer.buffer_size": 8}


def test_training_changes_the_image_encoder(tmp_path):
    start(tmp_path / "run", "toy", TOY_IMAGES | {"trainer.total_updates": 2, "trainer.save_interval": 1})
    trained, optimizer = outcome(tmp_path / "run")[0], outcome(tmp_path / "run")[1]["optimizer"]
    config = load_config("toy", TOY_IMAGES)
    spec = EnvSpec({"state": (4,), "images.top": (3, 28, 28)}, 2, 40)
    fresh = make_policy(config.policy, spec, config.trainer.seed).state_dict()
    name = "image_encoder.cameras.top.0.weight"
    assert not torch.equal(trained[name], fresh[name])
    assert any(name in key for key in optimizer)


@pytest.fixture
def checkpoint(tmp_path):
    obs_keys = tuple(load_config("lift_image").env.obs_keys)
    spec = EnvSpec({"state": (9,), "images.agentview": (3, 24, 20)}, 7, 12, obs_keys=obs_keys)
    policy = make_policy(PolicyConfig(), spec, 0)
    save_policy(tmp_path / "seeing.safetensors", policy, PolicyConfig(), spec)
    return str(tmp_path / "seeing.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env.cameras": []}, r"the run has env.cameras = \[\], env.n_obs_steps = 1"),
        ({"env.cameras": ["frontview"]}, r"made for env.cameras = \['agentview'\].* has env.cameras = \['frontview'\]"),
        ({"env.camera_size": [24, 24]}, r"camera_size = \[24, 20\].*camera_size = \[24, 24\]"),
        ({"env.n_obs_steps": 2}, r"n_obs_steps = 1; .*n_obs_steps = 2"),
    ],
)
def test_a_checkpoint_made_for_other_images_is_refused_before_simulators_are_built(checkpoint, changes, message):
    same = {"policy.checkpoint": checkpoint, "env.camera_size": [24, 20]}
    check_start(load_config("lift_image", same))
    with pytest.raises(CheckpointError, match=message):
        check_start(load_config("lift_image", same | changes))


def test_an_unknown_camera_is_one_line_and_exit_code_2(run_here: CommandLine):
    for command in (
        ["train", "--checkpoint", "lift_flow", "env.cameras=[agentveiw]"],
        ["demos", "--cameras", "agentveiw"],
    ):
        done = run_here(*command)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(
            "asyncflow: error: env.cameras: there is no camera 'agentveiw'; cameras: frontview"
        )
        assert done.stderr.count("\n") == 1


@pytest.mark.sim
def test_without_a_renderer_a_run_ends_with_one_line_and_exit_code_2(run_cli: CommandLine, monkeypatch, tmp_path):
    monkeypatch.setenv("MUJOCO_GL", "glfw")  # needs a screen
    done = run_cli("train", "--config", "lift_image", "--num-envs", "1", "policy.checkpoint=null")
    assert done.returncode == 2
    assert done.stderr.startswith("asyncflow: error: env.cameras: cannot render: MUJOCO_GL = glfw")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.sim
@pytest.mark.slow
def test_a_policy_that_sees_is_evaluated_with_its_own_cameras(tmp_path):
    start(tmp_path / "run", "lift_image", LIFT_IMAGE | {"trainer.total_updates": 1, "env.n_obs_steps": 2})
    config = load_config("lift", {"env.num_envs": 1, "env.num_workers": 1, "trainer.device": "cpu"})
    assert evaluate_checkpoint(str(tmp_path / "run"), config, 1).num_episodes == 1
