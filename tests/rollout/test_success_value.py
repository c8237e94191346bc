"""A success that ends its episode pays no less than nearly solving the task for ever, if it is asked to."""

from dataclasses import replace

import pytest
import torch
from silent import TOY, start

from asyncflow.config.presets import load_config
from asyncflow.envs.base import ChunkResult
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.errors import ConfigError
from asyncflow.rollout.episodes import Episode
from asyncflow.rollout.success_value import rewards_after_success, warn_of_returns, warn_of_shaped_reward

GAMMA = 0.995


def chunk(rewards, executed, terminated):
    size = len(rewards)
    zeros, false = torch.zeros(size), torch.zeros(size, dtype=torch.bool)
    ends = (torch.tensor(terminated), false, zeros, zeros.long(), false)
    return ChunkResult(None, None, torch.tensor(rewards), torch.tensor(executed), *ends)


def test_the_last_reward_of_a_success_goes_on_and_no_other():
    result = chunk([[0.5, 1.0, 0.0], [0.5, 0.5, 0.5], [0.0, 0.0, 2.0]], [2, 3, 3], [True, False, True])
    wanted = [GAMMA**2 * 1.0 / (1 - GAMMA), 0.0, GAMMA**3 * 2.0 / (1 - GAMMA)]
    torch.testing.assert_close(rewards_after_success(result, GAMMA), torch.tensor(wanted))


def test_an_end_that_is_no_success_is_followed_by_nothing():
    result = chunk([[0.5, 1.0], [0.5, 1.0]], [2, 2], [True, True])
    after = rewards_after_success(replace(result, succeeded=torch.tensor([True, False])), GAMMA)
    assert after[0] > 0
    assert after[1] == 0


@pytest.mark.parametrize("solved_at", [1, 100, 399])
def test_solving_pays_more_than_holding_the_cube_for_ever(solved_at):
    """robosuite's Lift pays 0.56 for a grasped cube and 1 for a lifted one."""
    holding = 1.25 / 2.25 / (1 - GAMMA)  # truncation bootstraps from the value of going on
    before = 1.25 / 2.25 * (1 - GAMMA**solved_at) / (1 - GAMMA)
    solving = before + GAMMA**solved_at * (1.0 + float(rewards_after_success(chunk([[1.0]], [1], [True]), GAMMA)))
    assert solving > holding > before + GAMMA**solved_at * 1.0


def test_a_description_that_asks_for_a_shaped_reward_is_told():
    assert "algorithm.success_value=continue" in warn_of_shaped_reward({"env_kwargs": {"reward_shaping": True}})
    assert warn_of_shaped_reward({"env_kwargs": {"reward_shaping": False}}) is None
    assert warn_of_shaped_reward({"env_name": "Wipe", "env_kwargs": {}}) is not None
    assert warn_of_shaped_reward({}) is warn_of_shaped_reward({"env_kwargs": None}) is None


def test_returns_that_favour_failure_are_told():
    episodes = [Episode(0, 1.0, 50, True), Episode(0, 80.0, 400, False)]
    assert "earned 1 on average, the others 80" in warn_of_returns(episodes)
    assert warn_of_returns(episodes[:1]) is None
    assert warn_of_returns([Episode(0, 1.0, 50, True), Episode(0, 0.0, 400, False)]) is None


def shaped(monkeypatch):
    """Let the toy pay half a reward for every step of a chunk, and return the rewards that rollouts are trained on."""
    step_wait = ToyVecEnv.step_wait

    def pay(env, env_ids):
        result = step_wait(env, env_ids)
        taken = torch.arange(result.rewards.shape[1]) < result.executed[:, None]
        earned = torch.where(result.episode_length > 0, result.episode_return + 0.5 * result.episode_length, 0.0)
        return replace(result, rewards=result.rewards.clamp(min=0.5) * taken, episode_return=earned)

    monkeypatch.setattr(ToyVecEnv, "step_wait", pay)


@pytest.mark.parametrize("buffer_type", ["standard", "vla"])
def test_a_run_says_once_that_success_pays_less_and_what_to_do(tmp_path, monkeypatch, buffer_type):
    shaped(monkeypatch)
    changes = TOY | {"env.num_envs": 16, "buffer.buffer_size": 320, "trainer.buffer_type": buffer_type}
    notices = start(tmp_path / "run", "toy", changes).notices
    assert len([notice for notice in notices if "algorithm.success_value=continue" in notice]) == 1
    continued = start(tmp_path / "other", "toy", changes | {"algorithm.success_value": "continue"})
    assert continued.notices == []
    assert max(row["train/value_loss"] for row in continued.rows) > 100  # returns near 1 / (1 - gamma)


def test_a_reward_for_ever_needs_a_discount():
    with pytest.raises(ConfigError, match=r"algorithm.success_value = continue needs algorithm.gamma below 1"):
        load_config("toy", {"algorithm.success_value": "continue", "algorithm.gamma": 1.0})
