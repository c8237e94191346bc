"""Files from strangers name code, and none of it is imported on their word: a module that leaves a mark when it is."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import h5py
import pytest
import torch
from silent import TOY, Silent

from asyncflow import cli
from asyncflow.config import plugins
from asyncflow.config.presets import load_config
from asyncflow.config.sections import PolicyConfig, VLAConfig
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import load_policy_file, save_policy
from asyncflow.run.launch import train
from asyncflow.simulators.spec import EnvSpec

STRANGER = """
from pathlib import Path
import torch
from torch import nn

Path(__file__).with_suffix(".imported").touch()

class Model(nn.Module):
    def __init__(self, scale=0.5):
        super().__init__()
        self.scale, self.mean, self.value_head = scale, nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, obs):
        mean = self.mean(obs["state"])
        return (mean + self.scale * obs["noise"] if "noise" in obs.keys() else mean).view(-1, 2, 2)

    def get_value(self, obs):
        return self.value_head(obs["state"]).squeeze(-1)

    def evaluate_actions(self, obs, actions):
        mean = self.mean(obs["state"]).view(-1, 2, 2)[:, : actions.shape[1]]
        return {"log_probs": torch.distributions.Normal(mean, self.scale).log_prob(actions).sum((1, 2))}

def call(*arguments, **keys):
    Path(__file__).with_suffix(".called").touch()

class Caller:
    __init__ = call
"""
KEYS = {"policy.vla.model_class": "stranger.Model", "policy.horizon": 2, "policy.n_action_steps": 2}
SMALL = ("--num-episodes", "2", "--num-envs", "2", "--device", "cpu")
GO_ON = ("trainer.total_updates=2", "--device", "cpu")
RunCli = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the stranger's module, and of a run that its author trained."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "stranger.py").write_text(STRANGER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "_trusted", set())
        patch.syspath_prepend(str(folder))
        changes = TOY | KEYS | {"trainer.total_updates": 1, "logging.out": str(folder / "run")}
        train(load_config("toy_vla_tiny", changes), Silent())
    return folder


@pytest.fixture(autouse=True)
def _fresh(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stranger's module could be imported, as from the folder a user works in, and never was."""
    for mark in ("imported", "called"):
        (elsewhere / f"stranger.{mark}").unlink(missing_ok=True)
    monkeypatch.setattr(plugins, "_trusted", set())
    monkeypatch.syspath_prepend(str(elsewhere))
    monkeypatch.delitem(sys.modules, "stranger", raising=False)


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str]) -> RunCli:
    def run(*arguments: str) -> CompletedProcess[str]:
        return CompletedProcess(arguments, cli.run(list(arguments)), *capsys.readouterr())

    return run


def marks(folder: Path) -> set[str]:
    return {mark for mark in ("imported", "called") if (folder / f"stranger.{mark}").exists()}


def name_class(folder: Path, path: str) -> str:
    """Return a policy file of the run that says to be of another class."""
    source = load_policy_file(folder / "run" / "checkpoints" / "last" / "policy.safetensors")
    vla = source.policy_config.vla.model_copy(update={"model_class": path})
    out = folder / f"{abs(hash(path))}.safetensors"
    policy = make_policy(PolicyConfig(hidden_sizes=[8], critic_hidden_sizes=[8]), EnvSpec({"state": (4,)}, 2, 10), 0)
    save_policy(out, policy, source.policy_config.model_copy(update={"vla": vla}), source.env_spec)
    return str(out)


def refusal(result: CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize("named", ["run", "run/checkpoints/last", "run/checkpoints/last/policy.safetensors"])
def test_an_evaluated_file_imports_nothing(elsewhere: Path, run_here: RunCli, named: str) -> None:
    said = refusal(run_here("eval", str(elsewhere / named), *SMALL))
    assert "policy.vla.model_class = stranger.Model" in said
    assert "--trust-class stranger.Model" in said
    assert not marks(elsewhere)


def test_a_resumed_run_imports_nothing(elsewhere: Path, run_here: RunCli) -> None:
    said = refusal(run_here("train", "--resume", str(elsewhere / "run"), *GO_ON))
    assert "--trust-class stranger.Model" in said
    assert not marks(elsewhere)


@pytest.mark.parametrize("command", ["train", "profile"])
def test_weights_to_start_from_import_nothing(elsewhere: Path, run_here: RunCli, command: str) -> None:
    assert refusal(run_here(command, "--task", "Toy", "--checkpoint", str(elsewhere / "run"), "--device", "cpu"))
    assert not marks(elsewhere)


@pytest.mark.parametrize("path", ["stranger.Caller", "stranger.call", "subprocess.Popen", "os.system", "shutil.rmtree"])
def test_what_is_no_module_is_never_called_even_if_it_is_trusted(elsewhere: Path, run_here: RunCli, path: str) -> None:
    file = name_class(elsewhere, path)
    assert "--trust-class" in refusal(run_here("eval", file, *SMALL))
    assert "not a torch.nn.Module" in refusal(run_here("eval", file, *SMALL, "--trust-class", path))
    assert "called" not in marks(elsewhere)


@pytest.mark.parametrize(
    "path", ["asyncflow.cli.run", "asyncflow.policies.nn.Identity", "asyncflow.config.plugins.EntryPoint"]
)
def test_asyncflows_own_names_are_modules_of_its_own_or_refused(elsewhere: Path, run_here: RunCli, path: str) -> None:
    refusal(run_here("eval", name_class(elsewhere, path), *SMALL))


def test_a_name_that_would_write_to_the_terminal_is_shown_escaped(elsewhere: Path, run_here: RunCli) -> None:
    said = refusal(run_here("eval", name_class(elsewhere, "x\x1b[2J; run: rm -rf .\nasyncflow: done"), *SMALL))
    assert "\\x1b[2J" in said
    assert "\x1b" not in said


def test_the_class_is_imported_once_the_user_trusts_it(elsewhere: Path, run_here: RunCli) -> None:
    result = run_here(
        "eval",
        str(elsewhere / "run"),
        *SMALL,
        "--trust-class",
        "other.Model",
        "--trust-class",
        KEYS["policy.vla.model_class"],
    )
    assert result.returncode == 0, result.stderr
    assert marks(elsewhere) == {"imported"}


@pytest.mark.parametrize(
    "words",
    [
        ("--trust-class", "stranger.Model"),
        ("policy.vla.model_class=stranger.Model",),
        ("policy.vla={model_class: stranger.Model}",),
    ],
)
def test_a_run_goes_on_with_the_class_that_its_user_names(
    elsewhere: Path, tmp_path: Path, run_here: RunCli, words: tuple[str, ...]
) -> None:
    run = shutil.copytree(elsewhere / "run", tmp_path / "run", symlinks=True)
    if words[0].startswith("policy.vla="):
        whole = json.dumps(
            load_policy_file(run / "checkpoints/last/policy.safetensors").policy_config.vla.model_dump(by_alias=True)
        )
        words = (f"policy.vla={whole}",)
    result = run_here("train", "--resume", str(run), *GO_ON, *words)
    assert result.returncode == 0, result.stderr


def test_a_configuration_of_the_users_own_may_name_a_class(elsewhere: Path, tmp_path: Path, run_here: RunCli) -> None:
    (tmp_path / "mine.yaml").write_text("policy: {kind: vla, vla: {model_class: stranger.Model}}")
    assert run_here("config", "--config", str(tmp_path / "mine.yaml")).returncode == 0
    assert plugins._trusted == {"stranger.Model"}


@pytest.mark.parametrize(
    ("policy", "task"),
    [({"kind": "stranger.call"}, "Toy"), ({"kind": "stranger:call"}, "Toy"), ({}, "stranger:call"), ({}, "stranger")],
)
def test_kinds_and_tasks_are_registered_names_and_no_paths(
    elsewhere: Path, tmp_path: Path, run_here: RunCli, policy: dict[str, str], task: str
) -> None:
    config = PolicyConfig.model_construct(**(PolicyConfig(vla=VLAConfig()).__dict__ | policy))
    built = make_policy(PolicyConfig(), EnvSpec({"state": (4,)}, 2, 10), 0)
    save_policy(tmp_path / "file.safetensors", built, config, EnvSpec({"state": (4,)}, 2, 7, task=task))
    refusal(run_here("eval", str(tmp_path / "file.safetensors"), *SMALL))
    assert not marks(elsewhere)


@pytest.mark.parametrize("kind", [2, 3, "stranger.Model"])
def test_a_description_of_an_environment_imports_no_other_simulator(
    elsewhere: Path, tmp_path: Path, run_here: RunCli, kind: object
) -> None:
    """gymnasium would import the module of `stranger:Model`."""
    meta = {"type": kind, "env_name": "stranger:Model", "env_kwargs": {}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    refusal(run_here("train", f"env.env_meta={tmp_path / 'meta.json'}", "env.horizon=3"))
    assert not marks(elsewhere)


def test_a_runs_yaml_builds_no_python_objects(elsewhere: Path, tmp_path: Path, run_here: RunCli) -> None:
    (tmp_path / "config.yaml").write_text("policy: !!python/object/apply:stranger.call []")
    refusal(run_here("train", "--resume", str(tmp_path)))
    assert not marks(elsewhere)


def test_a_lerobot_folder_names_no_class(elsewhere: Path, tmp_path: Path, run_here: RunCli) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"type": "stranger.Model"}))
    refusal(run_here("train", "--task", "Toy", "--checkpoint", str(tmp_path)))
    assert not marks(elsewhere)


def test_a_dataset_names_no_other_simulator(elsewhere: Path, tmp_path: Path, run_here: RunCli) -> None:
    with h5py.File(tmp_path / "demo.hdf5", "w") as file:
        meta = {"type": 2, "env_name": "stranger:Model", "env_kwargs": {}}
        file.create_group("data").attrs["env_args"] = json.dumps(meta)
    refusal(run_here("pretrain", "--dataset", str(tmp_path / "demo.hdf5")))
    refusal(run_here("train", f"env.env_meta={tmp_path / 'demo.hdf5'}", "env.horizon=3"))
    assert not marks(elsewhere)


class Pickled:
    """A pickle of it calls the stranger's function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module("stranger").call, ()


@pytest.mark.parametrize("key", ["env.env_meta", "policy.vla.model_path"])
def test_a_pickle_calls_nothing(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_here: RunCli, key: str
) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"mean.weight": Pickled()}, path)
    monkeypatch.delitem(sys.modules, "stranger")
    words = [f"{key}={path}", "env.task=Toy", "policy.kind=vla", "policy.vla.model_class=stranger.Model"]
    words = words if key != "env.env_meta" else [words[0]]
    refused = refusal(run_here("train", "--device", "cpu", *words))
    assert "stranger.call" in refused
    assert "called" not in marks(elsewhere)
