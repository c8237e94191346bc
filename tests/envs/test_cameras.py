"""Real cameras: what they show is robomimic's, depends on the episode alone, and costs the physics nothing."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from rebuilt import show_last

from asyncflow.config.sections import EnvConfig
from asyncflow.config.task_table import TASKS
from asyncflow.config.tasks import resolve_task
from asyncflow.envs import make_vec_env
from asyncflow.errors import ConfigError
from asyncflow.simulators.robosuite.simulator import RobosuiteSimulator

pytestmark = pytest.mark.sim
NAMES = ["agentview", "robot0_eye_in_hand"]
SEED, STEPS, H = 3, 3, 3


def build(seed: int = SEED, **keys) -> RobosuiteSimulator:
    return RobosuiteSimulator(resolve_task(EnvConfig(cameras=NAMES, **keys)), seed)


@pytest.fixture(scope="module")
def lift() -> Iterator[RobosuiteSimulator]:
    env = build()
    yield env
    env.close()


def play(env: RobosuiteSimulator, episode: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the simulator's state and what the cameras see after each step."""
    env.reset(episode)
    rng, seen = np.random.default_rng(0), [(env.simulator_state(), env.render()["images"])]
    for _ in range(STEPS):
        env.step(rng.uniform(-1, 1, env.spec.action_dim))
        seen.append((env.simulator_state(), env.render()["images"]))
    return seen


def assert_equal(first: list, second: list) -> None:
    for (state, images), (other_state, other_images) in zip(first, second, strict=True):
        assert np.array_equal(state, other_state)
        assert np.array_equal(images, other_images)


def test_images_are_uint8_by_camera_upright_and_show_the_scene(lift):
    lift.reset(0)
    images = lift.render()["images"]
    assert (images.shape, images.dtype) == ((2, 3, 84, 84), np.uint8)
    assert lift.spec.shapes("images") == dict.fromkeys(NAMES, (3, 84, 84))
    reference = lift.env.sim.render(camera_name="agentview", width=84, height=84)[::-1]
    assert np.array_equal(images[0], reference.transpose(2, 0, 1))
    assert images.reshape(2, -1).std(1).min() > 10


def test_an_image_depends_on_the_episode_alone_whatever_was_rendered_before(lift):
    first = play(lift, 5)
    play(lift, 6)
    assert_equal(first, play(lift, 5))


def test_simulators_of_one_process_do_not_see_each_others_scenes(lift):
    alone = play(lift)
    other = build(seed=4)  # another cube
    others_own = play(other)
    assert_equal(alone, play(lift))
    assert_equal(others_own, play(other))
    assert not np.array_equal(alone[0][1], others_own[0][1])
    other.close()
    assert_equal(alone, play(lift))


def test_the_fast_step_changes_neither_states_nor_images(lift):
    own = build(fast_step=False)
    assert_equal(play(lift), play(own))
    own.close()


def test_cameras_change_no_state(lift):
    blind = RobosuiteSimulator(resolve_task(EnvConfig()), SEED)
    blind.reset(5)
    rng, states = np.random.default_rng(0), [blind.simulator_state()]
    for _ in range(STEPS):
        blind.step(rng.uniform(-1, 1, blind.spec.action_dim))
        states.append(blind.simulator_state())
    assert np.array_equal(states, [state for state, _ in play(lift)])
    blind.close()


def test_the_table_names_the_cameras_that_there_are(lift):
    assert lift.env.sim.model.camera_names == TASKS["Lift"].cameras


def test_a_camera_that_a_described_environment_lacks_is_refused_in_one_line_by_the_workers(lift, tmp_path):
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(lift.spec.env_meta))
    config = EnvConfig(env_meta=str(path), cameras=["agentveiw"], num_workers=1)
    with pytest.raises(ConfigError, match="there is no camera 'agentveiw'; cameras: frontview") as caught:
        make_vec_env(config, H, 1, 0)
    assert "\n" not in str(caught.value)


def test_a_rebuilt_episode_has_the_images_of_the_uncut_one():
    config = EnvConfig(horizon=20, num_workers=1, cameras=NAMES[:1])
    uncut, rebuilt = (show_last(config, "images", NAMES[0], cut) for cut in (None, 2))
    assert torch.equal(uncut, rebuilt)
