"""Point clouds: their geometry by hand, their way from simulators, and what real robosuite shows of Lift's cube."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from fake_simulator import ACTION_DIM, HORIZON, FakeSimulator
from rebuilt import show_last

from asyncflow.config.presets import load_config
from asyncflow.config.sections import EnvConfig
from asyncflow.config.task_table import TASKS
from asyncflow.config.tasks import resolve_task
from asyncflow.envs.chunks import ChunkBoard
from asyncflow.envs.workers import WorkerVecEnv
from asyncflow.errors import ConfigError
from asyncflow.simulators.robosuite import cameras
from asyncflow.simulators.robosuite.point_clouds import View, choose_points, make_cloud, metric_depth, world_points
from asyncflow.simulators.robosuite.simulator import RobosuiteSimulator
from asyncflow.simulators.runner import EpisodeRunner
from asyncflow.simulators.spec import EnvSpec

N, H, P = 3, 4, 5
CLOUDS = ("left", "right")
NEAR, FAR = 0.5, 20.0
EVERYWHERE = [-100.0] * 3 + [100.0] * 3
# Looks down from 2 m above (1, 3): right is the world's x, up its y, backwards its z.
ABOVE = View(90.0, np.array([1.0, 3.0, 2.0]), np.eye(3), NEAR, FAR)


def depth_of(distance: float | np.ndarray) -> np.ndarray:
    """Return what OpenGL's depth buffer holds at a distance along the axis."""
    return np.asarray((1 - NEAR / distance) / (1 - NEAR / FAR), np.float32)


def test_depth_becomes_metres_between_the_two_planes():
    assert metric_depth(np.array([0.0, 1.0]), NEAR, FAR) == pytest.approx([NEAR, FAR])
    distances = np.array([0.5, 0.7, 1.0, 3.0, 19.0])
    assert metric_depth(depth_of(distances), NEAR, FAR) == pytest.approx(distances, rel=1e-5)


def test_pixels_become_points_where_their_centres_look():
    """At 90 degrees half the picture's height is as wide as it is far: 2 m, so a pixel of 2 rows is 2 m."""
    points = world_points(np.full((2, 4), depth_of(2.0)), ABOVE)
    assert points[..., 2] == pytest.approx(0, abs=1e-6)
    assert points[0, :, 0] == pytest.approx([-2, 0, 2, 4], abs=1e-5)
    assert points[:, 0, 1] == pytest.approx([4, 2], abs=1e-5)


def test_a_turned_camera_turns_its_points():
    """Looks along the world's x, with the world's z upwards: its right is minus y, its back minus x."""
    rotation = np.array([[0.0, 0.0, -1.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    points = world_points(np.full((2, 2), depth_of(4.0)), View(90.0, np.zeros(3), rotation, NEAR, FAR))
    assert points[..., 0] == pytest.approx(4, abs=1e-5)
    assert points[0, 0] == pytest.approx([4, 2, 2], abs=1e-5)
    assert points[1, 1] == pytest.approx([4, -2, -2], abs=1e-5)


def test_a_point_keeps_the_colour_of_its_pixel():
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 1] = 255, 51, 0
    cloud = make_cloud(pixels, np.full((2, 2), depth_of(2.0)), ABOVE, EVERYWHERE, 4)
    assert (cloud.shape, cloud.dtype) == ((4, 6), np.float32)
    assert cloud[1] == pytest.approx([2, 4, 0, 1, 0.2, 0], abs=1e-5)
    assert (cloud[[0, 2, 3], 3:] == 0).all()


def test_points_outside_the_box_are_left_out():
    depth = depth_of(np.array([[2.0, 1.0], [2.0, FAR]]))
    box = [-10.0, -10.0, -0.5, 10.0, 10.0, 0.5]
    cloud = make_cloud(np.zeros((2, 2, 3), np.uint8), depth, ABOVE, box, 4)
    assert cloud[:, :3] == pytest.approx(np.array([[0, 4, 0], [0, 4, 0], [0, 2, 0], [0, 2, 0]]), abs=1e-5)


def test_a_picture_with_nothing_in_the_box_is_a_cloud_of_zeros():
    cloud = make_cloud(np.full((2, 2, 3), 255, np.uint8), np.ones((2, 2), np.float32), ABOVE, [0.0] * 3 + [1.0] * 3, P)
    assert np.array_equal(cloud, np.zeros((P, 6)))


@pytest.mark.parametrize(
    ("num_found", "chosen"), [(5, [0, 1, 2, 3, 4]), (10, [0, 2, 4, 6, 8]), (3, [0, 0, 1, 1, 2]), (1, [0] * 5)]
)
def test_points_are_chosen_evenly_and_repeated_where_they_are_few(num_found, chosen):
    cloud = np.arange(num_found * 6, dtype=np.float32).reshape(-1, 6)
    assert np.array_equal(choose_points(cloud, P), cloud[chosen])


class CloudSimulator(FakeSimulator):
    """All numbers of camera c's cloud are 100 c + the steps in the episode; a pixel of its image is the step."""

    def __init__(self, seed: int, has_images: bool = False, nan_step: int = -1) -> None:
        super().__init__(seed)
        shapes = {"state": (4,)} | {f"points.{camera}": (P, 6) for camera in CLOUDS}
        images = {"images.left": (3, 16, 20)} if has_images else {}
        self.spec = EnvSpec(shapes | images, ACTION_DIM, HORIZON)
        self.nan_step = nan_step

    def render(self):
        clouds = np.zeros((2, P, 6), np.float32)
        clouds[:] = np.nan if self.state[2] == self.nan_step else self.state[2] + 100 * np.arange(2)[:, None, None]
        pixels = np.full((1, 3, 16, 20), self.state[2], np.uint8)
        return {"points": clouds} | ({"images": pixels} if "images" in self.spec.rendered else {})


class BothSimulator(CloudSimulator):
    """The same, with images."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, has_images=True)


def test_a_cloud_that_is_not_finite_gives_up_the_episode():
    board = ChunkBoard.allocate(N, H, rooms={"points": (2, P, 6)})
    runner = EpisodeRunner(CloudSimulator(0, nan_step=8), 1, board.memory)
    runner.begin(7, 0)
    runner.execute()
    assert board.nonfinite_fault(1, 0) is None
    runner.execute()
    assert "the observation of its env step 8 is not finite" in board.nonfinite_fault(1, 0).message
    assert (board.rendered["points"][1, 0, 0] == 0).all()  # the next episode's first
    assert (board.final_rendered["points"][1, 0, 0] == 0).all()


def test_observations_hold_float32_clouds_by_camera_beside_the_state():
    config = EnvConfig(num_workers=2, point_clouds=list(CLOUDS), num_points=P)
    with WorkerVecEnv(CloudSimulator, config, N, H, 3) as vec_env:
        obs, spec = vec_env.reset(5), vec_env.spec
        vec_env.step_async(torch.zeros(N, H, ACTION_DIM), range(N))
        result = vec_env.step_wait(range(N))
    for each in (obs, result.obs, result.final_obs):
        assert set(each.keys()) == {"state", "points"}
        assert list(each["points"].keys()) == list(CLOUDS)
        assert (each["points", "left"].shape, each["points", "left"].dtype) == ((N, P, 6), torch.float32)
    assert (result.obs["points", "left"] == 4).all()
    assert (result.obs["points", "right"] == 104).all()
    assert (obs["points", "right"] == 100).all()  # not overwritten: observations belong to the caller
    empty = spec.empty_obs(N)
    for name, value in obs.items(True, True):
        assert (empty[name].shape, empty[name].dtype) == (value.shape, value.dtype)


def test_images_and_clouds_with_a_history_stand_side_by_side():
    config = EnvConfig(
        num_workers=1, cameras=["left"], camera_size=[16, 20], point_clouds=list(CLOUDS), num_points=P, n_obs_steps=2
    )
    with WorkerVecEnv(BothSimulator, config, N, H, 3) as vec_env:
        vec_env.reset(5)
        vec_env.step_async(torch.zeros(N, H, ACTION_DIM), range(N))
        obs, spec = vec_env.step_wait(range(N)).obs, vec_env.spec
    assert (spec.n_obs_steps, spec.shapes("points")["left"]) == (2, (2, P, 6))
    assert obs["points", "right"].shape == (N, 2, P, 6)
    assert obs["points", "right"][:, :, 0, 0].tolist() == [[103, 104]] * N
    assert obs["images", "left"][:, :, 0, 0, 0].tolist() == [[3, 4]] * N


def test_an_unknown_camera_of_a_cloud_is_refused_before_a_simulator_is_built_and_the_others_are_listed():
    with pytest.raises(ConfigError) as caught:
        resolve_task(EnvConfig(point_clouds=["agentveiw"]))
    available = ", ".join(TASKS["Lift"].cameras)
    assert str(caught.value) == f"env.point_clouds: there is no camera 'agentveiw'; cameras: {available}"


def test_a_toy_takes_no_cameras_for_clouds():
    with pytest.raises(ConfigError, match=r"env.point_clouds = \['agentview'\].*ToyPoints takes neither"):
        resolve_task(EnvConfig(task="ToyPoints", point_clouds=["agentview"]))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("point_clouds", ["agentview", "agentview"], "env.point_clouds.* names a camera twice"),
        ("num_points", 0, "env.num_points = 0"),
        ("point_bounds", [0, 0, 0, 1, 1], "env.point_bounds"),
        ("point_bounds", [0, 0, 1, 1, 1, 1], "must be three numbers and three larger ones"),
    ],
)
def test_impossible_clouds_are_refused(key, value, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, {f"env.{key}": value})


def test_without_a_library_to_render_one_line_names_the_key_that_asked(monkeypatch):
    monkeypatch.setattr(cameras, "find_library", lambda name: None)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    with pytest.raises(ConfigError, match=r"^env.point_clouds: cannot render: neither EGL nor OSMesa") as caught:
        RobosuiteSimulator(resolve_task(EnvConfig(point_clouds=["agentview"])), 0)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def lift() -> Iterator[RobosuiteSimulator]:
    """Lift with a cloud of both kinds of camera: one that stands, one that moves with the hand."""
    keys = {"cameras": ["agentview"], "point_clouds": ["agentview", "robot0_eye_in_hand"]}
    env = RobosuiteSimulator(resolve_task(EnvConfig(camera_size=[128, 128], **keys)), 3)
    yield env
    env.close()


def red(cloud: np.ndarray) -> np.ndarray:
    """Return where the cube's points are: nothing else in Lift is red."""
    return cloud[(cloud[:, 3] > 0.3) & (cloud[:, 4:].max(1) < 0.4 * cloud[:, 3])][:, :3]


@pytest.mark.sim
@pytest.mark.parametrize("episode", [0, 1])
def test_the_cubes_points_lie_on_the_cube(lift, episode):
    """Within 2 mm of its surface, seen by a camera that stands; its middle is theirs, up to half its size."""
    lift.reset(episode)
    sim, half = lift.env.sim, np.array(lift.env.cube.size)
    body = lift.env.cube_body_id
    points = red(lift.render()["points"][0])
    assert len(points) > 10
    own = (points - sim.data.body_xpos[body]) @ sim.data.body_xmat[body].reshape(3, 3)
    assert np.abs(np.abs(own / half).max(1) - 1).max() * max(half) < 0.002


@pytest.mark.sim
def test_both_cameras_place_the_cube_alike(lift):
    lift.reset(0)
    first, second = (red(cloud) for cloud in lift.render()["points"])
    assert len(second) > 10
    top = [points[points[:, 2] > points[:, 2].max() - 0.003].mean(0) for points in (first, second)]
    assert np.abs(top[0] - top[1]).max() < 0.006


@pytest.mark.sim
def test_points_agree_with_robosuites_own_camera_matrices(lift):
    from robosuite.utils.camera_utils import (  # noqa: PLC0415  seconds
        get_camera_extrinsic_matrix,
        get_camera_intrinsic_matrix,
        get_real_depth_map,
    )

    sim, seer = lift.env.sim, lift._cameras
    lift.render()  # makes the context the current one
    for name, camera in zip(("agentview", "robot0_eye_in_hand"), seer._ids["points"], strict=True):
        depth = seer._render(camera).depth
        matrix = get_camera_intrinsic_matrix(sim, name, 128, 128)
        rays = np.stack([*(np.mgrid[:128, :128][::-1] + 0.5), np.ones((128, 128))], -1) @ np.linalg.inv(matrix).T
        local = rays * get_real_depth_map(sim, depth.astype(np.float64))[:, :, None]
        pose = get_camera_extrinsic_matrix(sim, name)
        expected = local @ pose[:3, :3].T + pose[:3, 3]
        assert world_points(depth, seer._view(camera)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.sim
def test_a_cloud_is_float32_within_the_box_with_colours_of_the_image(lift):
    lift.reset(0)
    rendered = lift.render()
    cloud, settings = rendered["points"][0], EnvConfig()
    assert (cloud.shape, cloud.dtype) == ((settings.num_points, 6), np.float32)
    low, high = np.array(settings.point_bounds).reshape(2, 3)
    assert ((cloud[:, :3] >= low - 1e-6) & (cloud[:, :3] <= high + 1e-6)).all()
    colours = set(map(tuple, rendered["images"][0].reshape(3, -1).T.tolist()))
    assert set(map(tuple, np.rint(255 * cloud[:, 3:]).astype(int).tolist())) <= colours


@pytest.mark.sim
def test_a_cloud_depends_on_the_episode_alone_and_changes_nothing(lift):
    seen, states = [], []
    for episode in (5, 6, 5):
        lift.reset(episode)
        lift.step(np.full(7, 0.2))
        before = lift.simulator_state()
        seen.append(lift.render())
        states.append(lift.simulator_state())
        assert np.array_equal(before, states[-1])
    assert np.array_equal(seen[0]["points"], seen[2]["points"])
    assert not np.array_equal(seen[0]["points"], seen[1]["points"])
    plain = RobosuiteSimulator(resolve_task(EnvConfig(camera_size=[128, 128], cameras=["agentview"])), 3)
    plain.reset(5)
    plain.step(np.full(7, 0.2))
    assert np.array_equal(plain.render()["images"], seen[2]["images"])
    plain.close()


@pytest.mark.sim
@pytest.mark.slow
def test_a_rebuilt_episode_has_the_clouds_of_the_uncut_one():
    config = EnvConfig(horizon=20, num_workers=1, point_clouds=["agentview"])
    uncut, rebuilt = (show_last(config, "points", "agentview", cut) for cut in (None, 2))
    assert torch.equal(uncut, rebuilt)
    assert uncut.shape == (1, 1024, 6)


def test_clouds_that_memory_cannot_hold_are_refused_with_the_keys_to_lower(monkeypatch):
    monkeypatch.setattr("asyncflow.devices.free_memory", lambda device: 1_000_000)
    with pytest.raises(ConfigError, match=r"device cpu: .*lower env.num_envs or env.camera_size or env.num_points"):
        ChunkBoard.allocate(4, 2, rooms={"points": (2, 20_000, 6)})
