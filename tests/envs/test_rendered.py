"""What cameras yield on its way from a simulator: rendered at a chunk's end, and whose episode it belongs to."""

from functools import partial

import numpy as np
import pytest
import torch
from fake_simulator import ACTION_DIM, HORIZON, NAN_OBS, SUCCEED, FakeSimulator

from asyncflow.envs.chunks import ChunkBoard
from asyncflow.simulators.runner import EpisodeRunner
from asyncflow.simulators.spec import EnvSpec

N, H = 3, 4
CAMERAS = ("left", "right")
SHAPES = {"images": (3, 16, 20), "points": (5, 6)}


class SeeingSimulator(FakeSimulator):
    """All numbers of what camera c yields are 100 c + the steps in the episode; counts how often it is rendered."""

    def __init__(self, kind: str) -> None:
        super().__init__(0)
        seen = {f"{kind}.{camera}": SHAPES[kind] for camera in CAMERAS}
        self.spec = EnvSpec({"state": (4,)} | seen, ACTION_DIM, HORIZON)
        self.kind, self.num_renders = kind, 0

    def render(self):
        self.num_renders += 1
        numbers = np.zeros((2, *SHAPES[self.kind]), np.uint8 if self.kind == "images" else np.float32)
        numbers.reshape(2, -1)[:] = self.state[2] + 100 * np.arange(2)[:, None]
        return {self.kind: numbers}


class Episode:
    """Environment 1 of a board, and which env steps what it holds shows."""

    def __init__(self, kind: str, n_obs_steps: int = 1, chunk_length: int = H) -> None:
        self.board = ChunkBoard.allocate(N, chunk_length, n_obs_steps, {kind: (2, *SHAPES[kind])})
        self.simulator = SeeingSimulator(kind)
        self.runner = EpisodeRunner(self.simulator, 1, self.board.memory)
        self.runner.begin(7, 0)
        self._kind = kind

    def execute(self) -> None:
        """Execute a chunk."""
        self.runner.execute()

    def steps(self, is_final: bool = False, camera: int = 0) -> list[int]:
        """Return the env step that each one of the history shows, on which all its numbers must agree."""
        held: torch.Tensor = (self.board.final_rendered if is_final else self.board.rendered)[self._kind]
        flat = held[1, :, camera].flatten(1).long() - 100 * camera
        assert (flat == flat[:, :1]).all()
        return flat[:, 0].tolist()


@pytest.fixture(params=["images", "points"])
def make_episode(request):
    return partial(Episode, request.param)


def test_it_is_rendered_once_a_chunk_at_its_end(make_episode):
    episode = make_episode()
    assert episode.simulator.num_renders == 1
    for steps in (4, 8):
        episode.execute()
        assert [episode.steps(camera=camera) for camera in (0, 1)] == [[steps], [steps]]
        assert episode.steps(is_final=True) == [steps]
    assert episode.simulator.num_renders == 3


def test_a_chunk_can_go_unseen_and_the_next_one_shows_what_is(make_episode):
    episode = make_episode(n_obs_steps=2)
    episode.runner.execute(is_rendered=False)
    assert episode.simulator.num_renders == 1
    assert episode.board.executed[1] == H
    episode.execute()
    assert episode.steps() == [7, 8]


def test_a_truncated_episode_keeps_its_true_end(make_episode):
    episode = make_episode()
    for _ in range(3):
        episode.execute()
    assert episode.board.truncated[1]
    assert episode.steps(is_final=True) == [HORIZON]
    assert episode.steps() == [0]
    assert episode.simulator.num_renders == 5  # two resets, three ends


def test_the_end_of_a_success_is_not_rendered(make_episode):
    episode = make_episode()
    episode.execute()
    episode.board.actions[1, 1, SUCCEED] = 1.0
    episode.execute()
    assert episode.board.terminated[1]
    assert episode.steps() == episode.steps(is_final=True) == [0]
    assert episode.simulator.num_renders == 3


def test_a_chunk_that_counts_for_nothing_leaves_what_the_next_episode_shows(make_episode):
    episode = make_episode()
    episode.execute()
    episode.board.actions[1, 1, NAN_OBS] = 1.0
    episode.board.actions[1, 3, NAN_OBS] = 1.0
    episode.execute()
    assert episode.board.executed[1] == 0
    assert episode.steps() == episode.steps(is_final=True) == [0]


def test_a_history_shows_the_last_env_steps_oldest_first(make_episode):
    episode = make_episode(n_obs_steps=3)
    assert episode.steps() == [0, 0, 0]
    episode.execute()
    assert episode.steps() == [2, 3, 4]
    assert episode.board.obs[1, :12].view(3, 4)[:, 2].tolist() == [2, 3, 4]
    assert episode.simulator.num_renders == 4
    episode.execute()
    episode.execute()
    assert episode.steps(is_final=True) == [8, 9, 10]
    assert episode.steps() == [0, 0, 0]


def test_a_history_longer_than_a_chunk_reaches_into_the_one_before(make_episode):
    episode = make_episode(n_obs_steps=3, chunk_length=2)
    episode.execute()
    assert episode.steps() == [0, 1, 2]
    episode.execute()
    assert episode.steps() == [2, 3, 4]
