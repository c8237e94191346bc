import json
from functools import partial

import h5py
import numpy as np
import pytest

from asyncflow.config.sections import EnvConfig
from asyncflow.demos.experts import LiftExpert
from asyncflow.demos.record import DemoOptions, RobomimicSimulator, collect_demos
from asyncflow.errors import ConfigError, EnvError

LIFT = EnvConfig(task="Lift")
META = {"env_name": "Lift", "type": 1, "env_kwargs": {"robots": ["Panda"]}}


class PointSimulator:
    """A gripper that moves as told; the cube follows once grasped. `failing` episodes never succeed.

    A picture of its camera is the gripper's place.
    """

    env_meta = META

    def __init__(self, env_config, seed, failing=()):
        self.failing, self.seeds, self.is_closed = failing, [], False
        self.has_cameras, self.num_renders = bool(env_config.cameras), 0

    def reset(self, seed):
        self.seeds.append(seed)
        self.gripper, self.cube = np.array([0.0, 0.0, 0.2]), np.random.default_rng(seed).uniform(-0.1, 0.1, 3)
        return self._observe()

    def step(self, action):
        self.gripper = self.gripper + 0.03 * action[:3]
        if action[6] > 0 and np.linalg.norm(self.gripper - self.cube) < 0.06:
            self.cube = self.gripper.copy()
        is_success = self.cube[2] > 0.15 and len(self.seeds) - 1 not in self.failing
        return self._observe(), float(is_success), bool(is_success)

    def render(self):
        self.num_renders += 1
        return {"agentview_image": self.gripper.copy()}

    def model(self):
        return "<mujoco/>"

    def state(self):
        return np.concatenate([self.gripper, self.cube])

    def close(self):
        self.is_closed = True

    def _observe(self):
        return {"robot0_eef_pos": self.gripper.copy(), "object": np.concatenate([self.cube, np.zeros(7)])}


def collect(out, num_demos=3, failing=(), cameras=(), **options):
    made = []

    def make(env_config, seed):
        made.append(PointSimulator(env_config, seed, failing))
        return made[0]

    config = LIFT.model_copy(update={"cameras": list(cameras)})
    return collect_demos(config, out, DemoOptions(num_demos=num_demos, **options), make), made[0]


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "demos.hdf5"
    collect(path)
    return path


def test_attributes_are_robomimics(dataset):
    with h5py.File(dataset) as file:
        demos = [file["data"][name] for name in ("demo_0", "demo_1", "demo_2")]
        assert json.loads(file["data"].attrs["env_args"]) == META
        assert file["data"].attrs["total"] == sum(demo.attrs["num_samples"] for demo in demos)
        assert all(len(demo["actions"]) == demo.attrs["num_samples"] for demo in demos)
        assert demos[0].attrs["model_file"] == "<mujoco/>"


def test_last_step_and_only_it_is_done_and_rewarded(dataset):
    with h5py.File(dataset) as file:
        for demo in file["data"].values():
            last = [0] * (demo.attrs["num_samples"] - 1) + [1]
            assert demo["dones"][()].tolist() == last
            assert demo["rewards"][()].tolist() == last


def test_next_obs_is_obs_one_step_later(dataset):
    with h5py.File(dataset) as file:
        demo = file["data/demo_0"]
        for key in demo["obs"]:
            np.testing.assert_array_equal(demo["obs"][key][1:], demo["next_obs"][key][:-1])


def test_state_is_the_one_before_the_action(dataset):
    with h5py.File(dataset) as file:
        demo = file["data/demo_0"]
        np.testing.assert_array_equal(demo["states"][:, :3], demo["obs/robot0_eef_pos"][()])


def test_masks_split_the_demonstrations(dataset):
    with h5py.File(dataset) as file:
        train, valid = file["mask/train"][()].tolist(), file["mask/valid"][()].tolist()
    assert (train, valid) == ([b"demo_0", b"demo_1"], [b"demo_2"])


def test_actions_are_within_bounds_whatever_the_noise(tmp_path):
    collect(tmp_path / "noisy.hdf5", num_demos=1, action_noise=0.8)
    with h5py.File(tmp_path / "noisy.hdf5") as file:
        assert np.abs(file["data/demo_0/actions"][()]).max() <= 1


def test_failures_are_counted_left_out_and_repeated_with_another_seed(tmp_path):
    result, simulator = collect(tmp_path / "demos.hdf5", failing={0, 2})
    assert (result.num_demos, result.num_failures) == (3, 2)
    assert len(set(simulator.seeds)) == 5


def test_every_step_of_a_demonstration_is_rendered_and_no_failed_attempt(dataset, tmp_path):
    result, simulator = collect(tmp_path / "seen.hdf5", failing={0, 3}, cameras=["agentview"])
    assert (result.num_failures, simulator.num_renders) == (2, result.num_steps + result.num_demos)
    with h5py.File(tmp_path / "seen.hdf5") as seen:
        for demo in seen["data"].values():
            for when in ("obs", "next_obs"):
                np.testing.assert_array_equal(demo[when]["agentview_image"][()], demo[when]["robot0_eef_pos"][()])


def test_an_episode_that_does_not_repeat_itself_is_not_filmed(tmp_path, monkeypatch):
    reset = PointSimulator.reset
    monkeypatch.setattr(PointSimulator, "reset", lambda self, seed: reset(self, seed + len(getattr(self, "seeds", []))))
    with pytest.raises(EnvError, match="played again for the cameras did not go as before"):
        collect(tmp_path / "seen.hdf5", cameras=["agentview"])


def test_progress_is_told_in_finished_demonstrations(tmp_path):
    told = []
    make = partial(PointSimulator, failing={1})
    collect_demos(LIFT, tmp_path / "demos.hdf5", DemoOptions(num_demos=3), make, told.append)
    assert told == [1, 2, 3]


class FilmedSimulator(RobomimicSimulator):
    """Remembers in which states of the simulator its camera was asked; renders but once, which takes longest."""

    def render(self):
        if not hasattr(self, "filmed"):
            self.filmed, self.frame = [], super().render()
        self.filmed.append(self.state())
        return self.frame


@pytest.mark.sim
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # robosuite's get_xml
def test_lift_is_played_again_as_it_was(tmp_path):
    simulator = FilmedSimulator(LIFT.model_copy(update={"cameras": ["agentview"], "camera_size": [24, 20]}), 0)
    collect_demos(LIFT, tmp_path / "demos.hdf5", DemoOptions(num_demos=2), lambda *_: simulator)
    with h5py.File(tmp_path / "demos.hdf5") as file:
        first, second = (file[f"data/demo_{index}"] for index in range(2))
        assert first["obs/agentview_image"].shape == (len(first["actions"]), 24, 20, 3)
        states = np.split(np.stack(simulator.filmed), [len(first["actions"]) + 1])
        for demo, filmed in zip((first, second), states, strict=True):
            np.testing.assert_array_equal(filmed[:-1], demo["states"][()])  # the last one is after the last action


def test_without_cameras_nothing_is_played_again(tmp_path):
    result, simulator = collect(tmp_path / "demos.hdf5")
    assert (len(simulator.seeds), simulator.num_renders) == (result.num_demos, 0)


def test_expert_that_never_succeeds_is_an_error_and_closes_the_simulator(tmp_path):
    simulator = PointSimulator(LIFT, 0, failing=range(100))
    with pytest.raises(EnvError, match="lower --action-noise"):
        collect_demos(LIFT, tmp_path / "demos.hdf5", DemoOptions(num_demos=1), lambda *_: simulator)
    assert simulator.is_closed


def test_same_seed_gives_the_same_demonstrations(dataset, tmp_path):
    collect(tmp_path / "again.hdf5")
    with h5py.File(dataset) as first, h5py.File(tmp_path / "again.hdf5") as second:
        for name in first["data"]:
            np.testing.assert_array_equal(first[f"data/{name}/actions"][()], second[f"data/{name}/actions"][()])


def test_another_seed_gives_other_demonstrations(dataset, tmp_path):
    collect(tmp_path / "other.hdf5", seed=1)
    with h5py.File(dataset) as first, h5py.File(tmp_path / "other.hdf5") as second:
        assert first["data/demo_0/obs/object"][0].tolist() != second["data/demo_0/obs/object"][0].tolist()


@pytest.mark.parametrize("task", ["Can", "Toy", "Lfit"])
def test_task_without_expert_is_refused_with_those_that_have_one(tmp_path, task):
    with pytest.raises(ConfigError, match=f"{task}: no scripted expert; tasks that have one: Lift"):
        collect_demos(EnvConfig(task=task), tmp_path / "demos.hdf5", DemoOptions())


def test_a_controller_that_the_expert_was_not_written_for_is_refused(tmp_path):
    kwargs = {"robots": ["Panda"], "controller_configs": {"type": "OSC_POSE", "control_delta": False}}
    (tmp_path / "meta.json").write_text(json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": kwargs}))
    with pytest.raises(ConfigError, match=r"env_meta = .*: the scripted expert needs a controller of deltas"):
        collect_demos(EnvConfig(env_meta=str(tmp_path / "meta.json")), tmp_path / "demos.hdf5", DemoOptions())


def test_existing_file_is_refused(dataset):
    before = dataset.read_bytes()
    with pytest.raises(ConfigError, match="the file exists"):
        collect(dataset)
    assert dataset.read_bytes() == before


def test_existing_file_is_replaced_on_request(dataset):
    collect(dataset, num_demos=1, overwrite=True)
    with h5py.File(dataset) as file:
        assert list(file["data"]) == ["demo_0"]


def test_nothing_but_the_dataset_is_left_in_its_folder(dataset):
    assert [path.name for path in dataset.parent.iterdir()] == [dataset.name]


@pytest.mark.parametrize(("name", "value"), [("num_demos", 0), ("action_noise", -0.1)])
def test_impossible_options_name_their_flag(name, value):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} {value}"):
        DemoOptions(**{name: value})


def test_expert_keeps_the_gripper_open_until_it_reaches_the_cube():
    obs = {"robot0_eef_pos": np.array([0.0, 0.0, 0.3]), "object": np.zeros(10)}
    assert LiftExpert().act(obs)[6] == -1


@pytest.mark.sim
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # robosuite's get_xml
def test_robomimic_reads_a_simulated_dataset(tmp_path):
    path = tmp_path / "lift.hdf5"
    result = collect_demos(LIFT, path, DemoOptions(num_demos=2, action_noise=0.0))

    # Importable once a simulator has been built; robomimic 0.3 needs a stand-in for mujoco_py.
    from robomimic.utils import file_utils, obs_utils  # noqa: PLC0415
    from robomimic.utils.dataset import SequenceDataset  # noqa: PLC0415

    obs_keys = ("robot0_eef_pos", "object")
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": list(obs_keys), "rgb": []}})
    data = SequenceDataset(str(path), obs_keys, ("actions", "rewards", "dones"), seq_length=4)
    assert len(data) == result.num_steps
    assert data[0]["actions"].shape == (4, 7)
    assert data[0]["obs"]["object"].shape == (4, 10)
    assert file_utils.get_env_metadata_from_dataset(str(path))["env_name"] == "Lift"
    assert file_utils.get_demos_for_filter_key(str(path), "train") == ["demo_0"]


def test_a_miscalibrated_expert_aims_beside_the_object():
    """That is how the shipped weights get a failure that training can put right."""
    obs = {"robot0_eef_pos": np.zeros(3), "object": np.array([0.0, 0.0, -0.5])}
    straight, beside = LiftExpert().act(obs), LiftExpert(grasp_offset=0.01).act(obs)
    assert beside[0] - straight[0] == pytest.approx(1.2 * 0.01 / 0.05)
    assert (beside[1:] == straight[1:]).all()
