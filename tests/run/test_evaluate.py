import math
from dataclasses import replace

import pytest
import torch
from tensordict import TensorDict

from asyncflow.config.sections import PolicyConfig
from asyncflow.config.suites import TaskSpec
from asyncflow.envs.base import ChunkResult, Fault, VecEnv
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.errors import ConfigError, EnvError
from asyncflow.policies import make_policy
from asyncflow.run.evaluate import contiguous_runs, episode_quotas, evaluate, wilson_interval
from asyncflow.simulators.spec import EnvSpec

CONFIG = PolicyConfig(hidden_sizes=[8], critic_hidden_sizes=[8], horizon=2, n_action_steps=2)


class ScriptedVecEnv(VecEnv):
    """Environment i needs i + 1 decisions an episode; even ones succeed. Its observation is (i, decisions taken).

    Decisions in `breaking`, pairs of an environment and the count of its decisions, break its episode.
    """

    def __init__(self, num_envs, breaking=()):
        self.num_envs = num_envs
        self.breaking = set(breaking)
        self.spec = EnvSpec({"state": (2,)}, 2, 100)
        self.num_decisions = torch.zeros(num_envs, dtype=torch.int64)
        self.seeds = []
        self._under_way = set()

    def reset(self, seed, journal=None):
        self.seeds.append(seed)
        self.num_decisions.zero_()
        self.num_lost = torch.zeros_like(self.num_decisions)
        return self._observe(range(self.num_envs))

    def step_async(self, actions, env_ids):
        assert actions.shape == (len(env_ids), 2, 2)
        assert actions.abs().max() <= 1
        assert not self._under_way & set(env_ids)
        self._under_way |= set(env_ids)
        self.num_decisions[list(env_ids)] += 1

    def step_wait(self, env_ids):
        assert self._under_way >= set(env_ids)
        self._under_way -= set(env_ids)
        ids = torch.tensor(env_ids)
        broken = torch.tensor([(env, int(self.num_decisions[env])) in self.breaking for env in env_ids])
        self.num_lost[ids[broken]] = self.num_decisions[ids[broken]]
        ended = ~broken & ((self.num_decisions - self.num_lost)[ids] % (ids + 1) == 0)
        obs, rewards = self._observe(env_ids), torch.zeros(len(ids), 2)
        executed = torch.full_like(ids, 2)
        return ChunkResult(
            obs=obs,
            final_obs=obs,
            rewards=rewards,
            executed=executed,
            terminated=ended & (ids % 2 == 0),
            truncated=ended & (ids % 2 == 1),
            episode_return=(ended & (ids % 2 == 0)).float(),
            episode_length=(2 * (ids + 1)) * ended,
            broken=broken,
            faults=(Fault("died", "a worker died"),) if broken.any() else (),
        )

    def journal(self):
        return EpisodeJournal.start(self.num_envs)

    def interrupt(self):
        pass

    def close(self):
        pass

    def _observe(self, env_ids):
        ids = torch.tensor(env_ids)
        return TensorDict({"state": torch.stack([ids, self.num_decisions[ids]], 1).float()}, [len(ids)])


class RecordingPolicy(torch.nn.Module):
    """Remembers what it was asked."""

    horizon, n_action_steps, action_dim, noise_size = 3, 2, 2, 1

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.calls = []

    def sample_actions(self, obs, mode, noise):
        self.calls.append((obs["state"].clone(), mode, noise))
        return TensorDict({"actions": torch.full((len(noise), 3, 2), 5.0)}, [len(noise)])


def make_toy_policy():
    return make_policy(CONFIG, EnvSpec({"state": (4,)}, 2, 10), seed=0)


def without_time(result):
    return [value for name, value in vars(result).items() if name != "wall_s"]


@pytest.mark.parametrize(("num_episodes", "num_envs"), [(1, 3), (3, 3), (7, 3), (50, 8)])
def test_quotas_add_up_and_differ_by_at_most_one(num_episodes, num_envs):
    quotas = episode_quotas(num_episodes, num_envs)
    assert quotas.sum() == num_episodes
    assert quotas.max() - quotas.min() <= 1


@pytest.mark.parametrize(("num_episodes", "num_envs"), [(7, 5), (20, 6), (3, 3), (100, 7)])
def test_tasks_share_episodes_evenly_and_so_do_the_environments_of_a_task(num_episodes, num_envs):
    quotas = episode_quotas(num_episodes, num_envs, num_tasks=3)
    of_tasks = [quotas[task::3] for task in range(3)]
    totals = [int(each.sum()) for each in of_tasks]
    assert sum(totals) == num_episodes
    assert totals == sorted(totals, reverse=True)
    assert max(totals) - min(totals) <= 1
    assert all(each.max() - each.min() <= 1 for each in of_tasks)


def test_more_tasks_than_episodes_or_environments_are_refused():
    for num_episodes, num_envs in ((2, 3), (3, 2)):
        with pytest.raises(ConfigError, match=f"evaluation of 3 tasks .* it has {num_episodes} and {num_envs}"):
            episode_quotas(num_episodes, num_envs, 3)


def test_each_task_has_a_result_and_all_have_one_together():
    env = ScriptedVecEnv(4)  # environments 0 and 2 succeed, which have the first task
    tasks = (TaskSpec("even", "", 100), TaskSpec("odd", "", 100))
    env.spec = replace(env.spec, tasks=tasks)
    result = evaluate(make_policy(CONFIG, EnvSpec({"state": (2,)}, 2, 100), seed=0), env, 6, seed=0)
    assert [(task.name, task.num_successes, task.num_episodes) for task in result.tasks] == [
        ("even", 3, 3),
        ("odd", 0, 3),
    ]
    assert (result.num_successes, result.num_episodes) == (3, 6)
    assert result.as_metrics()["eval/success_rate"] == 0.5
    assert result.as_metrics()["eval/success_rate/even"] == 1.0
    assert result.tasks[0].success_low == wilson_interval(3, 3)[0]
    total = sum(task.episode_length * task.num_episodes for task in result.tasks)
    assert total == pytest.approx(result.episode_length * 6)


def test_every_environment_runs_its_quota_and_no_more():
    vec_env = ScriptedVecEnv(4)
    evaluate(RecordingPolicy(), vec_env, 6, seed=0)
    assert vec_env.num_decisions.tolist() == [2 * 1, 2 * 2, 1 * 3, 1 * 4]


def test_environments_get_actions_within_their_limits():
    vec_env, seen = ScriptedVecEnv(1), []
    vec_env.spec = replace(vec_env.spec, action_low=(-1.0, -math.inf), action_high=(0.25, math.inf))
    step_async = vec_env.step_async
    vec_env.step_async = lambda actions, ids: (seen.append(actions), step_async(actions.clamp(-1, 1), ids))
    evaluate(RecordingPolicy(), vec_env, 1, seed=0)  # which decides 5 everywhere
    assert seen[0].unique(dim=1).tolist() == [[[0.25, 5.0]]]


def test_statistics_are_those_of_the_quotas():
    result = evaluate(RecordingPolicy(), ScriptedVecEnv(4), 6, seed=0)
    assert (result.num_episodes, result.num_successes) == (6, 3)
    assert result.episode_length == pytest.approx(2 * (1 + 1 + 2 + 2 + 3 + 4) / 6)
    assert result.episode_return == pytest.approx(0.5)


def test_without_successes_the_return_is_the_score_and_no_rate_is_logged():
    vec_env = ScriptedVecEnv(4)
    assert evaluate(RecordingPolicy(), vec_env, 6, seed=0).score == 0.5
    vec_env.spec = replace(vec_env.spec, has_success=False)
    step_wait = vec_env.step_wait
    vec_env.step_wait = lambda ids: replace(step_wait(ids), episode_return=torch.full((len(ids),), -2.0))
    result = evaluate(RecordingPolicy(), vec_env, 6, seed=0)
    assert result.score == result.episode_return < -2
    assert all(map(math.isnan, (result.success_rate, result.success_low, result.success_high)))
    assert set(result.as_metrics()) == {"eval/episode_length", "eval/episode_return"}


def test_progress_is_told_in_finished_episodes():
    told = []
    evaluate(RecordingPolicy(), ScriptedVecEnv(4), 6, seed=0, on_decision=told.append)
    assert told == [0, 1, 3, 4]  # one after another; the last two with the last decision


def test_a_broken_episode_is_run_anew_and_does_not_count():
    vec_env = ScriptedVecEnv(4, breaking=[(0, 1), (2, 2), (3, 4)])
    result = evaluate(RecordingPolicy(), vec_env, 4, seed=0)
    assert (result.num_episodes, result.num_successes, result.num_broken) == (4, 2, 3)
    assert result.episode_length == pytest.approx(2 * (1 + 2 + 3 + 4) / 4)
    assert vec_env.num_decisions.tolist() == [1 + 1, 2, 2 + 3, 4 + 4]


def test_decisions_after_a_broken_episode_have_noise_of_their_own():
    policy = RecordingPolicy()
    evaluate(policy, ScriptedVecEnv(3, breaking=[(0, 1), (2, 1)]), 3, seed=0)
    noise = torch.cat([call[2] for call in policy.calls]).flatten().tolist()
    assert len(set(noise)) == len(noise)


def test_an_evaluation_in_which_every_episode_breaks_ends_with_the_cause():
    breaking = [(env, count) for env in range(2) for count in range(1, 100)]
    with pytest.raises(EnvError, match=r"episodes broke in an evaluation of 3; the last: a worker died"):
        evaluate(RecordingPolicy(), ScriptedVecEnv(2, breaking), 3, seed=0)


def test_policy_sees_the_newest_observation_of_each_busy_environment():
    policy = RecordingPolicy()
    evaluate(policy, ScriptedVecEnv(2), 2, seed=0)
    assert [call[0].tolist() for call in policy.calls] == [[[0, 0], [1, 0]], [[1, 1]]]


def test_policy_acts_in_eval_mode_with_noise_of_each_environment_and_decision():
    policy = RecordingPolicy()
    evaluate(policy, ScriptedVecEnv(3), 6, seed=0)
    noise = torch.cat([call[2] for call in policy.calls]).flatten().tolist()
    assert len(set(noise)) == len(noise)
    assert {call[1] for call in policy.calls} == {"eval"}


def test_start_states_are_not_those_of_training():
    vec_env = ScriptedVecEnv(1)
    evaluate(RecordingPolicy(), vec_env, 1, seed=7)
    assert vec_env.seeds != [7]


def test_same_seed_gives_the_same_result():
    policy, vec_env = make_toy_policy(), ToyVecEnv(3, 2)
    first = evaluate(policy, vec_env, 7, seed=0)
    assert without_time(evaluate(policy, vec_env, 7, seed=0)) == without_time(first)


def test_train_flag_and_parameters_stay_as_they_were():
    policy = make_toy_policy()
    policy.train()
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    evaluate(policy, ToyVecEnv(2, 2), 2, seed=0)
    assert policy.training
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())


@pytest.mark.parametrize(
    ("num_successes", "num_trials", "expected"),
    [(0, 10, (0.0, 0.2775)), (5, 10, (0.2366, 0.7634)), (10, 10, (0.7225, 1.0)), (194, 200, (0.9361, 0.9862))],
)
def test_wilson_interval_matches_published_values(num_successes, num_trials, expected):
    assert wilson_interval(num_successes, num_trials) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("num_trials", [1, 10, 50, 200, 1000])
def test_the_interval_of_a_policy_that_never_failed_ends_at_one_exactly(num_trials):
    assert wilson_interval(num_trials, num_trials)[1] == 1.0
    assert wilson_interval(0, num_trials)[0] == 0.0


def test_runs_cover_the_ids_in_order():
    assert contiguous_runs([0, 1, 3, 6, 7, 8]) == [range(2), range(3, 4), range(6, 9)]


def test_metrics_carry_their_glossary_names():
    metrics = evaluate(RecordingPolicy(), ScriptedVecEnv(1), 1, seed=0).as_metrics()
    assert set(metrics) == {
        f"eval/{name}" for name in ("success_rate", "success_low", "success_high", "episode_length", "episode_return")
    }
