"""Runs with `policy.mapping`: both modes equal, an identity changes nothing, and what does not fit starts nothing."""

import json

import pytest
import torch
from silent import TOY, Silent, assert_equal, go_on, outcome, record, start

from asyncflow.config.presets import load_config
from asyncflow.config.sections import PolicyConfig
from asyncflow.envs.mapping import NameMapping
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import load_policy_file, resolve_checkpoint, save_policy
from asyncflow.run.evaluate_file import evaluate_checkpoint
from asyncflow.run.launch import train
from asyncflow.run.parts import build_policy
from asyncflow.seeding import derive_seed
from asyncflow.simulators.spec import EnvSpec

PRESET, UPDATES = "toy_vla_tiny", {"trainer.total_updates": 3}
IDENTITY = {
    "policy.mapping.obs": {"images": {"top_image": "top"}, "state": [{"key": "state"}]},
    "policy.mapping.action": {"select": [0, 1], "scale": [1, 1], "offset": [0, 0]},
}
MAPPED = {
    "policy.vla.instruction": "",
    "policy.mapping.obs": {
        "images": {"top": "observation.images.front"},
        "state": [{"key": "state", "slice": [2, 4]}, {"key": "state", "slice": [1, 2]}, {"key": "state"}],
        "language": "reach the goal",
    },
    "policy.mapping.action": {"size": 5, "select": [4, 1], "scale": [-1, 0.5], "offset": [0.125, 0]},
}


def assert_same(first, second):
    tensors, batches, rows = zip(first, second, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))
    for a, b in zip(*batches, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.flatten_keys().values(), b.flatten_keys().values(), strict=True))
    assert len(batches[0]) == len(batches[1]) == len(rows[0])
    assert rows[0] == rows[1]


def test_vla_equals_standard_with_a_mapping(tmp_path):
    changes = TOY | UPDATES | MAPPED | {"buffer.max_policy_lag": 1}
    vla = record(tmp_path / "vla", PRESET, changes | {"trainer.buffer_type": "vla"})
    standard = record(tmp_path / "standard", PRESET, changes | {"trainer.buffer_type": "standard"})
    batch = vla[1][0]
    assert ("images", "observation.images.front") in batch["obs"].keys(True)
    assert batch["obs", "state"].shape[-1] == 7
    assert batch["actions"].shape[-1] == 5
    assert_same(vla, standard)


def test_an_identity_changes_nothing_and_another_mapping_does(tmp_path):
    plain, identity, mapped = (
        record(tmp_path / str(number), PRESET, TOY | UPDATES | keys)
        for number, keys in enumerate([{}, IDENTITY, {"policy.mapping.action": {"scale": [-1, 1]}}])
    )
    assert_same(plain, identity)
    assert not torch.equal(plain[0][0], mapped[0][0])


def test_a_start_checks_the_mapping_once(tmp_path, monkeypatch):
    checked = []
    init = NameMapping.__init__
    monkeypatch.setattr(
        NameMapping, "__init__", lambda self, config, spec: (checked.append(spec), init(self, config, spec))[1]
    )
    start(tmp_path / "run", PRESET, TOY | {"trainer.total_updates": 1, "trainer.eval_interval": 1} | MAPPED)
    assert len(checked) == 1  # the toy says its sizes only once it is built


def test_a_cut_and_resumed_run_equals_the_uncut_one(tmp_path):
    start(tmp_path / "uncut", PRESET, TOY | UPDATES | MAPPED)
    start(tmp_path / "cut", PRESET, TOY | UPDATES | MAPPED, stop_at=2)
    go_on(tmp_path / "cut")
    assert_equal(outcome(tmp_path / "cut"), outcome(tmp_path / "uncut"))


def test_a_resumed_run_keeps_its_mapping(tmp_path):
    start(tmp_path / "run", PRESET, TOY | {"trainer.total_updates": 1} | MAPPED)
    with pytest.raises(ConfigError, match=r"policy.mapping.action.scale = \[1, 1\]: cannot change with --resume"):
        go_on(tmp_path / "run", **{"policy.mapping.action.scale": [1, 1]})


def test_the_mapping_travels_with_the_policy(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "asyncflow.run.evaluate_file.derive_seed",
        lambda seed, what: seed if what == "report" else derive_seed(seed, what),  # the run's own episodes
    )
    changes = TOY | MAPPED | {"trainer.total_updates": 2, "trainer.eval_interval": 2, "trainer.eval_episodes": 6}
    start(tmp_path / "run", PRESET, changes)
    file = load_policy_file(resolve_checkpoint(str(tmp_path / "run")))
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    found = evaluate_checkpoint(str(tmp_path / "run"), load_config("toy", TOY), 6).as_metrics()
    assert file.policy_config.mapping.obs.images == {"top": "observation.images.front"}
    assert (file.env_spec.rendered, file.env_spec.action_dim) == ({"images": {"top": (3, 28, 28)}}, 2)
    assert found == {name: row[name] for name in row if name.startswith("eval/")}


def test_a_file_whose_mapping_does_not_fit_its_environment_is_refused_before_that_is_built(tmp_path, monkeypatch):
    spec = ToyVecEnv(1, 2).spec
    config = PolicyConfig.model_validate({"mapping": {"obs": {"state": [{"key": "cube"}]}}})
    save_policy(tmp_path / "policy.safetensors", make_policy(config, EnvSpec({"state": (4,)}, 2, 10), 0), config, spec)
    monkeypatch.setattr("asyncflow.run.evaluate_file.make_vec_env", lambda *_: pytest.fail("it was built"))
    with pytest.raises(ConfigError, match=r"there is no observation 'cube'; observations: state"):
        evaluate_checkpoint(str(tmp_path / "policy.safetensors"), load_config("toy", TOY), 2)


def build_from(tmp_path, made_with, keys):
    """Build the policy of a run with `keys` from a file that was made with others."""
    spec, path = ToyVecEnv(1, 2, tasks=["ToyImages"]).spec, tmp_path / "policy.safetensors"
    made = load_config(PRESET, made_with)
    save_policy(
        path, build_policy(made, NameMapping(made.policy.mapping, spec), torch.device("cpu")), made.policy, spec
    )
    config = load_config(PRESET, keys | {"policy.checkpoint": str(path)})
    return build_policy(config, NameMapping(config.policy.mapping, spec), torch.device("cpu"))


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("obs", r"made with policy.mapping.obs.images = {'top_image': 'top'}, which the run leaves out"),
        ("action", r"made with policy.mapping.action = {'select': \[0, 1\], .*}, which the run leaves out"),
    ],
)
def test_a_checkpoint_that_was_made_with_a_mapping_needs_one(tmp_path, part, said):
    kept = {key: value for key, value in IDENTITY.items() if not key.endswith(part)}
    with pytest.raises(CheckpointError, match=said):
        build_from(tmp_path, IDENTITY, kept)


def test_a_checkpoint_is_read_under_the_names_that_a_mapping_gives(tmp_path):
    renamed = {"policy.mapping.obs.images": {"top": "front"}}
    with pytest.raises(CheckpointError, match=r"made for images = \['top'\].*; the run has images = \['front'\]"):
        build_from(tmp_path, {}, renamed)
    assert build_from(tmp_path, {}, IDENTITY).model.backbone.cameras == ["top"]
    assert build_from(tmp_path, renamed, renamed).model.backbone.cameras == ["front"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"obs.images": {"frontview": "x"}}, r"there is no image 'frontview'; images: agentview_image \(env.cameras\)"),
        ({"obs.state": [{"key": "cube"}]}, r"there is no observation 'cube'; observations: robot0_eef_pos, .*object"),
        ({"obs.state": [{"key": "object", "slice": [0, 11]}]}, r"ends beyond its 10 numbers; .*eef_quat 4"),
        ({"action.scale": [1, 1]}, r"policy.mapping.action.scale = .*: 2 entries for 7 dimensions"),
    ],
)
@pytest.mark.parametrize("policy", [{"policy.kind": "vla"}, {"policy.vla.model_class": "torch.nn.Identity"}])
def test_wrong_names_and_sizes_are_found_before_simulators_are_built(tmp_path, monkeypatch, keys, said, policy):
    monkeypatch.setattr("asyncflow.run.parts.make_vec_env", lambda *_: pytest.fail("simulators were built"))
    changes = {f"policy.mapping.{key}": value for key, value in keys.items()} | {"policy.kind": "vla"} | policy
    changes |= {"env.cameras": ["agentview"], "policy.checkpoint": None, "logging.out": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match=said):
        train(load_config("lift", changes), Silent())


def test_a_wrong_width_starts_nothing(tmp_path, monkeypatch):
    closed = []

    def close(env):
        closed.append(env)

    monkeypatch.setattr(ToyVecEnv, "close", close)
    changes = {"policy.mapping.obs.state": [{"key": "state", "slice": [2, 9]}], "logging.out": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match=r"slice = \[2, 9\] of state ends beyond its 4 numbers; numbers: state 4"):
        train(load_config(PRESET, TOY | changes), Silent())
    assert len(closed) == 1
    assert not (tmp_path / "run").exists()


def test_the_command_line_answers_in_one_line(run_here):
    done = run_here("train", "--task", "Toy", "policy.mapping.action.scale=[1, 1, 1]")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "asyncflow: error: policy.mapping.action.scale = [1.0, 1.0, 1.0]: 3 entries for 2 dimensions of the "
        "simulator's action; give one for each"
    )
