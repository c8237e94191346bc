"""What cameras saw, in datasets: point clouds on their way from `asyncflow demos` into a pre-trained policy."""

import json

import h5py
import numpy as np
import pytest
import torch
from test_pretrain import CONFIG, META, OPTIONS, run, write

from asyncflow.config.sections import EnvConfig
from asyncflow.demos.dataset import read_dataset
from asyncflow.demos.pretrain import make_examples
from asyncflow.demos.record import DemoOptions, RobomimicSimulator, collect_demos
from asyncflow.errors import ConfigError
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import load_policy_file

P = 8
ENV = EnvConfig(point_clouds=["agentview"], num_points=P)
RECORDED = {"num_points": P, "point_bounds": [-1.0, -1.0, 0.0, 1.0, 1.0, 2.0], "camera_size": [20, 24]}


def write_clouds(path, *, cameras=("agentview",), num_points=P, lengths=(5, 7), dtype=np.float32, settings=RECORDED):
    """Write a dataset whose clouds' numbers are the step that they belong to, and 100 more a demonstration."""
    write(path, lengths, META | ({} if settings is None else {"point_settings": settings}))
    with h5py.File(path, "a") as file:
        for index, length in enumerate(lengths):
            for camera in cameras:
                steps = 100 * index + np.arange(length).reshape(-1, 1, 1)
                clouds = np.broadcast_to(steps, (length, num_points, 6)).astype(dtype)
                file[f"data/demo_{index}/obs/{camera}_points"] = clouds
    return path


@pytest.fixture
def dataset(tmp_path):
    return write_clouds(tmp_path / "demos.hdf5")


def refused(dataset, env=ENV) -> str:
    with pytest.raises(ConfigError) as caught:
        read_dataset(dataset, env)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_clouds_are_read_with_what_made_them(dataset):
    demos = read_dataset(dataset, ENV)
    clouds = demos.obs["points.agentview"]
    assert [(cloud.shape, cloud.dtype) for cloud in clouds] == [((n, P, 6), torch.float32) for n in (5, 7)]
    assert clouds[1][:, 0, 0].tolist() == list(range(100, 107))
    assert (demos.spec.rendered_with, demos.spec.env_meta) == (RECORDED, META)


def test_a_dataset_that_does_not_say_how_it_made_its_clouds_takes_the_configurations_word(tmp_path):
    demos = read_dataset(write_clouds(tmp_path / "demos.hdf5", settings=None), ENV)
    assert demos.spec.rendered_with == {"num_points": P, "point_bounds": ENV.point_bounds, "camera_size": [84, 84]}


def test_clouds_that_nobody_asks_for_are_not_read(dataset):
    demos = read_dataset(dataset, EnvConfig())
    assert (list(demos.obs), demos.spec.rendered_with, demos.spec.env_meta) == (["state"], {}, META)


def test_an_example_observes_the_clouds_of_its_steps_as_they_are(dataset):
    rows, generator = torch.tensor([0, 1, 4, 5, 7]), torch.Generator().manual_seed(0)
    demos = read_dataset(dataset, ENV)
    obs = make_examples(demos, n_obs_steps=1, horizon=2).observe(rows, generator, max_shift=4)
    assert obs["points", "agentview"].shape == (5, P, 6)
    assert obs["points", "agentview"][:, 3, 2].tolist() == [0, 1, 4, 100, 102]
    history = make_examples(demos, n_obs_steps=2, horizon=2).observe(rows, generator, max_shift=4)
    assert history["points", "agentview"][:, :, 3, 2].tolist() == [[0, 0], [0, 1], [3, 4], [100, 100], [101, 102]]


def test_a_policy_learns_from_clouds_and_its_file_names_what_made_them(tmp_path, dataset):
    env = ENV.model_copy(update={"n_obs_steps": 2})
    run(dataset, tmp_path / "policy.safetensors", env=env)
    file = load_policy_file(tmp_path / "policy.safetensors")
    spec = file.env_spec
    assert (spec.rendered, spec.state_shape) == ({"points": {"agentview": (2, P, 6)}}, (2, 19))
    assert spec.rendered_with == RECORDED
    fresh = make_policy(CONFIG, spec, OPTIONS.seed).state_dict()
    name = "point_encoder.cameras.agentview.points.0.weight"
    assert not torch.equal(file.tensors[name], fresh[name])


def test_the_demonstrations_points_are_mapped_to_one(tmp_path, dataset):
    run(dataset, tmp_path / "policy.safetensors", env=ENV)
    tensors = load_policy_file(tmp_path / "policy.safetensors").tensors
    assert tensors["point_encoder.normalizer.offset"].tolist() == [53.0] * 6  # of numbers from 0 to 106
    assert tensors["point_encoder.normalizer.scale"].tolist() == [53.0] * 6


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"cameras": ("frontview",)}, "no point clouds of env.point_clouds = agentview; cameras: frontview"),
        ({"cameras": ()}, "cameras: none"),
        ({"dtype": np.float64}, "must be float32 [steps, 8 (env.num_points), 6]"),
        ({"num_points": 9}, "must be float32 [steps, 8 (env.num_points), 6]"),
        ({"settings": ["num_points"]}, "point_settings must hold num_points, point_bounds, camera_size"),
        ({"settings": {"num_points": "many"}}, "point_settings must hold"),
        ({"settings": 3}, "point_settings must hold"),
    ],
)
def test_a_dataset_without_such_clouds_is_refused(tmp_path, written, message):
    assert message in refused(write_clouds(tmp_path / "demos.hdf5", **written))


def test_clouds_that_are_not_finite_are_refused(dataset):
    with h5py.File(dataset, "a") as file:
        file["data/demo_1/obs/agentview_points"][3, 2, 1] = np.nan
    assert "/data/demo_1/obs/agentview_points: step 3 holds nan" in refused(dataset)


class EagerSimulator(RobomimicSimulator):
    """Lift, solved after five actions: its cameras are what takes time."""

    def reset(self, seed):
        self.num_actions = 0
        return super().reset(seed)

    def step(self, action):
        self.num_actions += 1
        obs, reward, _ = super().step(action)
        return obs, reward, self.num_actions == 5


@pytest.mark.sim
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # robosuite's get_xml
def test_demos_record_the_clouds_that_the_simulator_shows_beside_the_images(tmp_path):
    seen = {"cameras": ["agentview"], "point_clouds": ["frontview"]}
    config = EnvConfig(task="Lift", num_points=64, camera_size=[32, 32], **seen)
    collect_demos(config, tmp_path / "demos.hdf5", DemoOptions(num_demos=1, action_noise=0.0), EagerSimulator)
    with h5py.File(tmp_path / "demos.hdf5") as file:
        demo, meta = file["data/demo_0"], json.loads(file["data"].attrs["env_args"])
        clouds, images = demo["obs/frontview_points"][()], demo["obs/agentview_image"]
        assert (clouds.shape, clouds.dtype) == ((5, 64, 6), np.float32)
        assert images.shape == (5, 32, 32, 3)
        assert np.array_equal(demo["next_obs/frontview_points"][:-1], clouds[1:])
        assert not np.array_equal(clouds[0], clouds[4])
    assert meta["point_settings"]["camera_size"] == [32, 32]
    assert np.abs(clouds[:, :, :2]).max() <= 0.5
    assert clouds[:, :, 2].min() >= 0.805 - 1e-6
    demos = read_dataset(tmp_path / "demos.hdf5", EnvConfig(point_clouds=["frontview"]))
    assert (demos.spec.rendered_with["num_points"], len(demos.obs["points.frontview"])) == (64, 1)
