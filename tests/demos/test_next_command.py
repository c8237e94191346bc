"""What `pretrain` prints as the next command starts a run from its file, whatever dataset, folder and keys it had."""

import shlex

import pytest
from test_pretrain import KEYS, META, write, write_images

from asyncflow import cli
from asyncflow.config.tasks import find_task
from asyncflow.run import launch
from asyncflow.run.build import check_start

SMALL = ["policy.hidden_sizes=[8]", "policy.critic_hidden_sizes=[8]"]


@pytest.fixture
def follow(tmp_path, monkeypatch, capsys):
    """Return a function that pre-trains and then runs the command that it prints, up to the simulators."""
    started = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "train", lambda config, *_: started.append(check_start(config)))

    def run(*arguments):
        assert cli.run(["pretrain", "--num-steps", "1", "--batch-size", "2", *arguments, *SMALL]) == 0
        *_, line = capsys.readouterr().out.splitlines()
        words = shlex.split(line.removeprefix("next: asyncflow "), comments=True)
        monkeypatch.setattr(cli, "stop_on_signals", lambda *_: None)
        cli.run([*words, "logging.out=run"])
        assert capsys.readouterr().err.count("asyncflow: error") == 0
        assert len(started) == 1
        return words

    return run


@pytest.mark.parametrize("folder", ["a b", "#1", "it's", '"x"', "-x"])
def test_in_any_folder(tmp_path, follow, folder):
    (tmp_path / folder).mkdir()
    write(tmp_path / folder / "demos.hdf5")
    assert (
        follow("--dataset", f"./{folder}/demos.hdf5")[2]
        == f"{'./' if folder == '-x' else ''}{folder}/demos.safetensors"
    )


@pytest.mark.parametrize("keys", [[], ["env.task=Square"], ["policy.checkpoint=lift_flow"], ["policy.checkpoint=null"]])
@pytest.mark.parametrize("preset", [None, "lift", "mine.yaml"])
def test_of_another_task_than_the_preset_and_with_any_checkpoint(tmp_path, follow, keys, preset):
    (tmp_path / "mine.yaml").write_text("env: {num_envs: 8}")
    write(tmp_path / "can.hdf5", meta=META | {"env_name": find_task("Can").env_name})
    words = follow("--dataset", "can.hdf5", *(["--config", preset] if preset else []), *keys)
    assert ("env.task=Can" in words) == (bool(preset == "lift") or keys == ["env.task=Square"])


def test_with_pictures_of_another_size_than_the_default(tmp_path, follow):
    write_images(tmp_path / "demos.hdf5", size=(20, 24))
    assert "env.camera_size=[20, 24]" in follow(
        "--dataset", "demos.hdf5", "env.cameras=[agentview]", "env.n_obs_steps=2"
    )


def test_of_a_task_without_a_preset(tmp_path, follow):
    write(tmp_path / "wipe.hdf5", meta=META | {"env_name": "Wipe"})
    follow("--dataset", "wipe.hdf5", "env.horizon=50", f"env.obs_keys=[{','.join(KEYS)}]")
