"""A LeRobot folder with `policy.mapping`: cameras of other names, and actions that are not all executed."""

from __future__ import annotations

import json

import pytest
import torch
from silent import TOY, record, start
from test_smolvla import PADDED, STEPS, TRAIN, N, build, initial_noise, noise_of, observe
from tiny_smolvla import write_policy, write_vlm

from asyncflow.config.presets import load_config
from asyncflow.errors import CheckpointError
from asyncflow.run.build import build_trainer
from asyncflow.run.evaluate_file import evaluate_checkpoint

IMAGES = {"policy.mapping.obs.images": {"top_image": "observation.images.front"}}
MAPPED = TRAIN | {
    "policy.mapping.obs.state": [{"key": "state", "slice": [2, 4]}, {"key": "state", "slice": [0, 2]}],
    "policy.mapping.action": {"size": 2, "select": [1, 1], "scale": [-1, 1]},  # both follow one of two
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy folder whose camera is called front; only read."""
    path = write_policy(tmp_path_factory.mktemp("policy"), write_vlm(tmp_path_factory.mktemp("vlm")))
    config = path / "config.json"
    config.write_text(config.read_text().replace("observation.images.top", "observation.images.front"))
    return path


@pytest.mark.parametrize(("mapping", "executed"), [({}, [0, 1]), ({"action": {"size": 2, "select": [1]}}, [1])])
def test_what_is_not_executed_is_denoised_as_in_evaluation(folder, mapping, executed):
    """Padding, and dimensions that a mapping does not select, while all others explore."""
    policy = build(folder, cameras=["front"], mapping=mapping)
    noise = noise_of(policy)
    first, second = policy.sample_actions(observe("front"), "train", noise)["chains"][:, :2].unbind(1)
    with torch.no_grad():
        ode = first - policy.velocity_field(policy.make_context(observe("front")))(first, 0) / STEPS
    others = [dim for dim in range(PADDED) if dim not in executed]
    assert torch.equal(first, initial_noise(policy, noise))
    torch.testing.assert_close(second[..., others], ode[..., others])
    assert (second[..., executed] - ode[..., executed]).abs().min() > 0


@pytest.mark.parametrize("method", ["flow_sde", "flow_noise", "flow_cps"])
def test_the_ratio_is_one_where_dimensions_are_not_executed(folder, method):
    policy = build(folder, cameras=["front"], mapping={"action": {"size": 2, "select": [1]}}, noise_method=method)
    batch = policy.sample_actions(observe("front"), "train", noise_of(policy)).set("obs", observe("front"))
    torch.testing.assert_close(policy.default_forward(batch)["log_probs"], batch["log_probs"], rtol=0, atol=1e-5)
    assert batch["actions"].shape == (N, policy.horizon, 2)


def test_a_camera_needs_a_mapping_to_have_another_name(folder):
    with pytest.raises(CheckpointError, match=r"missing: front; not the model's: top; see env.cameras and policy.map"):
        build_trainer(load_config("toy_vla_tiny", MAPPED | {"policy.checkpoint": str(folder)}))


def test_vla_equals_standard_with_a_mapping(tmp_path, folder):
    changes = MAPPED | IMAGES | {"policy.checkpoint": str(folder)}
    runs = [
        record(tmp_path / mode, "toy_vla_tiny", changes | {"trainer.buffer_type": mode}) for mode in ("vla", "standard")
    ]
    (tensors, batches, rows), (other_tensors, _, other_rows) = runs
    assert ("images", "observation.images.front") in batches[0]["obs"].keys(True)
    assert all(torch.equal(a, b) for a, b in zip(tensors, other_tensors, strict=True))
    assert rows == other_rows
    assert rows[-1]["updates"] == 2


def test_a_mapped_run_is_evaluated_as_it_evaluates_itself(tmp_path, folder):
    evaluated = {"trainer.eval_interval": 2, "trainer.eval_episodes": 6}
    start(tmp_path / "run", "toy_vla_tiny", MAPPED | IMAGES | evaluated | {"policy.checkpoint": str(folder)})
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    found = evaluate_checkpoint(str(tmp_path / "run"), load_config("toy", TOY), num_episodes=6).as_metrics()
    assert found == {name: row[name] for name in row if name.startswith("eval/")}
