"""Chunks in one simulator: where they stop, what they leave behind, and which seeds episodes start from."""

import errno
import os

import numpy as np
import pytest
import torch
from fake_simulator import HORIZON, NAN_OBS, NAN_REWARD, SUCCEED, FakeSimulator

from asyncflow.envs.chunks import ChunkBoard, check_actions
from asyncflow.errors import ConfigError, EnvError
from asyncflow.seeding import derive_seed
from asyncflow.simulators.base import StepResult
from asyncflow.simulators.board import Board, BoardPlan
from asyncflow.simulators.runner import EpisodeRunner

H = 4


@pytest.fixture
def board() -> ChunkBoard:
    return ChunkBoard.allocate(3, H)


@pytest.fixture
def runner(board: ChunkBoard) -> EpisodeRunner:
    runner = EpisodeRunner(FakeSimulator(0), 2, board.memory)
    runner.begin(7, 0)
    return runner


def first_draw(episode: int) -> float:
    return float(np.float32(np.random.default_rng(derive_seed(7, "episode", 2, episode)).uniform()))


def test_a_chunk_stops_at_success_and_its_later_rewards_are_zero(board, runner):
    board.rewards.fill_(torch.nan)
    board.actions[2, 1, SUCCEED] = 1.0
    runner.execute()
    assert board.executed[2] == 2
    assert board.rewards[2].tolist() == [0.25, 0.25, 0.0, 0.0]
    assert board.terminated[2]
    assert not board.truncated[2]


def test_the_final_observation_is_of_the_old_episode_and_the_next_one_of_the_new(board, runner):
    board.actions[2, 1, SUCCEED] = 1.0
    runner.execute()
    assert board.final_obs[2, [0, 2]].tolist() == [first_draw(0), 2.0]
    assert board.obs[2, [0, 2]].tolist() == [first_draw(1), 0.0]


def test_without_an_end_both_observations_are_equal_and_no_episode_is_reported(board, runner):
    runner.execute()
    assert torch.equal(board.final_obs[2, :4], board.obs[2, :4])
    assert not board.terminated[2]
    assert not board.truncated[2]
    assert board.episode_return[2] == board.episode_length[2] == 0


def test_an_episode_is_truncated_at_the_horizon_within_a_chunk(board, runner):
    executed = []
    for _ in range(3):
        runner.execute()
        executed.append(int(board.executed[2]))
    assert executed == [4, 4, 2]
    assert board.truncated[2]
    assert not board.terminated[2]
    assert board.episode_length[2] == HORIZON
    assert board.episode_return[2] == 0.25 * HORIZON


def test_success_on_the_last_step_is_a_termination_and_no_truncation(board, runner):
    for _ in range(2):
        runner.execute()
    board.actions[2, 1, SUCCEED] = 1.0
    runner.execute()
    assert board.terminated[2]
    assert not board.truncated[2]


@pytest.mark.parametrize(
    ("end", "terminated", "truncated", "succeeded"),
    [
        (StepResult(1.0, True, False, False), True, False, False),
        (StepResult(1.0, True, True, True), True, False, True),  # nothing follows, whatever the time limit says
        (StepResult(1.0, False, True, False), False, True, False),
        (StepResult(1.0, False, True, True), False, True, True),
        (StepResult(1.0, False, False, True), False, False, False),  # solved for now, and the episode goes on
    ],
)
def test_an_episode_ends_as_its_simulator_says(board, end, terminated, truncated, succeeded):
    simulator, steps = FakeSimulator(0), iter([StepResult(0.5, False, False, False), end] + [(0.0, False)] * 2)
    simulator.step = lambda _: next(steps)
    runner = EpisodeRunner(simulator, 2, board.memory)
    runner.begin(7, 0)
    runner.execute()
    assert (board.terminated[2], board.truncated[2], board.succeeded[2]) == (terminated, truncated, succeeded)
    has_ended = terminated or truncated
    assert board.executed[2] == (2 if has_ended else H)
    assert board.rewards[2].tolist() == [0.5, 1.0, 0.0, 0.0]
    assert (board.episode_return[2], board.episode_length[2]) == ((1.5, 2) if has_ended else (0, 0))
    assert board.obs[2, 0] == first_draw(1 if has_ended else 0)


def test_an_episode_that_is_cut_at_the_horizon_while_solved_is_a_success(board):
    simulator = FakeSimulator(0)
    simulator.step = lambda _: StepResult(0.0, False, False, True)
    runner = EpisodeRunner(simulator, 2, board.memory)
    runner.begin(7, 0)
    for _ in range(3):
        runner.execute()
    assert (board.terminated[2], board.truncated[2], board.succeeded[2]) == (False, True, True)


def test_success_comes_from_the_simulator_and_not_from_a_positive_reward(board, runner):
    runner.execute()
    assert (board.rewards[2] > 0).all()
    assert not board.terminated[2]


@pytest.mark.parametrize("episode", [0, 1, 5])
def test_any_episode_begins_from_its_own_seed_and_the_next_one_follows(board, runner, episode):
    for _ in range(4):
        runner.execute()
    runner.begin(7, episode)
    assert board.obs[2, 0] == first_draw(episode)
    board.actions[2, 0, SUCCEED] = 1.0
    runner.execute()
    assert board.obs[2, 0] == first_draw(episode + 1)


@pytest.mark.parametrize(
    ("dimension", "value", "complaint"),
    [
        (NAN_REWARD, 1.0, "the reward of its env step 6 "),
        (NAN_OBS, 1.0, "the observation of its env step 8 "),
        (0, torch.nan, "the action of its env step 6 "),
        (0, torch.inf, "the action of its env step 6 "),
    ],
)
def test_a_number_that_is_not_finite_gives_up_the_episode(board, runner, dimension, value, complaint):
    runner.execute()
    board.actions[2, 1, dimension] = value
    runner.execute()
    assert complaint in board.nonfinite_fault(2, 0).message
    assert_counts_for_nothing(board)
    assert board.obs[2, [0, 2]].tolist() == [first_draw(1), 0.0]


def assert_counts_for_nothing(board: ChunkBoard) -> None:
    assert board.rewards[2].tolist() == [0.0] * H
    assert board.executed[2] == board.episode_return[2] == board.episode_length[2] == 0
    assert not board.terminated[2]
    assert not board.truncated[2]
    assert torch.equal(board.final_obs[2, :4], board.obs[2, :4])


def test_an_action_that_is_not_finite_is_noticed_though_the_episode_would_end_before_it(board, runner):
    board.actions[2, 0, SUCCEED] = 1.0
    board.actions[2, 3] = torch.nan
    runner.execute()
    assert board.executed[2] == 0


def test_the_episode_after_one_that_was_given_up_is_whole(board, runner):
    board.actions[2, 3, NAN_OBS] = 1.0
    runner.execute()
    board.actions.zero_()
    for _ in range(3):
        runner.execute()
    assert (board.episode_length[2], board.episode_return[2]) == (HORIZON, 0.25 * HORIZON)


class NeverFinite(FakeSimulator):
    def observe(self):
        return np.full(4, np.inf, np.float32)


def test_a_first_observation_that_is_not_finite_is_an_error(board):
    with pytest.raises(EnvError, match="environment 2: the first observation of episode 3 is not finite"):
        EpisodeRunner(NeverFinite(0), 2, board.memory).begin(7, 3)


@pytest.mark.parametrize(
    ("actions", "pending", "complaint"),
    [
        (torch.zeros(2, H, 3), [], "shape"),
        (torch.zeros(2, H, 4), [range(1, 6, 2)], r"environments \[1\]"),
    ],
)
def test_a_chunk_that_cannot_be_executed_is_refused(actions, pending, complaint):
    with pytest.raises(EnvError, match=complaint):
        check_actions(actions, (2, H, 4), range(2), pending)


def test_a_board_that_memory_cannot_hold_is_refused_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr("asyncflow.devices.free_memory", lambda device: 1000)
    with pytest.raises(ConfigError, match=r"^device cpu: .* are needed, .* are free; lower env.num_envs"):
        ChunkBoard.allocate(4, 2)


def test_a_limit_on_the_size_of_files_is_one_line(monkeypatch):
    def refuse(descriptor: int, size: int) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "ftruncate", refuse)
    num_open = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=r"^shared memory: .* cannot be had: File too large; lower env.num_envs"):
        ChunkBoard.allocate(4, 2)
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_both_sides_of_a_board_see_the_same_numbers(board):
    other = Board(BoardPlan.from_json(board.memory.plan.to_json()), board.memory.descriptor)
    board.actions[2, 1, 3] = 7.0
    other.arrays["rewards"][0, 1] = 5.0
    assert other.arrays["actions"][2, 1, 3] == 7.0
    assert board.rewards[0, 1] == 5.0


def test_the_arrays_of_a_board_do_not_overlap():
    board = ChunkBoard.allocate(3, H, 2, {"images": (1, 3, 4, 4), "points": (2, 5, 6)})
    for number, array in enumerate(board.memory.arrays.values()):
        array[...] = number % 2 if array.dtype == bool else number
    for number, (name, array) in enumerate(board.memory.arrays.items()):
        assert (array == (number % 2 if array.dtype == bool else number)).all(), name


@pytest.mark.parametrize(
    "plan", [BoardPlan(3, H + 1), BoardPlan(4, H), BoardPlan(3, H, 2), BoardPlan(3, H, 1, {"points": (1, 5, 6)})]
)
def test_a_board_of_other_sizes_is_refused(board, plan):
    with pytest.raises(EnvError, match=r"^shared memory: its header is "):
        Board(plan, board.memory.descriptor)
