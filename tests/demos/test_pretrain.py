import json
import math
import re

import h5py
import numpy as np
import pytest
import torch

from asyncflow.config import tasks
from asyncflow.config.presets import load_config
from asyncflow.config.sections import Config, EnvConfig, PolicyConfig
from asyncflow.demos.dataset import read_dataset
from asyncflow.demos.pretrain import PretrainOptions, make_examples, pretrain
from asyncflow.demos.samples import cut_chunks
from asyncflow.errors import ConfigError
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import load_into, load_policy_file

CONFIG = PolicyConfig(hidden_sizes=[32], critic_hidden_sizes=[8], horizon=2, n_action_steps=2)
META = {"env_name": "Lift", "type": 1, "env_kwargs": {"robots": ["Panda"]}}
KEYS = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 10}
DEFAULT_ENV = EnvConfig()
OPTIONS = PretrainOptions(num_steps=20, batch_size=16)


def write(path, lengths=(5, 7), meta=META, keys=KEYS):
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if meta is not None:
            data.attrs["env_args"] = json.dumps(meta)
        for index, length in enumerate(lengths):
            for key, size in keys.items():
                data[f"demo_{index}/obs/{key}"] = rng.normal(size=(length, size))
            data[f"demo_{index}/actions"] = rng.uniform(-1, 1, (length, 7))
    return path


@pytest.fixture
def dataset(tmp_path):
    return write(tmp_path / "demos.hdf5")


def run(dataset, out, options=OPTIONS, env=DEFAULT_ENV):
    return pretrain(dataset, out, Config(env=env, policy=CONFIG), options)


def test_chunk_repeats_the_last_action_past_the_episodes_end():
    actions = [torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0], [5.0]])]
    chunks = cut_chunks(actions, horizon=3)
    assert chunks.squeeze(-1).tolist() == [[1, 2, 3], [2, 3, 3], [3, 3, 3], [4, 5, 5], [5, 5, 5]]


def test_states_concatenate_the_observations_in_the_given_order(dataset):
    demos = read_dataset(dataset, EnvConfig(obs_keys=["object", "robot0_eef_pos"]))
    with h5py.File(dataset) as file:
        group = file["data/demo_1/obs"]
        expected = np.concatenate([group["object"][()], group["robot0_eef_pos"][()]], axis=1)
    np.testing.assert_allclose(demos.obs["state"][1].numpy(), expected, rtol=1e-6)


def test_demonstrations_are_read_in_numerical_order(tmp_path):
    demos = read_dataset(write(tmp_path / "demos.hdf5", lengths=range(1, 13)), EnvConfig())
    assert [len(states) for states in demos.obs["state"]] == list(range(1, 13))


def test_normalisers_map_the_datas_range_to_one(dataset, tmp_path):
    run(dataset, tmp_path / "policy.safetensors")
    file = load_policy_file(tmp_path / "policy.safetensors")
    policy = make_policy(CONFIG, file.env_spec, seed=0)
    load_into(policy, file)
    demos = read_dataset(dataset, EnvConfig())
    for normalizer, rows in ((policy.obs_normalizer, demos.obs["state"]), (policy.action_normalizer, demos.actions)):
        values = normalizer.normalize(torch.cat(rows))
        torch.testing.assert_close(values.amin(0), -torch.ones(values.shape[1]))
        torch.testing.assert_close(values.amax(0), torch.ones(values.shape[1]))


def test_the_dataset_and_an_older_file_are_not_replaced(dataset, tmp_path):
    before = dataset.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="which is read"):
            pretrain(dataset, dataset, Config(policy=CONFIG), PretrainOptions(overwrite=overwrite))
    assert dataset.read_bytes() == before
    (tmp_path / "older").write_bytes(b"")
    with pytest.raises(ConfigError, match="pass --overwrite"):
        pretrain(dataset, tmp_path / "older", Config(policy=CONFIG), OPTIONS)


def edit_dataset(path, kwargs, actions):
    with h5py.File(path, "a") as file:
        file["data"].attrs["env_args"] = json.dumps(META | {"env_kwargs": META["env_kwargs"] | kwargs})
        for name in file["data"]:
            file[f"data/{name}/actions"][...] *= actions
    return path


OSC = {"type": "OSC_POSE", "kp": 150}


def test_actions_beyond_the_controllers_limits_are_clipped_as_it_executed_them_and_told(dataset, tmp_path):
    result = run(edit_dataset(dataset, {"controller_configs": OSC}, 7.5), tmp_path / "policy.safetensors")
    told = r"actions of 12 of 12 steps are beyond the controller's limits, such as 7.*, limits -1 to 1: clipped"
    assert re.match(told, result.notice)
    file = load_policy_file(tmp_path / "policy.safetensors")
    assert file.tensors["action_normalizer.scale"].max() <= 1
    assert file.env_spec.action_high == (1.0,) * 7


def test_absolute_targets_are_scaled_by_the_data_and_never_clipped(dataset, tmp_path):
    kwargs = {"controller_configs": OSC | {"control_delta": False}}
    with h5py.File(edit_dataset(dataset, kwargs, np.array([7.5] * 6 + [1])), "r") as file:
        recorded = np.concatenate([file[f"data/{name}/actions"] for name in file["data"]])
    result = run(dataset, tmp_path / "policy.safetensors")
    file = load_policy_file(tmp_path / "policy.safetensors")
    assert result.notice == ""
    assert file.env_spec.action_low == (-math.inf,) * 6 + (-1.0,)
    expected = (recorded.max(0) - recorded.min(0)) / 2
    np.testing.assert_allclose(file.tensors["action_normalizer.scale"], expected, rtol=1e-5)


def test_actions_of_a_narrow_controller_keep_their_scale(dataset, tmp_path):
    """The floor of a range is a share of the controller's: a metre's would drown actions of 2 cm in noise."""
    kwargs = {"controller_configs": {"type": "IK_POSE", "ik_pos_limit": 0.02, "ik_ori_limit": 0.05}}
    run(edit_dataset(dataset, kwargs, np.array([0.02] * 3 + [0.05] * 3 + [1])), tmp_path / "policy.safetensors")
    scale = load_policy_file(tmp_path / "policy.safetensors").tensors["action_normalizer.scale"]
    assert (scale[:3] <= 0.02).all()


def test_loss_falls(dataset, tmp_path):
    result = run(dataset, tmp_path / "policy.safetensors", PretrainOptions(num_steps=200, batch_size=64))
    assert result.final_loss < 0.8 * result.first_loss


def test_same_seed_gives_the_same_file(dataset, tmp_path):
    for name in ("a", "b"):
        run(dataset, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_global_generator_has_no_influence(dataset, tmp_path):
    run(dataset, tmp_path / "a")
    torch.manual_seed(123)
    run(dataset, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_critic_stays_as_initialised(dataset, tmp_path):
    run(dataset, tmp_path / "policy.safetensors")
    file = load_policy_file(tmp_path / "policy.safetensors")
    fresh = make_policy(CONFIG, file.env_spec, OPTIONS.seed)
    assert all(torch.equal(tensor, file.tensors[f"critic.{n}"]) for n, tensor in fresh.critic.state_dict().items())


def test_file_describes_the_datasets_environment(dataset, tmp_path):
    run(dataset, tmp_path / "policy.safetensors", env=EnvConfig(task="Can", horizon=120))
    spec = load_policy_file(tmp_path / "policy.safetensors").env_spec
    assert (spec.env_meta, spec.obs_keys) == (META, tuple(KEYS))
    assert (spec.shapes("vector"), spec.action_dim, spec.horizon) == ({"state": (19,)}, 7, 120)


def test_observations_whose_range_is_beyond_float32_are_refused_as_such(dataset, tmp_path):
    with h5py.File(dataset, "r+") as file:
        file["data/demo_0/obs/object"][0, 0] = 3e38
        file["data/demo_1/obs/object"][0, 0] = -3e38
    with pytest.raises(
        ConfigError, match=r"observations \(vector\) from -3e\+38 to 3e\+38: that range is beyond float32"
    ):
        run(dataset, tmp_path / "policy.safetensors")
    assert not (tmp_path / "policy.safetensors").exists()


def test_gaussian_policy_is_refused(dataset, tmp_path):
    with pytest.raises(ConfigError, match=r"policy\.kind = gaussian"):
        pretrain(dataset, tmp_path / "out", Config(policy=CONFIG.model_copy(update={"kind": "gaussian"})), OPTIONS)


def test_progress_is_told_in_finished_steps(dataset, tmp_path):
    told = []
    pretrain(dataset, tmp_path / "out", Config(env=DEFAULT_ENV, policy=CONFIG), OPTIONS, told.append)
    assert told == list(range(1, OPTIONS.num_steps + 1))


def refused(path, env=DEFAULT_ENV):
    with pytest.raises(ConfigError) as error:
        read_dataset(path, env)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_file_is_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "demos.hdf5")


def test_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "demos.hdf5"
    path.write_text("not HDF5")
    assert "not an HDF5 file" in refused(path)


def test_dataset_without_env_args_is_refused(tmp_path):
    assert "env_args" in refused(write(tmp_path / "demos.hdf5", meta=None))


def test_dataset_without_demonstrations_is_refused(tmp_path):
    assert "no demonstrations" in refused(write(tmp_path / "demos.hdf5", lengths=()))


def test_missing_observations_are_named_with_those_available(tmp_path):
    path = write(tmp_path / "demos.hdf5", keys={"robot0_eef_pos": 3, "agentview_image": 2})
    message = refused(path)
    assert "lacks the observations robot0_eef_quat, robot0_gripper_qpos, object" in message
    assert "available: agentview_image, robot0_eef_pos" in message


@pytest.mark.parametrize(("env_name", "horizon"), [("Lift", load_config("lift").env.horizon), ("ToolHang", 700)])
def test_the_horizon_is_that_with_which_the_task_is_trained(tmp_path, env_name, horizon):
    path = write(tmp_path / "demos.hdf5", meta=META | {"env_name": env_name})
    run(path, tmp_path / "policy.safetensors")
    assert load_policy_file(tmp_path / "policy.safetensors").env_spec.horizon == horizon


def test_an_environment_that_robosuite_lacks_is_refused_before_anything_is_trained(tmp_path):
    path = write(tmp_path / "demos.hdf5", meta=META | {"env_name": "Stackk"})
    assert "env_name = 'Stackk' is no environment of robosuite; did you mean Stack?" in refused(path)


def test_unknown_environment_needs_horizon_and_observations(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "plugin_names", lambda group: ["Knead"])
    path = write(tmp_path / "demos.hdf5", meta=META | {"env_name": "Knead"})
    assert "set env.horizon and env.obs_keys" in refused(path)
    assert read_dataset(path, EnvConfig(horizon=50, obs_keys=["object"])).spec.horizon == 50


def test_a_demonstration_without_actions_is_named(dataset):
    with h5py.File(dataset, "a") as file:
        del file["data/demo_1/actions"]
    assert refused(dataset).endswith("/data/demo_1 lacks `actions`")


def test_a_demonstration_without_an_observation_is_named(dataset):
    with h5py.File(dataset, "a") as file:
        del file["data/demo_1/obs/object"]
    assert "/data/demo_1 lacks the observations object; available: robot0_eef_pos" in refused(dataset)


@pytest.mark.parametrize("path", ["data/demo_1/obs", "data/demo_1"])
def test_an_array_in_the_place_of_a_group_lacks_everything(dataset, path):
    with h5py.File(dataset, "a") as file:
        del file[path]
        file[path] = np.zeros(3)
    assert "/data/demo_1 lacks the observations robot0_eef_pos" in refused(dataset)


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 7)), np.zeros((0, 7)), np.float32(1), np.full((7, 7), b"text")],
    ids=["short", "empty", "0d", "text"],
)
def test_arrays_must_hold_one_row_of_numbers_a_step(dataset, array):
    with h5py.File(dataset, "a") as file:
        del file["data/demo_1/actions"]
        file["data/demo_1/actions"] = array
    assert "/data/demo_1 must hold one row of numbers a step" in refused(dataset)


def test_demonstrations_of_different_sizes_are_refused(dataset):
    with h5py.File(dataset, "a") as file:
        del file["data/demo_1/actions"]
        file["data/demo_1/actions"] = np.zeros((7, 6))
    assert "differ in the size" in refused(dataset)


@pytest.mark.parametrize("meta", [META | {"type": 2}, {"env_name": "Lift"}, ["Lift"]], ids=["gym", "half", "list"])
def test_a_dataset_that_describes_no_robosuite_environment_is_refused(tmp_path, meta):
    assert "attribute `env_args`" in refused(write(tmp_path / "demos.hdf5", meta=meta))


def test_env_args_that_are_no_text_are_refused(dataset):
    with h5py.File(dataset, "a") as file:
        file["data"].attrs["env_args"] = [1.0, 2.0]
    assert "not valid JSON" in refused(dataset)


def test_a_foreign_dataset_is_refused(tmp_path):
    with h5py.File(tmp_path / "demos.hdf5", "w") as file:
        file["data"] = np.zeros(3)
    assert "not a robomimic dataset" in refused(tmp_path / "demos.hdf5")


def test_a_dataset_that_points_to_nothing_is_refused(dataset):
    with h5py.File(dataset, "a") as file:
        file["data/demo_9"] = h5py.ExternalLink("missing.hdf5", "/data/demo_0")
    assert "damaged" in refused(dataset)


@pytest.mark.parametrize("keep", [0, 8, 600, 2000, -1000])
def test_a_truncated_dataset_is_refused(dataset, keep):
    dataset.write_bytes(dataset.read_bytes()[:keep])
    assert "not an HDF5 file, or truncated" in refused(dataset)


@pytest.mark.parametrize("kind", [">f8", ">f4", "longdouble", "float16"])
def test_every_type_of_number_that_hdf5_holds_is_read(dataset, kind):
    with h5py.File(dataset, "r+") as file:
        demo = file["data/demo_0"]
        expected = demo["actions"][()].astype(kind)
        del demo["actions"]
        demo["actions"] = expected
    actions = read_dataset(dataset, EnvConfig(task="Lift")).actions[0]
    torch.testing.assert_close(actions.numpy(), expected.astype(np.float32), rtol=0, atol=0)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e39], ids=str)
@pytest.mark.parametrize("array", ["actions", "obs/object"])
def test_a_number_that_is_not_finite_in_float32_is_named(dataset, array, number):
    with h5py.File(dataset, "a") as file:
        file[f"data/demo_1/{array}"][3, 1] = number
    message = refused(dataset)
    assert f"/data/demo_1/{array}: step 3 holds {number}; every number must be finite in float32" in message


@pytest.mark.parametrize("rate", [1e9, 1e3])
def test_a_diverging_pre_training_leaves_the_old_file(dataset, tmp_path, rate):
    (tmp_path / "policy.safetensors").write_text("a good one")
    options = PretrainOptions(num_steps=20, learning_rate=rate, overwrite=True)
    with pytest.raises(ConfigError, match=r"--learning-rate .*: pre-training diverged, loss 2"):
        run(dataset, tmp_path / "policy.safetensors", options)
    assert (tmp_path / "policy.safetensors").read_text() == "a good one"


def test_only_successes_are_used_if_asked_for(dataset, tmp_path):
    with h5py.File(dataset, "a") as file:
        for index, length in enumerate((5, 7)):
            file[f"data/demo_{index}/rewards"] = np.zeros(length)
        file["data/demo_1/rewards"][-1] = 1.0
    assert run(dataset, tmp_path / "a").num_failures == 1
    kept = run(dataset, tmp_path / "b", PretrainOptions(num_steps=20, only_successes=True))
    assert (kept.num_demos, kept.num_chunks, kept.num_failures) == (1, 7, 0)


@pytest.mark.parametrize(
    ("rewards", "message"), [(None, "has no `rewards`"), (0.0, "not one of .*'s 2 demonstrations ever succeeds")]
)
def test_successes_that_are_not_there_are_refused(dataset, tmp_path, rewards, message):
    if rewards is not None:
        with h5py.File(dataset, "a") as file:
            for index, length in enumerate((5, 7)):
                file[f"data/demo_{index}/rewards"] = np.full(length, rewards)
    with pytest.raises(ConfigError, match=message):
        run(dataset, tmp_path / "out", PretrainOptions(num_steps=20, only_successes=True))


@pytest.mark.parametrize("name", ["num_steps", "batch_size", "learning_rate"])
def test_impossible_options_name_their_flag(name):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} 0"):
        PretrainOptions(**{name: 0})


def write_images(path, cameras=("agentview",), size=(20, 24), lengths=(5, 7), dtype=np.uint8):
    """Write a dataset whose images' pixels are the step that they belong to, and 100 more a demonstration."""
    write(path, lengths)
    with h5py.File(path, "a") as file:
        for index, length in enumerate(lengths):
            for camera in cameras:
                steps = 100 * index + np.arange(length).reshape(-1, 1, 1, 1)
                file[f"data/demo_{index}/obs/{camera}_image"] = np.broadcast_to(steps, (length, *size, 3)).astype(dtype)
    return path


def test_images_are_read_as_bytes_channels_first(tmp_path):
    env = EnvConfig(cameras=["agentview"])
    demos = read_dataset(write_images(tmp_path / "demos.hdf5"), env)
    images = demos.obs["images.agentview"]
    assert [image.shape for image in images] == [(5, 3, 20, 24), (7, 3, 20, 24)]
    assert images[1].dtype == torch.uint8
    assert images[1][:, 0, 0, 0].tolist() == list(range(100, 107))


def test_an_example_observes_what_an_environment_would_show(tmp_path):
    demos = read_dataset(write_images(tmp_path / "demos.hdf5"), EnvConfig(cameras=["agentview"]))
    rows, generator = torch.tensor([0, 1, 4, 5, 7]), torch.Generator().manual_seed(0)
    obs = make_examples(demos, n_obs_steps=1, horizon=2).observe(rows, generator, max_shift=4)
    assert obs["images", "agentview"].shape == (5, 3, 20, 24)
    assert obs["images", "agentview"][:, 1, 7, 9].tolist() == [0, 1, 4, 100, 102]
    history = make_examples(demos, n_obs_steps=3, horizon=2).observe(rows, generator, max_shift=4)
    assert history["state"].shape == (5, 3, 19)
    assert history["images", "agentview"][..., 1, 7, 9].tolist() == [
        [0, 0, 0], [0, 0, 1], [2, 3, 4], [100, 100, 100], [100, 101, 102]
    ]  # fmt: skip
    assert torch.equal(history["state"][:, -1], obs["state"])


def test_images_are_shifted_within_the_limit_and_by_the_seed(tmp_path):
    demos = read_dataset(write_images(tmp_path / "demos.hdf5"), EnvConfig(cameras=["agentview"]))
    columns = torch.arange(24, dtype=torch.uint8).expand(12, 3, 20, 24)
    examples = make_examples(demos, 1, 2)
    examples.obs["images.agentview"] = columns
    rows = torch.arange(12).repeat(20)

    def shifts(seed, max_shift):
        obs = examples.observe(rows, torch.Generator().manual_seed(seed), max_shift)
        return (12 - obs["images", "agentview"][:, 0, 0, 12].long()).tolist()

    assert set(shifts(0, 2)) == {-2, -1, 0, 1, 2}
    assert shifts(0, 2) == shifts(0, 2) != shifts(1, 2)
    assert set(shifts(0, 0)) == {0}


def test_a_policy_learns_from_images_and_its_file_names_the_cameras(tmp_path):
    env = EnvConfig(cameras=["agentview"], n_obs_steps=2)
    run(write_images(tmp_path / "demos.hdf5"), tmp_path / "policy.safetensors", env=env)
    file = load_policy_file(tmp_path / "policy.safetensors")
    spec = file.env_spec
    assert (spec.state_shape, spec.rendered) == ((2, 19), {"images": {"agentview": (2, 3, 20, 24)}})
    fresh = make_policy(CONFIG, spec, OPTIONS.seed)
    name = "image_encoder.cameras.agentview.0.weight"
    assert not torch.equal(file.tensors[name], fresh.state_dict()[name])


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"cameras": ("frontview",)}, "no images of env.cameras = agentview; cameras: frontview"),
        ({"cameras": ()}, "cameras: none"),
        ({"dtype": np.float32}, "must be uint8"),
    ],
)
def test_a_dataset_without_the_images_is_refused(tmp_path, written, message):
    assert message in refused(write_images(tmp_path / "demos.hdf5", **written), EnvConfig(cameras=["agentview"]))
