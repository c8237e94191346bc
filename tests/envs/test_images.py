"""Images on their way from simulators: when they are rendered, where they land, and what an observation then holds."""

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from fake_simulator import ACTION_DIM, HORIZON, SUCCEED, FakeSimulator
from specs import spec_of

from asyncflow.config.presets import load_config
from asyncflow.config.sections import EnvConfig
from asyncflow.config.task_table import TASKS
from asyncflow.config.tasks import resolve_task
from asyncflow.envs.chunks import ChunkBoard
from asyncflow.envs.workers import WorkerVecEnv
from asyncflow.errors import ConfigError
from asyncflow.simulators.robosuite import cameras
from asyncflow.simulators.robosuite.cameras import choose_gl, order_egl_devices

N, H, SIZE = 3, 4, (16, 20)
CAMERAS = ("left", "right")


class CameraSimulator(FakeSimulator):
    """Every pixel of camera c is 100 c + the steps in the episode."""

    def __init__(self, seed: int, fails: bool = False) -> None:
        if fails:
            raise ConfigError("env.cameras: there is no camera 'left'")
        super().__init__(seed)
        self.spec = spec_of((4,), ACTION_DIM, dict.fromkeys(CAMERAS, (3, *SIZE)), HORIZON)

    def render(self):
        pixels = np.zeros((2, 3, *SIZE), np.uint8)
        pixels[:] = self.state[2] + 100 * np.arange(2)[:, None, None, None]
        return {"images": pixels}


class CountingSimulator(CameraSimulator):
    """Every pixel says how many pictures were taken before."""

    num_renders = 0

    def render(self):
        self.num_renders += 1
        return {"images": np.full((2, 3, *SIZE), self.num_renders, np.uint8)}


def test_observations_hold_uint8_images_by_camera_beside_the_state():
    config = EnvConfig(num_workers=2, cameras=list(CAMERAS), camera_size=list(SIZE))
    with WorkerVecEnv(CameraSimulator, config, N, H, 3) as vec_env:
        obs = vec_env.reset(5)
        vec_env.step_async(torch.zeros(N, H, ACTION_DIM), range(N))
        result = vec_env.step_wait(range(N))
    for each in (obs, result.obs, result.final_obs):
        assert set(each.keys()) == {"state", "images"}
        assert list(each["images"].keys()) == list(CAMERAS)
        assert each["images", "left"].shape == (N, 3, *SIZE)
        assert each["images", "left"].dtype == torch.uint8
    assert (result.obs["images", "left"] == 4).all()
    assert (result.obs["images", "right"] == 104).all()
    assert (obs["images", "right"] == 100).all()  # not overwritten: observations belong to the caller


def test_observations_of_a_history_have_it_behind_the_environments():
    config = EnvConfig(num_workers=1, cameras=list(CAMERAS), camera_size=list(SIZE), n_obs_steps=2)
    with WorkerVecEnv(CameraSimulator, config, N, H, 3) as vec_env:
        obs, spec = vec_env.reset(5), vec_env.spec
    assert (obs["state"].shape, obs["images", "left"].shape) == ((N, 2, 4), (N, 2, 3, *SIZE))
    assert (spec.state_shape, spec.shapes("images")["right"], spec.n_obs_steps) == ((2, 4), (2, 3, *SIZE), 2)


def play_two_chunks(make_simulator, config):
    """Return what environments show after two chunks, and after they are rebuilt by the journal of those.

    The last environment is by then one chunk into its second episode.
    """
    shown, actions = [], torch.zeros(2, N, H, ACTION_DIM)
    actions[0, -1, 0] = SUCCEED
    with WorkerVecEnv(make_simulator, config, N, H, 3) as vec_env:
        vec_env.reset(5)
        for chunk in actions:
            vec_env.step_async(chunk, range(N))
            result = vec_env.step_wait(range(N))
        shown.append(result.obs["images", "left"])
        journal = vec_env.journal()
    with WorkerVecEnv(make_simulator, config, N, H, 3) as vec_env:
        shown.append(vec_env.reset(5, journal)["images", "left"])
    return shown


@pytest.mark.parametrize(("n_obs_steps", "num_renders"), [(1, 2), (2, 3), (6, 9)])
def test_rebuilding_an_episode_renders_what_the_next_observation_shows_alone(n_obs_steps, num_renders):
    size = {"cameras": list(CAMERAS), "camera_size": list(SIZE)}
    config = EnvConfig(num_workers=2, n_obs_steps=n_obs_steps, **size)
    shown, rebuilt = play_two_chunks(CameraSimulator, config)
    assert torch.equal(rebuilt, shown)
    _, counted = play_two_chunks(CountingSimulator, config)
    assert counted.amax() == num_renders  # the episode's first picture among them; of six steps, both chunks' four


def test_without_cameras_an_observation_is_the_state_alone():
    with WorkerVecEnv(FakeSimulator, EnvConfig(num_workers=1), N, H, 3) as vec_env:
        assert list(vec_env.reset(5).keys()) == ["state"]


def test_a_simulator_that_cannot_be_built_as_asked_is_the_users_mistake():
    with pytest.raises(ConfigError, match=r"^env.cameras: there is no camera 'left'$"):
        WorkerVecEnv(partial(CameraSimulator, fails=True), EnvConfig(num_workers=1), N, H, 3)


def test_an_unknown_camera_is_refused_before_a_simulator_is_built_and_the_others_are_listed():
    with pytest.raises(ConfigError) as caught:
        resolve_task(EnvConfig(cameras=["agentveiw"]))
    assert str(caught.value) == (
        f"env.cameras: there is no camera 'agentveiw'; cameras: {', '.join(TASKS['Lift'].cameras)}"
    )


def test_the_toy_has_no_cameras():
    with pytest.raises(ConfigError, match="Toy takes neither"):
        resolve_task(EnvConfig(task="Toy", cameras=["agentview"]))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cameras", ["agentview", "agentview"], "names a camera twice"),
        ("camera_size", [84, 8], "two numbers from 16 to 1024"),
        ("camera_size", [84], "env.camera_size"),
    ],
)
def test_impossible_cameras_are_refused(key, value, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, {f"env.{key}": value})


def test_without_a_library_to_render_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cameras, "find_library", lambda name: None)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    with pytest.raises(ConfigError, match=r"neither EGL nor OSMesa is installed; .*libegl1.*libosmesa6") as caught:
        choose_gl()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("installed", "asked", "chosen"), [
    ({"EGL", "OSMesa"}, "", "egl"), ({"OSMesa"}, "", "osmesa"), ({"EGL", "OSMesa"}, "osmesa", "osmesa"),
])  # fmt: skip
def test_egl_is_chosen_before_osmesa_unless_the_user_says_otherwise(monkeypatch, installed, asked, chosen):
    monkeypatch.setattr(cameras, "find_library", lambda name: name if name in installed else None)
    monkeypatch.setenv("MUJOCO_GL", asked)
    choose_gl()
    assert cameras.os.environ["MUJOCO_GL"] == chosen


@pytest.mark.parametrize(
    ("cuda", "order"),
    [(None, [0, 1, 2]), ("", [0, 1, 2]), ("1", [1, 0, 2]), ("2,0", [2, 0, 1]), ("0,1", [0, 1, 2]), ("7", [0, 1, 2])]
    + [(name, [0, 1, 2]) for name in ("-1", "NoDevFiles", "GPU-8932f937-d72c", "MIG-GPU-8932f937/1/0")],
)
def test_cameras_render_on_an_egl_device_that_exists_whatever_cuda_sees(monkeypatch, cuda, order):
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if cuda is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", cuda)
    assert order_egl_devices(3) == order


def test_the_user_says_which_egl_device(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "0")
    assert order_egl_devices(2) == [0]
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "2")
    with pytest.raises(ConfigError, match=r"below 2, .*MUJOCO_EGL_DEVICE_ID = 2, CUDA_VISIBLE_DEVICES = 1"):
        order_egl_devices(2)


HOSTILE = """
import os
from asyncflow.simulators.robosuite.cameras import import_robosuite
names = "MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID", "CUDA_VISIBLE_DEVICES"
before = [os.environ[name] for name in names]
import_robosuite()
assert [os.environ[name] for name in names] == before
"""


@pytest.mark.sim
def test_what_renders_nothing_does_not_depend_on_opengl():
    """What shells and Dockerfiles set names libraries that are not installed, and robosuite would assert on import."""
    hostile = {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "osmesa"}
    hostile |= {"CUDA_VISIBLE_DEVICES": "GPU-8932f937", "MUJOCO_EGL_DEVICE_ID": "0"}
    done = subprocess.run([sys.executable, "-c", HOSTILE], env=os.environ | hostile, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_images_that_memory_cannot_hold_are_refused_with_the_keys_to_lower(monkeypatch):
    monkeypatch.setattr("asyncflow.devices.free_memory", lambda device: 1_000_000)
    ChunkBoard.allocate(4, 2)
    with pytest.raises(ConfigError, match=r"device cpu: .*lower env.num_envs or env.camera_size"):
        ChunkBoard.allocate(4, 2, rooms={"images": (2, 3, 200, 200)})
