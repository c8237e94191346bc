"""The toy follows the contract of the simulators."""

import time

import pytest
import torch

from asyncflow.config.sections import EnvConfig
from asyncflow.envs import make_vec_env
from asyncflow.envs.base import EnvInterrupted
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.errors import EnvError

N, H = 6, 4


@pytest.fixture
def toy() -> ToyVecEnv:
    vec_env = ToyVecEnv(N, H)
    vec_env.reset(0)
    return vec_env


def to_goal(state: torch.Tensor) -> torch.Tensor:
    """Return the chunk that moves straight to the goal, [n, H, 2]."""
    return ((state[:, None, 2:] - state[:, None, :2]) * 10.0 / H).clamp(-1, 1).expand(-1, H, -1)


def step(vec_env, actions, env_ids=range(N)):
    vec_env.step_async(actions, env_ids)
    return vec_env.step_wait(env_ids)


def test_make_vec_env_builds_it_with_the_configured_horizon():
    vec_env = make_vec_env(EnvConfig(task="Toy", horizon=7), chunk_length=H, num_envs=N, seed=0)
    assert isinstance(vec_env, ToyVecEnv)
    assert vec_env.spec.horizon == 7


def test_going_to_the_goal_solves_every_episode_with_reward_one(toy):
    state, returns = toy.reset(1)["state"], []
    for _ in range(10):
        result = step(toy, to_goal(state))
        state = result.obs["state"]
        returns += result.episode_return[result.terminated].tolist()
        assert not result.truncated.any()
    assert len(returns) > N
    assert set(returns) == {1.0}


def test_a_chunk_stops_at_the_goal_with_the_final_observation_there(toy):
    state = toy.reset(1)["state"]
    while not (result := step(toy, to_goal(state))).terminated.any():
        state = result.obs["state"]
    ended = result.terminated
    offset = result.final_obs["state"][ended, :2] - result.final_obs["state"][ended, 2:]
    assert (offset.norm(dim=1) < 0.1).all()
    assert torch.equal(result.final_obs["state"][~ended], result.obs["state"][~ended])
    assert not torch.equal(result.final_obs["state"][ended], result.obs["state"][ended])
    assert torch.equal(result.rewards.argmax(1)[ended] + 1, result.executed[ended])


def test_an_idle_episode_is_truncated_at_the_horizon(toy):
    results = [step(toy, torch.zeros(N, H, 2)) for _ in range(10)]
    assert not any(result.truncated.any() for result in results[:-1])
    assert results[-1].truncated.all()
    assert results[-1].episode_length.tolist() == [40] * N


def test_groups_equal_the_whole_batch_bit_for_bit(toy):
    generator = torch.Generator().manual_seed(0)
    other, groups = ToyVecEnv(N, H), [range(0, N, 2), range(1, N, 2)]
    other.reset(0)
    for actions in torch.rand(30, N, H, 2, generator=generator) * 2 - 1:
        whole = step(toy, actions)
        for group in reversed(groups):
            part = step(other, actions[list(group)], group)
            assert torch.equal(part.obs["state"], whole.obs["state"][list(group)])
            assert torch.equal(part.rewards, whole.rewards[list(group)])


def test_actions_are_clipped(toy):
    result = step(toy, torch.full((N, H, 2), 5.0))
    moved = result.obs["state"][:, :2] - toy.reset(0)["state"][:, :2]
    assert torch.allclose(moved[~result.terminated], torch.tensor(0.4))


def test_results_are_owned_by_the_caller(toy):
    first = step(toy, torch.ones(N, H, 2))
    kept = first.obs["state"].clone()
    step(toy, torch.ones(N, H, 2))
    assert torch.equal(first.obs["state"], kept)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_action_that_is_not_finite_breaks_its_episode_and_names_it(toy, value):
    step(toy, torch.zeros(N, H, 2))
    actions = torch.zeros(N, H, 2)
    actions[3, 1, 0] = value
    result = step(toy, actions)
    assert result.broken.tolist() == [env == 3 for env in range(N)]
    (fault,) = result.faults
    assert fault.message == "environment 3 gave up episode 0: the action of its env step 6 is not finite"
    assert (result.executed[3], result.episode_length[3], result.rewards[3].sum()) == (0, 0, 0)
    assert torch.equal(result.obs["state"][3], result.final_obs["state"][3])


def test_the_next_episode_of_a_broken_one_follows_the_seeds_of_its_environment(toy):
    actions = torch.zeros(N, H, 2)
    actions[3] = torch.nan
    broken = step(toy, actions).obs["state"]
    toy.reset(0)
    for _ in range(10):
        idle = step(toy, torch.zeros(N, H, 2))
    assert torch.equal(broken[3], idle.obs["state"][3])


def test_a_neighbours_nan_changes_nothing(toy):
    actions = torch.rand(N, H, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = step(toy, actions)
    toy.reset(0)
    actions[3] = torch.nan
    beside = step(toy, actions)
    others = torch.arange(N) != 3
    assert torch.equal(beside.obs["state"][others], whole.obs["state"][others])
    assert torch.equal(beside.rewards[others], whole.rewards[others])


def test_after_an_interrupt_a_wait_is_refused(toy):
    toy.step_async(torch.zeros(N, H, 2), range(N))
    toy.interrupt()
    with pytest.raises(EnvInterrupted):
        toy.step_wait(range(N))
    toy.close()


def test_waiting_for_a_chunk_that_was_not_started_is_an_error(toy):
    with pytest.raises(EnvError, match="no chunk is under way"):
        toy.step_wait(range(N))


def test_a_chunk_tells_when_it_was_simulated(toy):
    before = time.perf_counter()
    (span,) = step(toy, torch.zeros(N, H, 2)).spans
    assert before <= span.start_s < span.end_s <= time.perf_counter()


def test_the_camera_shows_position_and_goal_and_changes_nothing_else():
    plain, seen = ToyVecEnv(N, H), ToyVecEnv(N, H, tasks=["ToyImages"])
    first = seen.reset(3)
    assert torch.equal(first["state"], plain.reset(3)["state"])
    picture = first["images", "top"]
    assert picture.shape == (N, *seen.spec.shapes("images")["top"])
    assert picture.dtype == torch.uint8
    for channel, point in ((0, first["state"][:, :2]), (1, first["state"][:, 2:])):
        brightest = picture[:, channel].flatten(1).argmax(1)
        found = torch.stack([brightest % 28, brightest // 28], 1) / 27 * 2 - 1
        assert (found - point).abs().max() < 1 / 27 + 1e-6  # the nearest pixel


def test_the_final_picture_is_that_of_the_episode_that_ended():
    seen = ToyVecEnv(N, H, horizon=H, tasks=["ToyImages"])
    first = seen.reset(0)
    result = step(seen, torch.zeros(N, H, 2))
    assert result.truncated.all()
    assert torch.equal(result.final_obs["images", "top"], first["images", "top"])
    assert not torch.equal(result.obs["images", "top"], first["images", "top"])


def test_the_point_cloud_is_a_ring_around_position_and_goal_and_changes_nothing_else():
    plain, seen = ToyVecEnv(N, H), ToyVecEnv(N, H, tasks=["ToyPoints"])
    first = seen.reset(3)
    assert torch.equal(first["state"], plain.reset(3)["state"])
    cloud = first["points", "top"]
    assert cloud.shape == (N, *seen.spec.shapes("points")["top"])
    for channel, place in ((3, first["state"][:, :2]), (4, first["state"][:, 2:])):
        ring = cloud[cloud[:, :, channel] == 1].view(N, -1, 6)
        torch.testing.assert_close(ring[..., :2].mean(1), place)
        torch.testing.assert_close((ring[..., :2] - place[:, None]).norm(dim=-1), torch.full(ring.shape[:2], 0.1))
