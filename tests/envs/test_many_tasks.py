"""Environments are spread over tasks evenly, share one layout, and tell which task each has."""

import pytest
import torch

from asyncflow.config.policy import MappingConfig
from asyncflow.config.presets import load_config
from asyncflow.config.sections import EnvConfig, validate
from asyncflow.config.suites import TaskSpec
from asyncflow.envs import make_vec_env
from asyncflow.envs.mapping import NameMapping, map_names
from asyncflow.envs.tasks import join_tasks
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.errors import ConfigError
from asyncflow.simulators.spec import EnvSpec

N, H = 5, 2
TASKS = ["ToyGreen", "ToyBlue"]


def make(num_envs=N, **keys):
    return make_vec_env(EnvConfig(tasks=TASKS, num_envs=num_envs, **keys), H, num_envs, seed=0)


def approach(state, goal):
    """Return the chunk that moves straight to a goal, [n, H, 2]."""
    target = state[:, 2 + 2 * goal : 4 + 2 * goal]
    return ((target - state[:, :2])[:, None] * 10 / H).clamp(-1, 1).expand(-1, H, -1)


def run(env, goal, num_decisions=12):
    """Go to one goal in all environments; return successes and ends of each, [N]."""
    state, succeeded, ended = env.reset(0)["state"], torch.zeros(N), torch.zeros(N)
    for _ in range(num_decisions):
        env.step_async(approach(state, goal), range(N))
        result = env.step_wait(range(N))
        state = result.obs["state"]
        succeeded += result.is_success
        ended += result.terminated
    return succeeded, ended


def test_environments_take_the_tasks_in_turn_and_observe_which_one():
    env = make()
    assert [task.name for task in env.spec.tasks] == TASKS
    assert env.reset(0)["task"].tolist() == [0, 1, 0, 1, 0]
    env.step_async(torch.zeros(2, H, 2), range(1, 5, 2))
    result = env.step_wait(range(1, 5, 2))
    assert result.obs["task"].tolist() == result.final_obs["task"].tolist() == [1, 1]
    assert env.spec.empty_obs(N)["task"].dtype == torch.int64


def test_only_the_goal_of_the_instruction_is_a_success_and_either_ends_the_episode():
    for goal in (0, 1):
        succeeded, ended = run(make(), goal)
        own = torch.arange(N) % 2 == goal
        assert (ended > 0).all()
        assert torch.equal(succeeded[own], ended[own])
        assert succeeded[~own].sum() == 0


def test_a_step_is_paid_by_how_much_nearer_it_leads_to_the_goal_of_the_instruction():
    env = make()
    state = env.reset(0)["state"]
    env.step_async(approach(state, 1), range(N))
    rewards = env.step_wait(range(N)).rewards
    assert (rewards[1::2] > 0.05).all()
    assert (rewards[1::2] > rewards[::2].max()).all()


def test_one_task_alone_has_no_index():
    env = make_vec_env(EnvConfig(tasks=["ToyBlue"]), H, N, seed=0)
    assert "task" not in env.reset(0).keys()  # noqa: SIM118
    assert env.spec.task_table == (TaskSpec("ToyBlue", "go blue", 40),)


def test_a_suite_stands_for_its_tasks_whichever_key_names_it():
    for keys in ({"env.task": "ToyLanguage"}, {"env.tasks": ["ToyLanguage"]}):
        config = load_config("toy_vla_tiny", keys).env
        assert (config.tasks, config.task_label) == (TASKS, "ToyLanguage")


def test_the_index_passes_a_mapping_of_names():
    env = make()
    mapping = NameMapping(MappingConfig.model_validate({"obs": {"images": {"top": "front"}}}), env.spec)
    mapped = map_names(env, mapping)
    obs = mapped.reset(0)
    assert obs["task"].tolist() == [0, 1, 0, 1, 0]
    assert set(mapped.spec.obs) == {"state", "images.front", "task"}


def test_the_longest_horizon_counts_for_all_and_the_shortest_sizes_the_ring():
    spec = join_tasks([EnvSpec({"state": (3,)}, 2, horizon) for horizon in (30, 10, 20)], ["a", "b", "c"])
    assert (spec.horizon, spec.shortest_horizon) == (30, 10)
    assert [task.horizon for task in spec.tasks] == [30, 10, 20]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (EnvSpec({"state": (4,)}, 2, 10), r"A and B differ in obs: {'state': \[3\]} and {'state': \[4\]}"),
        (EnvSpec({"state": (3,)}, 7, 10), "A and B differ in action_dim: 2 and 7"),
        (EnvSpec({"state": (3,)}, 2, 10, action_high=(1.0, 2.0)), r"A and B differ in action_high: \(\) and \(1.0, 2"),
    ],
)
def test_tasks_that_observe_or_act_otherwise_are_refused_in_one_line(other, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        join_tasks([EnvSpec({"state": (3,)}, 2, 10), other], ["A", "B"])
    assert "\n" not in str(refusal.value)


def test_toys_that_differ_are_refused():
    with pytest.raises(ConfigError, match=r"env\.tasks: Toy and ToyGreen differ in obs"):
        ToyVecEnv(N, H, tasks=["Toy", "ToyGreen"])


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"tasks": ["Lift", "Can", "Lift"]}, "names Lift twice"),
        ({"tasks": TASKS, "num_envs": 1}, "env.num_envs = 1 must be at least 2, the number of tasks"),
        ({"tasks": TASKS, "env_meta": {}}, "env.env_meta describes one task"),
        ({"tasks": [1]}, r"env.tasks\[0\]"),
    ],
)
def test_impossible_lists_of_tasks_are_refused(env, message):
    with pytest.raises(ConfigError, match=message):
        validate({"env": env, "buffer": {"buffer_size": 32}})


def test_an_evaluation_has_an_episode_for_every_task():
    with pytest.raises(ConfigError, match=r"trainer\.eval_episodes = 1 must be at least 2"):
        validate({"env": {"tasks": TASKS}, "trainer": {"eval_episodes": 1}})


def test_a_toy_has_no_other_interpreter():
    with pytest.raises(ConfigError, match=r"^env.python = /there: Toy is simulated here; leave it out"):
        make_vec_env(EnvConfig(task="Toy", python="/there"), 2, 2, 0)
