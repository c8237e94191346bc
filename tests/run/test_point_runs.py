"""Runs on point clouds: the same function of configuration and seed in both modes and across a cut."""

import pytest
import torch
from command_line import CommandLine
from silent import LIFT, TOY, Silent, outcome, start
from test_trainer import assert_same, run

from asyncflow.config.presets import load_config
from asyncflow.config.sections import PolicyConfig
from asyncflow.envs.toy import NUM_POINTS, ToyVecEnv
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import load_policy_file, save_policy
from asyncflow.run.build import check_start
from asyncflow.run.evaluate_file import evaluate_checkpoint
from asyncflow.run.launch import train
from asyncflow.simulators.spec import EnvSpec

TOY_POINTS = TOY | {"env.task": "ToyPoints", "policy.kind": "flow", "policy.hidden_sizes": [32]}
SMALL_POLICY = {"policy.checkpoint": None, "policy.hidden_sizes": [32], "policy.critic_hidden_sizes": [16]}
SEEING = {"env.point_clouds": ["agentview"], "env.camera_size": [48, 48]}
LIFT_POINTS = LIFT | SMALL_POLICY | SEEING | {"env.num_envs": 2, "buffer.buffer_size": 8}
SETTINGS = {"num_points": 64, "point_bounds": [-0.5, -0.5, 0.805, 0.5, 0.5, 1.5], "camera_size": [24, 20]}


def test_training_changes_the_point_encoder(tmp_path):
    start(tmp_path / "run", "toy", TOY_POINTS | {"trainer.total_updates": 2, "trainer.save_interval": 1})
    trained, optimizer = outcome(tmp_path / "run")[0], outcome(tmp_path / "run")[1]["optimizer"]
    config = load_config("toy", TOY_POINTS)
    spec = ToyVecEnv(1, 2, tasks=["ToyPoints"]).spec
    fresh = make_policy(config.policy, spec, config.trainer.seed).state_dict()
    name = "point_encoder.cameras.top.points.0.weight"
    assert not torch.equal(trained[name], fresh[name])
    assert torch.equal(trained["point_encoder.normalizer.scale"], fresh["point_encoder.normalizer.scale"])
    assert any(name in key for key in optimizer)


def test_the_plan_counts_the_bytes_of_the_clouds(tmp_path):
    reporters = [Silent(), Silent()]
    for reporter, task in zip(reporters, ("Toy", "ToyPoints"), strict=True):
        out = {"logging.out": str(tmp_path / task), "trainer.total_updates": 1, "trainer.buffer_type": "standard"}
        done = train(load_config("toy", TOY_POINTS | out | {"env.task": task}), reporter)
    plan = done.trainer.channel.buffer.plan
    rows = (plan.num_steps + 1 + plan.max_truncations) * plan.num_envs
    assert reporters[1].ring_bytes - reporters[0].ring_bytes == rows * NUM_POINTS * 6 * 4


def test_a_policy_that_sees_points_is_evaluated_where_it_was_trained(tmp_path):
    start(tmp_path / "run", "toy", TOY_POINTS | {"trainer.total_updates": 1})
    assert evaluate_checkpoint(str(tmp_path / "run"), load_config("toy", TOY), 3).num_episodes == 3


@pytest.mark.sim
@pytest.mark.slow
def test_vla_equals_standard_on_lifts_points(tmp_path):
    changes = LIFT_POINTS | {"buffer.max_policy_lag": 1, "trainer.total_updates": 2}
    vla = run(tmp_path, "lift", changes | {"trainer.buffer_type": "vla"})
    standard = run(tmp_path, "lift", changes | {"trainer.buffer_type": "standard"})
    assert all(batch["obs", "points", "agentview"].any(2).any(1).all() for batch in vla[1])
    assert_same(vla, standard)


@pytest.mark.sim
@pytest.mark.slow
def test_a_policy_that_sees_lifts_points_is_evaluated_with_its_own_box_and_size(tmp_path, monkeypatch):
    bounds = [-0.4, -0.4, 0.81, 0.4, 0.4, 1.2]
    changes = {"trainer.total_updates": 1, "env.point_bounds": bounds, "env.num_points": 100}
    start(tmp_path / "run", "lift", LIFT_POINTS | changes)
    spec = load_policy_file(tmp_path / "run" / "checkpoints" / "last" / "policy.safetensors").env_spec
    assert spec.rendered_with == {"num_points": 100, "point_bounds": bounds, "camera_size": [48, 48]}
    config = load_config("lift", {"env.num_envs": 1, "env.num_workers": 1, "trainer.device": "cpu"})
    assert evaluate_checkpoint(str(tmp_path / "run"), config, 1).num_episodes == 1


@pytest.fixture
def checkpoint(tmp_path):
    obs_keys = tuple(load_config("lift_image").env.obs_keys)
    shapes = {"state": (9,), "points.agentview": (64, 6)}
    spec = EnvSpec(shapes, 7, 12, obs_keys=obs_keys, rendered_with=SETTINGS)
    policy = make_policy(PolicyConfig(), spec, 0)
    save_policy(tmp_path / "seeing.safetensors", policy, PolicyConfig(), spec)
    return str(tmp_path / "seeing.safetensors")


def test_a_file_carries_the_clouds_it_was_made_for(checkpoint):
    spec = load_policy_file(checkpoint).env_spec
    assert (spec.rendered, spec.rendered_with) == ({"points": {"agentview": (64, 6)}}, SETTINGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env.point_clouds": []}, r"the run has env.cameras = \[\], env.n_obs_steps = 1$"),
        ({"env.point_clouds": ["frontview"]}, r"point_clouds = \['agentview'\].*point_clouds = \['frontview'\]"),
        ({"env.num_points": 65}, r"num_points = 64.*num_points = 65"),
        ({"env.camera_size": [24, 24]}, r"camera_size = \[24, 20\].*camera_size = \[24, 24\]"),
        ({"env.point_bounds": [-1, -1, 0.8, 1, 1, 2]}, r"point_bounds = \[-0.5, .*point_bounds = \[-1.0, "),
        ({"env.n_obs_steps": 2}, r"n_obs_steps = 1.*n_obs_steps = 2"),
    ],
)
def test_a_checkpoint_made_for_other_clouds_is_refused_before_simulators_are_built(checkpoint, changes, message):
    same = {f"env.{key}": value for key, value in SETTINGS.items()}
    same |= {"policy.checkpoint": checkpoint, "env.cameras": [], "env.point_clouds": ["agentview"]}
    check_start(load_config("lift_image", same))
    with pytest.raises(CheckpointError, match=message):
        check_start(load_config("lift_image", same | changes))


def test_a_vla_on_points_is_refused_before_simulators_are_built():
    changes = {"policy.kind": "vla", "policy.checkpoint": None, "env.point_clouds": ["agentview"]}
    with pytest.raises(ConfigError, match=r"policy\.kind = vla: asyncflow's own model sees no point clouds"):
        check_start(load_config("lift", changes))


def test_an_unknown_camera_of_a_cloud_is_one_line_and_exit_code_2(run_here: CommandLine):
    for command in (
        ["train", "--checkpoint", "lift_flow", "env.point_clouds=[agentveiw]"],
        ["demos", "--point-clouds", "agentveiw"],
    ):
        done = run_here(*command)
        assert (done.returncode, done.stdout) == (2, "")
        expected = "asyncflow: error: env.point_clouds: there is no camera 'agentveiw'; cameras: frontview"
        assert done.stderr.startswith(expected)
        assert done.stderr.count("\n") == 1
