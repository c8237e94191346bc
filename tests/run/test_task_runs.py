"""Runs on several tasks: alike in both modes and across a cut, counted by task, told by one index a decision."""

import pytest
import torch
from silent import LIFT, TOY, Silent, assert_equal, build, go_on, outcome, start
from test_trainer import assert_same, run

import asyncflow as af
from asyncflow.config.presets import load_config
from asyncflow.demos.record import DemoOptions, collect_demos
from asyncflow.errors import ConfigError
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import load_policy_file
from asyncflow.run.build import check_start
from asyncflow.run.evaluate_file import evaluate_checkpoint
from asyncflow.run.folder import name_tasks
from asyncflow.run.launch import train

LANGUAGE = TOY | {"env.horizon": 8, "trainer.total_updates": 3, "algorithm.lr_warmup_updates": 0}


@pytest.mark.parametrize("kind", ["vla", "gaussian"])
@pytest.mark.parametrize("scope", ["all", "task"])
def test_vla_equals_standard_with_several_tasks(tmp_path, kind, scope):
    changes = LANGUAGE | {"policy.kind": kind, "algorithm.advantage_scope": scope, "buffer.max_policy_lag": 1}
    vla = run(tmp_path, "toy_language", changes | {"trainer.buffer_type": "vla", "collector.num_env_groups": 2})
    standard = run(
        tmp_path, "toy_language", changes | {"trainer.buffer_type": "standard", "collector.num_env_groups": 2}
    )
    assert "task" in vla[1][0]["obs"].keys()  # noqa: SIM118
    assert_same(vla, standard)


def test_a_cut_run_with_several_tasks_ends_like_the_uncut_one(tmp_path):
    changes = LANGUAGE | {"trainer.total_updates": 4}
    start(tmp_path / "whole", "toy_language", changes)
    start(tmp_path / "cut", "toy_language", changes, stop_at=2)
    go_on(tmp_path / "cut")
    assert_equal(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))


def test_the_instruction_takes_one_number_of_a_decision_in_the_ring():
    plans = []
    for task in ("ToyLanguage", "ToyGreen"):
        trainer = build(load_config("toy_language", LANGUAGE | {"env.task": task}))
        plans.append(trainer.collecting.plan)
        trainer.close()
    obs = [dict(plan.obs.items(True, True)) for plan in plans]
    assert obs[0].keys() - obs[1].keys() == {"task"}
    assert obs[0]["task"].dtype == torch.int64
    assert plans[0].obs.bytes() - plans[1].obs.bytes() == 8 * plans[0].num_envs


def test_rollouts_and_evaluations_are_counted_by_task(tmp_path):
    reporter = start(
        tmp_path / "run", "toy_language", LANGUAGE | {"trainer.eval_interval": 3, "trainer.eval_episodes": 5}
    )
    row = reporter.rows[-1]
    counts = [row[f"rollout/num_episodes/{task}"] for task in ("ToyGreen", "ToyBlue")]
    assert sum(counts) == row["rollout/num_episodes"]
    assert min(counts) > 0
    rates = [row[f"eval/success_rate/{task}"] for task in ("ToyGreen", "ToyBlue")]
    assert row["eval/success_rate"] == pytest.approx((3 * rates[0] + 2 * rates[1]) / 5)


def test_a_file_of_a_policy_for_several_tasks_is_evaluated_on_each(tmp_path):
    start(tmp_path / "run", "toy_language", LANGUAGE | {"trainer.total_updates": 1})
    spec = load_policy_file(tmp_path / "run" / "checkpoints" / "last" / "policy.safetensors").env_spec
    assert [task.instruction for task in spec.tasks] == ["go green", "go blue"]
    result = evaluate_checkpoint(str(tmp_path / "run"), load_config("toy", TOY), 5)
    assert [(task.name, task.num_episodes) for task in result.tasks] == [("ToyGreen", 3), ("ToyBlue", 2)]
    with pytest.raises(ConfigError, match="made for 2 tasks"):
        evaluate_checkpoint(str(tmp_path / "run"), load_config("toy", TOY), 1)


@pytest.mark.parametrize("kind", ["vla", "gaussian", "flow"])
def test_decision_and_value_depend_on_the_task_of_the_observation_alone(kind):
    config = load_config("toy_language", {"policy.kind": kind})
    trainer = build(load_config("toy_language", LANGUAGE | {"policy.kind": kind}))
    obs = trainer.env.reset(0)[:1].expand(2).clone()
    trainer.close()
    obs["task"] = torch.tensor([0, 1])
    policy = make_policy(config.policy, trainer.env.spec, seed=0)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    noise = torch.zeros(2, policy.noise_size)
    actions, values = policy.sample_actions(obs, "eval", noise)["actions"], policy.get_value(obs)
    swapped = obs.clone().set("task", torch.tensor([1, 0]))
    assert not torch.allclose(actions[0], actions[1])
    assert not torch.isclose(values[0], values[1])
    assert torch.allclose(policy.sample_actions(swapped, "eval", noise)["actions"], actions.flip(0), atol=1e-6)


def test_an_instruction_of_the_configuration_stands_in_place_of_the_tasks_own(tmp_path):
    config = load_config("toy_language", {"policy.vla.instruction": "reach a goal"})
    trainer = build(load_config("toy_language", LANGUAGE))
    policy = make_policy(config.policy, trainer.env.spec, seed=0)
    trainer.close()
    obs = trainer.env.spec.empty_obs(2)
    obs["task"] = torch.tensor([0, 1])
    actions = policy.sample_actions(obs, "eval", torch.zeros(2, policy.noise_size))["actions"]
    assert torch.equal(actions[0], actions[1])
    assert policy.model.backbone.instructions.shape == (1, len("reach a goal") + 1)


def test_a_frozen_backbone_reads_the_instruction_too(tmp_path):
    reporter = Silent()
    changes = LANGUAGE | {"policy.freeze_backbone": True, "logging.out": str(tmp_path / "run")}
    done = train(load_config("toy_language", changes | {"algorithm.advantage_scope": "task"}), reporter)
    assert set(done.trainer.collecting.plan.obs.keys()) == {"prefix"}
    assert "rollout/success_rate/ToyGreen" in reporter.rows[-1]


@pytest.mark.sim
@pytest.mark.slow
def test_vla_equals_standard_with_several_tasks_of_robosuite(tmp_path):
    """Each robot is told what its task is about, and meets its own horizon."""
    keys = ["robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"]
    own = {"env.tasks": ["Lift", "Door"], "env.obs_keys": keys, "policy.kind": "gaussian", "policy.checkpoint": None}
    sizes = {"policy.hidden_sizes": [16], "policy.critic_hidden_sizes": [16], "env.horizon": None}
    changes = LIFT | own | sizes | {"buffer.max_policy_lag": 1, "trainer.total_updates": 2}
    vla = run(tmp_path, "lift", changes | {"trainer.buffer_type": "vla"})
    standard = run(tmp_path, "lift", changes | {"trainer.buffer_type": "standard", "env.num_workers": 1})
    assert_same(vla, standard)
    spec = load_policy_file(tmp_path / "run0" / "checkpoints" / "last" / "policy.safetensors").env_spec
    assert [(task.name, task.instruction, task.horizon) for task in spec.tasks] == [
        ("Lift", "lift a cube from the table", 400),
        ("Door", "turn the handle and open the door", 400),
    ]
    config = load_config("lift", {"env.num_envs": 2, "env.num_workers": 1, "trainer.device": "cpu"})
    assert evaluate_checkpoint(str(tmp_path / "run0"), config, 2).tasks[1].num_episodes == 1


def test_robosuite_tasks_that_observe_otherwise_are_refused_before_a_simulator_is_built(tmp_path):
    config = load_config(None, LIFT | {"env.tasks": ["Lift", "Stack"], "logging.out": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=r"^env\.tasks: Lift and Stack differ in obs: .*19.* and .*32"):
        check_start(config)


def test_fewer_observations_may_make_tasks_alike(tmp_path):
    keys = ["robot0_eef_pos", "robot0_eef_quat"]
    own = {"env.tasks": ["Lift", "Stack"], "env.obs_keys": keys, "logging.out": str(tmp_path / "run")}
    check_start(load_config(None, LIFT | own))


def test_a_program_trains_and_evaluates_on_a_suite_and_no_policy_of_it_on_one_task_alone():
    env = af.make_env("ToyLanguage", num_envs=4, n_action_steps=2)
    policy = af.make_policy("gaussian", env, hidden_sizes=[8], critic_hidden_sizes=[8])
    with af.Trainer(policy, env, buffer_size=16, buffer_type="standard") as trainer:
        assert "rollout/num_episodes/ToyBlue" in trainer.train(total_updates=1)
    assert [task.name for task in af.evaluate(policy, "ToyLanguage", 4, num_envs=2).tasks] == ["ToyGreen", "ToyBlue"]
    with pytest.raises(ConfigError, match="made for 2 tasks and the environments have 1"):
        af.evaluate(policy, "ToyGreen", 4)


def test_nothing_is_done_with_the_default_task_where_several_are_named(tmp_path):
    env = load_config(None, {"env.tasks": ["Lift", "Door"]}).env
    with pytest.raises(ConfigError, match=r"env\.task = Lift\+Door: no scripted expert"):
        collect_demos(env, tmp_path / "demos.hdf5", DemoOptions(num_demos=1))
    assert (
        name_tasks(load_config(None, {"env.tasks": ["libero_goal/0", "libero_goal/1"]}))
        == "libero_goal-0+libero_goal-1"
    )
