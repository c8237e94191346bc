"""Runs and policies of version 0.1.0 are read, evaluated and resumed, and end as 0.1.0 would have ended them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensordict import TensorDict

from asyncflow import cli
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import load_into, load_policy_file

KEPT = Path(__file__).parents[1] / "data" / "0.1.0"
RUNS = ("vla", "standard")  # a flow policy one update behind, and a Gaussian one
NEAR = {"rtol": 1e-4, "atol": 1e-5}  # another processor rounds differently


@pytest.fixture(params=RUNS)
def name(request):
    return request.param


@pytest.fixture
def run_dir(name, tmp_path):
    return shutil.copytree(KEPT / name, tmp_path / name, symlinks=True)


def read_rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def resume(folder, *more):
    return cli.run(["train", "--resume", str(folder), "trainer.total_updates=6", "trainer.save_interval=6", *more])


def distances(folder, name):
    """Return how far each of the last checkpoint's tensors is from where 0.1.0 came."""
    end, kept = load_file(folder / "checkpoints/last/policy.safetensors"), load_file(KEPT / f"{name}_end.safetensors")
    assert end.keys() == kept.keys()
    return {key: float((end[key] - kept[key]).abs().max()) for key in kept}


def test_a_kept_run_ends_where_0_1_0_would_have_ended_it(run_dir, name):
    """Weights, optimizer, versions of the weights, clocks and the open episodes of four environments all enter."""
    begun = read_rows(run_dir)
    assert resume(run_dir) == 0
    assert max(distances(run_dir, name).values()) < 1e-5
    rows = read_rows(run_dir)
    assert rows[:3] == begun  # what was trained stays written
    assert [(row["updates"], row["env_steps"]) for row in rows[3:]] == [(4, 256), (5, 320), (6, 384)]
    assert {row["staleness/policy_lag_mean"] for row in rows[3:]} == {1.0 if name == "vla" else 0.0}


def test_a_training_step_is_larger_than_the_tolerance(name):
    """So that a run which only loaded its checkpoint would not pass."""
    begin = load_file(KEPT / name / "checkpoints/last/policy.safetensors")
    end = load_file(KEPT / f"{name}_end.safetensors")
    assert max(float((end[key] - begin[key]).abs().max()) for key in begin) > 1e-3


def test_emulated_latencies_of_0_1_0_do_not_keep_a_run_from_going_on(run_dir, name, capsys):
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    for section in ("env", "policy", "algorithm"):
        assert "emulated_latency_s" in config[section]
        config[section]["emulated_latency_s"] = 1e-3
    config["trainer"]["emulated_spread"] = "uniform"
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    assert resume(run_dir) == 0
    assert max(distances(run_dir, name).values()) < 1e-5
    said = " ".join(capsys.readouterr().out.split())
    assert "env.emulated_latency_s = 0.001: a run has no emulated stages any more" in said
    assert "emulated_latency_s" not in (run_dir / "config.yaml").read_text()


def test_a_kept_policy_decides_as_it_did(name):
    file = load_policy_file(KEPT / name / "checkpoints/last/policy.safetensors")
    policy = make_policy(file.policy_config, file.env_spec, 0)
    load_into(policy, file)
    kept = load_file(KEPT / f"{name}_decisions.safetensors")
    obs = TensorDict({"state": kept["obs"]}, [len(kept["obs"])])
    with torch.no_grad():
        actions = policy.sample_actions(obs, "eval", kept["noise"])["actions"]
    torch.testing.assert_close(actions, kept["actions"], **NEAR)


def test_a_kept_policy_is_evaluated(name, capsys):
    checkpoint = str(KEPT / name / "checkpoints" / "update_000003")
    assert cli.run(["eval", checkpoint, "--num-episodes", "4", "--device", "cpu"]) == 0
    assert "4 episodes" in capsys.readouterr().out


def test_a_kept_policy_starts_a_new_run(name, tmp_path):
    file = KEPT / name / "checkpoints" / "last" / "policy.safetensors"
    flags = ["--config", "toy", "--device", "cpu", "--logger", "none", "--out", str(tmp_path / "run")]
    kind = {"vla": ["policy.kind=flow", "policy.num_inference_steps=2"], "standard": []}[name]
    small = ["policy.hidden_sizes=[8]", "policy.critic_hidden_sizes=[8]", "buffer.buffer_size=32", "env.num_envs=4"]
    limits = ["algorithm.num_minibatches=2", "trainer.total_updates=1", "trainer.eval_interval=0"]
    assert cli.run(["train", "--checkpoint", str(file), *flags, *kind, *small, *limits]) == 0
    assert [row["updates"] for row in read_rows(tmp_path / "run")] == [1]
