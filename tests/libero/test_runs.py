"""Runs, policy files and mistakes with LIBERO's tasks, its simulators under an interpreter of their own."""

import pytest
import torch

from asyncflow.config.presets import load_config
from asyncflow.envs import make_vec_env
from asyncflow.errors import ConfigError
from asyncflow.policies.policy_file import read_env_spec

pytestmark = [pytest.mark.sim, pytest.mark.timeout(600)]
SMALL = [
    "env.num_envs=2", "env.num_workers=1", "env.camera_size=[64,64]", "env.horizon=20", "policy.vla.patch_size=16",
    "policy.n_action_steps=5", "buffer.buffer_size=8", "buffer.max_policy_lag=0", "algorithm.num_minibatches=2",
    "trainer.total_updates=1",
]  # fmt: skip


def test_one_update_of_the_tiny_vla_is_the_same_in_both_modes_and_its_file_is_evaluated(
    libero_python, run_here, tmp_path
):
    for mode in ("standard", "vla"):
        words = ["--task", "libero_spatial/9", "--buffer-type", mode, "--out", mode, *SMALL]
        answer = run_here(
            "train", *words, f"env.python={libero_python}", "env.num_steps_wait=3", "env.rotate_images=false"
        )
        assert answer.returncode == 0, answer.stderr
    files = [tmp_path / mode / "checkpoints/last/policy.safetensors" for mode in ("standard", "vla")]
    assert files[0].read_bytes() == files[1].read_bytes()
    spec = read_env_spec(files[0])
    assert spec.rendered_with == {"num_steps_wait": 3, "rotate_images": False}
    assert spec.task == "libero_spatial/9"
    answer = run_here("eval", "vla", "--num-episodes", "1", "--python", libero_python)
    assert answer.returncode == 0, answer.stderr
    assert "episode_length 20.0" in answer.stdout


def test_a_run_of_two_suites_tasks_tells_each_its_instruction_and_is_evaluated(libero_python, run_here, tmp_path):
    words = ["env.tasks=[libero_spatial/0,libero_goal/7]", "env.num_steps_wait=0", f"env.python={libero_python}"]
    answer = run_here("train", *words, "--out", "run", *SMALL)
    assert answer.returncode == 0, answer.stderr
    spec = read_env_spec(tmp_path / "run/checkpoints/last/policy.safetensors")
    assert [task.instruction for task in spec.tasks] == [
        "pick up the black bowl between the plate and the ramekin and place it on the plate",
        "turn on the stove",
    ]
    assert ([task.num_start_states for task in spec.tasks], spec.rendered_with) == ([50, 50], {"num_steps_wait": 0})
    answer = run_here("eval", "run", "--num-episodes", "2", "--num-envs", "2", "--python", libero_python)
    assert answer.returncode == 0, answer.stderr
    assert "libero_goal/7" in answer.stdout


def test_images_are_turned_and_low_dimensional_observations_need_no_camera(libero_python):
    values = {"env.task": "libero_object/0", "env.python": libero_python, "env.cameras": ["agentview"]}
    seen = {}
    for is_rotated in (True, False):
        config = load_config(None, values | {"env.rotate_images": is_rotated, "env.camera_size": [32, 48]})
        with make_vec_env(config.env, 2, 1, 0) as env:
            obs = env.reset(0)
            assert obs["state"].shape == (1, 8)
            seen[is_rotated] = obs["images", "agentview"][0]
    assert seen[True].shape == (3, 32, 48)
    assert torch.equal(seen[True], seen[False].flip(1, 2))
    keys = {"env.cameras": [], "env.obs_keys": ["robot0_joint_pos", "object-state"]}
    with make_vec_env(load_config(None, values | keys).env, 2, 1, 0) as env:
        assert env.reset(0)["state"].shape == (1, 7 + 7 * 14)
        assert env.spec.instruction == "pick up the alphabet soup and place it in the basket"
        assert env.spec.num_start_states == 50


def test_open_episodes_are_rebuilt_bit_for_bit_with_their_images(libero_python):
    values = {"env.task": "libero_spatial/4", "env.python": libero_python, "env.cameras": ["agentview"]}
    config = load_config(None, values | {"env.camera_size": [48, 48], "env.horizon": 7, "env.num_workers": 1})
    chunks = torch.rand(5, 2, 3, 7, generator=torch.Generator().manual_seed(0)) - 0.5
    with make_vec_env(config.env, 3, 2, 0) as env:
        env.reset(0)
        uncut = []
        for index, chunk in enumerate(chunks):  # an episode has three chunks, and three more begin
            env.step_async(chunk, range(2))
            uncut.append(env.step_wait(range(2)).obs)
            if index == 3:
                journal = env.journal()
    with make_vec_env(config.env, 3, 2, 0) as env:
        rebuilt = env.reset(0, journal)
        assert (rebuilt == uncut[3]).all()
        env.step_async(chunks[4], range(2))
        assert (env.step_wait(range(2)).obs == uncut[4]).all()
    assert not (uncut[3] == uncut[4]).all()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("env.cameras", ["agentview_image"], "env.cameras: there is no camera 'agentview_image'; cameras: frontview, "),
        ("env.obs_keys", ["robot0_eef_rot"], "env.obs_keys: LIBERO has no robot0_eef_rot; it has object, "),
    ],
)
def test_what_a_task_lacks_is_one_line(libero_python, key, value, message):
    config = load_config(None, {"env.task": "libero_goal/0", "env.python": libero_python, key: value})
    with pytest.raises(ConfigError) as error:
        make_vec_env(config.env, 1, 1, 0)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_is_written_at_home_or_on_the_terminal(libero_python, monkeypatch, tmp_path, capfd):
    home, caches = tmp_path / "home", tmp_path / "caches"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("ASYNCFLOW_HOME", str(caches))
    monkeypatch.delenv("LIBERO_CONFIG_PATH", raising=False)
    config = load_config(None, {"env.task": "libero_spatial/0", "env.python": libero_python})
    with make_vec_env(config.env, 1, 1, 0) as env:
        env.reset(0)
    assert not list(home.rglob("*"))
    assert capfd.readouterr() == ("", "")
