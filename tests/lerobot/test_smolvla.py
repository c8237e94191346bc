"""A LeRobot folder decides here as in LeRobot, is trained like any policy, and is written as LeRobot loads it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from lerobot.configs.types import NormalizationMode
from safetensors.torch import load_file, save_file
from silent import TOY, assert_equal, go_on, outcome, record, start
from specs import spec_of
from tensordict import TensorDict
from tiny_smolvla import ACTION_DIM, CHUNK, STATE_DIM, STATS, their_actions, write_policy, write_vlm

from asyncflow.config.presets import load_config
from asyncflow.config.sections import PolicyConfig, VLAConfig
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import load_into, load_policy_file
from asyncflow.policies.vla.policy import VLAPolicy
from asyncflow.run.build import build_trainer
from asyncflow.run.evaluate_file import evaluate_checkpoint
from asyncflow.seeding import policy_noise

N, STEPS, PADDED = 3, 4, 3
TRAIN = TOY | {
    "policy.horizon": 3,
    "policy.num_inference_steps": STEPS,
    "policy.vla.instruction": "reach the goal",
    "buffer.buffer_size": 16,
    "buffer.max_policy_lag": 1,
    "trainer.total_updates": 2,
    "env.horizon": 8,
}


@pytest.fixture(scope="session")
def vlm(tmp_path_factory):
    return write_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory, vlm):
    """A policy folder, which is only read."""
    return write_policy(tmp_path_factory.mktemp("policy"), vlm)


@pytest.fixture
def obs():
    return observe("top")


def observe(camera):
    generator = torch.Generator().manual_seed(0)
    images = {camera: torch.randint(256, (N, 3, 28, 28), generator=generator).to(torch.uint8)}
    return TensorDict({"state": torch.randn(N, STATE_DIM, generator=generator), "images": images}, [N])


def build(folder, cameras=("top",), state_dim=STATE_DIM, action_dim=ACTION_DIM, **keys):
    vla = {"instruction": "reach the goal"} | {k: keys.pop(k) for k in list(keys) if k in VLAConfig.model_fields}
    keys = {"horizon": CHUNK, "n_action_steps": 2, "num_inference_steps": STEPS, "critic_hidden_sizes": [8]} | keys
    config = PolicyConfig.model_validate({"kind": "lerobot", "checkpoint": str(folder), "vla": vla} | keys)
    return make_policy(
        config,
        spec_of((state_dim,), action_dim, dict.fromkeys(cameras, (3, 28, 28))),
        0,
    )


def noise_of(policy):
    return policy_noise(0, range(N), 0, policy.noise_size)


def initial_noise(policy, noise):
    """Return what the sampler starts from, as LeRobot takes it: [N, chunk, max_action_dim]."""
    start = noise[:, : policy.horizon * PADDED].view(N, policy.horizon, PADDED)
    rest = torch.randn(N, CHUNK - policy.horizon, PADDED, generator=torch.Generator().manual_seed(1))
    return torch.cat([start, rest], 1)


def difference(folder, obs, num_steps=STEPS, **keys):
    """Return by how much our decision and LeRobot's differ at most."""
    policy = build(folder, num_inference_steps=num_steps, **keys)
    noise = noise_of(policy)
    ours = policy.sample_actions(obs, "eval", noise)["actions"]
    theirs = their_actions(folder, obs, initial_noise(policy, noise), num_steps)[:, : policy.horizon]
    assert ours.shape == (N, policy.horizon, ACTION_DIM)
    assert theirs.std() > 0.1  # of noise and normalisation
    return (ours - theirs).abs().max()


@pytest.mark.parametrize("horizon", [CHUNK, 2])
def test_a_decision_is_lerobots_own_from_the_same_noise(folder, obs, horizon):
    """Padding included, and whatever the noise of later actions is; stated tolerance: 1e-5."""
    assert difference(folder, obs, horizon=horizon) <= 1e-5


def test_a_decision_of_ten_steps_is_lerobots_own(folder, obs):
    """LeRobot adds up the time, which then is off by rounding; its fastest sine sees that. Stated tolerance: 1e-3."""
    assert difference(folder, obs, num_steps=10) <= 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"pad_language_to": "max_length", "tokenizer_max_length": 7},
        {"prefix_length": 16},
        {"add_image_special_tokens": True},
        {"attention_mode": "self_attn"},
        {"num_expert_layers": 2, "self_attn_every_n_layers": -1},
        {"empty_cameras": 1},
        {"normalization": NormalizationMode.MIN_MAX},
        {"normalization": NormalizationMode.IDENTITY},
    ],
    ids="-".join,
)
def test_every_setting_of_a_folder_is_followed(tmp_path, vlm, obs, changes):
    assert difference(write_policy(tmp_path, vlm, **changes), obs) <= 1e-5


def test_normalisation_is_applied_to_state_and_actions(tmp_path, vlm, folder, obs):
    """The same weights with a state in other units decide the same on it, and actions come in their new units."""
    stats = {name: dict(values) for name, values in STATS.items()}
    stats["observation.state"]["mean"] = STATS["observation.state"]["mean"] * 3 + 1
    stats["observation.state"]["std"] = STATS["observation.state"]["std"] * 3
    stats["action"] |= {"mean": torch.tensor([0.5, 0.6]), "std": torch.tensor([0.1, 0.2])}
    other = build(write_policy(tmp_path, vlm, stats))
    first = build(folder).sample_actions(obs, "eval", noise_of(other))["actions"]
    rescaled = obs.clone()
    rescaled["state"] = obs["state"] * 3 + 1
    second = other.sample_actions(rescaled, "eval", noise_of(other))["actions"]
    plain = (first - STATS["action"]["mean"]) / STATS["action"]["std"]
    torch.testing.assert_close(second, plain * stats["action"]["std"] + stats["action"]["mean"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", ["state", ("images", "top")])
def test_every_part_of_an_observation_moves_action_and_value(folder, obs, part):
    policy, changed = build(folder), obs.clone()
    changed[part] = 1 - obs[part] if part == "state" else 255 - obs[part]
    first, second = (policy.sample_actions(x, "train", noise_of(policy)) for x in (obs, changed))
    assert ((first["actions"] - second["actions"]).abs().amax((1, 2)) > 1e-4).all()
    assert ((first["values"] - second["values"]).abs() > 0).all()


@pytest.mark.parametrize(
    "push", [{"instruction": "push the goal"}, {"instruction": "", "mapping": {"obs": {"language": "push the goal"}}}]
)
def test_the_instruction_moves_the_action(folder, obs, push):
    policies = build(folder), build(folder, **push)
    first, second = (p.sample_actions(obs, "eval", noise_of(p))["actions"] for p in policies)
    assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("method", "mode"), [("flow_sde", "joint_mean"), ("flow_noise", "per_step"), ("flow_cps", "single_step")]
)
def test_the_ratio_is_one_before_any_step(folder, obs, method, mode):
    policy = build(folder, noise_method=method, log_prob=mode, horizon=4)
    batch = policy.sample_actions(obs, "train", noise_of(policy)).set("obs", obs)
    evaluated = policy.default_forward(batch)
    torch.testing.assert_close(evaluated["log_probs"], batch["log_probs"], rtol=0, atol=1e-5)
    torch.testing.assert_close(evaluated["values"], batch["values"], rtol=0, atol=1e-5)
    assert batch["chains"].shape == (N, STEPS + 1, 4, PADDED)


def test_the_ratio_is_one_in_bfloat16_within_the_stated_tolerance(folder, obs):
    """0.02 nats for a mean, as docs/policies.md states."""
    policy = build(folder, dtype="bfloat16", log_prob="joint_mean")
    batch = policy.sample_actions(obs, "train", noise_of(policy)).set("obs", obs)
    torch.testing.assert_close(policy.default_forward(batch)["log_probs"], batch["log_probs"], rtol=0, atol=0.02)


def test_a_frozen_backbone_decides_as_one_that_runs(folder, obs):
    frozen, running = build(folder, freeze_backbone=True), build(folder)
    encoded = frozen.encode_obs(obs)
    assert set(encoded.keys()) == {"prefix"}
    decisions = [p.sample_actions(x, "train", noise_of(p)) for p, x in ((frozen, encoded), (running, obs))]
    assert all(torch.equal(decisions[0][key], decisions[1][key]) for key in ("actions", "log_probs", "values"))
    trained = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert not any(".vlm." in name or "state_proj" in name for name in trained)
    assert any("lm_expert" in name for name in trained)


def test_what_lerobot_freezes_stays_frozen_and_the_rest_learns(folder, obs):
    policy = build(folder)
    batch = policy.sample_actions(obs, "train", noise_of(policy)).set("obs", obs)
    policy.default_forward(batch)["log_probs"].sum().backward()
    moved = {n for n, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert not any(".vlm." in name or "normalize" in name for name in moved)
    expert = {name for name, _ in policy.named_parameters() if "lm_expert" in name or "action_" in name}
    assert expert <= moved
    assert "model.lerobot.model.state_proj.weight" in moved


@pytest.mark.parametrize("frozen", [False, True])
def test_vla_equals_standard(tmp_path, folder, frozen):
    changes = {"policy.checkpoint": str(folder), "policy.freeze_backbone": frozen}
    assert_vla_equals_standard(tmp_path, TRAIN | changes)


def assert_vla_equals_standard(tmp_path, changes):
    """Train in both modes; return a batch that was trained on."""
    runs = [
        record(tmp_path / mode, "toy_vla_tiny", changes | {"trainer.buffer_type": mode}) for mode in ("vla", "standard")
    ]
    (tensors, batches, rows), (other_tensors, _, other_rows) = runs
    assert all(torch.equal(a, b) for a, b in zip(tensors, other_tensors, strict=True))
    assert rows == other_rows
    assert rows[-1]["updates"] == 2
    return batches[0]


def test_an_update_trains_as_much_on_features_as_on_pictures(tmp_path, monkeypatch, folder):
    assert_trains_as_on_pictures(tmp_path, monkeypatch, TRAIN | {"policy.checkpoint": str(folder)})


def assert_trains_as_on_pictures(tmp_path, monkeypatch, changes):
    """Stated tolerance on parameters after two updates: 1e-5."""
    changes = changes | {"policy.freeze_backbone": True}
    kept, _, _ = record(tmp_path / "kept", "toy_vla_tiny", changes)
    encode = VLAPolicy.encode_obs
    monkeypatch.setattr(VLAPolicy, "encode_obs", lambda self, obs: obs)
    monkeypatch.setattr(VLAPolicy, "make_context", lambda self, obs: encode(self, obs)["prefix"].float())
    again, _, _ = record(tmp_path / "again", "toy_vla_tiny", changes)
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(kept, again, strict=True))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, vlm):
    """A run of two updates whose folder of weights was removed afterwards; only read."""
    source, path = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("run") / "run"
    write_policy(source, vlm)
    first = load_file(source / "model.safetensors")
    start(path, "toy_vla_tiny", TRAIN | {"policy.checkpoint": str(source)})
    shutil.rmtree(source)
    return path, first


def load_trained(path):
    file = load_policy_file(path / "checkpoints" / "last" / "policy.safetensors")
    spec = file.env_spec
    policy = make_policy(file.policy_config, spec, 0)
    load_into(policy, file)
    return policy


def test_a_checkpoint_holds_a_folder_that_decides_in_lerobot_as_the_trained_policy(trained, obs):
    """Stated tolerance: 1e-5."""
    path, _ = trained
    policy = load_trained(path)
    noise = noise_of(policy)
    theirs = their_actions(path / "checkpoints" / "last" / "lerobot", obs, initial_noise(policy, noise))
    ours = policy.sample_actions(obs, "eval", noise)["actions"]
    torch.testing.assert_close(ours, theirs[:, : policy.horizon], rtol=0, atol=1e-5)


def test_the_folder_denoises_and_executes_as_it_was_trained_to(trained):
    folder = trained[0] / "checkpoints" / "last" / "lerobot"
    config = json.loads((folder / "config.json").read_text())
    executed = load_policy_file(folder.parent / "policy.safetensors").policy_config.n_action_steps
    assert (config["num_steps"], config["n_action_steps"], config["chunk_size"]) == (STEPS, executed, CHUNK)


def test_the_folder_differs_from_the_first_in_what_was_trained_alone(trained):
    path, first = trained
    last = load_file(path / "checkpoints" / "last" / "lerobot" / "model.safetensors")
    assert last.keys() == first.keys()
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert any("lm_expert" in name for name in changed)
    assert all("lm_expert" in name or ".action_" in name or "state_proj" in name for name in changed)
    assert all(last[name].dtype == first[name].dtype for name in first)


def test_a_trained_run_is_evaluated_without_the_folder_it_began_from(trained):
    result = evaluate_checkpoint(str(trained[0]), load_config("toy", TOY), num_episodes=2)
    assert result.num_episodes == 2


def test_a_run_can_begin_from_the_folder_of_another(trained):
    folder = trained[0] / "checkpoints" / "last" / "lerobot"
    parts = build_trainer(load_config("toy_vla_tiny", TRAIN | {"policy.checkpoint": str(folder)}))
    parts.close()
    weights = load_trained(trained[0]).model.lerobot.state_dict()
    own = parts.policy.model.lerobot.state_dict()
    assert all(torch.equal(own[name], weights[name]) for name in weights)


def test_a_cut_and_resumed_run_equals_the_uncut_one(tmp_path, vlm):
    """The folder that it began from is gone by then."""
    changes = TRAIN | {"policy.checkpoint": str(write_policy(tmp_path / "policy", vlm)), "trainer.total_updates": 3}
    start(tmp_path / "uncut", "toy_vla_tiny", changes)
    start(tmp_path / "cut", "toy_vla_tiny", changes, stop_at=1)
    shutil.rmtree(tmp_path / "policy")
    go_on(tmp_path / "cut")
    assert_equal(outcome(tmp_path / "cut"), outcome(tmp_path / "uncut"))


def change_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def change_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


OUT, MEAN = "model.action_out_proj.bias", "normalize_inputs.buffer_observation_state.mean"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: change_tensors(path, lambda x: x.pop(OUT)), rf"{OUT} \[3\] vs absent"),
        (lambda path: change_tensors(path, lambda x: x.update({OUT: torch.zeros(4)})), rf"{OUT} \[3\] vs \[4\]"),
        (lambda path: change_tensors(path, lambda x: x[MEAN].fill_(torch.inf)), f"is not set: {MEAN} is not finite"),
        (lambda path: (path / "model.safetensors").write_bytes(b"no"), "model.safetensors is truncated or damaged"),
        (lambda path: change_config(path, vlm_model_name=str(path / "none")), "LeRobot cannot build it: "),
        (lambda path: change_config(path, unheard_of=1), "LeRobot cannot build it: "),
        (
            lambda path: change_config(path, expert_width_multiplier=0.5),
            r"action_in_proj.bias \[16\] vs \[24\].*and \d+ more",
        ),
        (
            lambda path: change_config(path, resize_imgs_with_padding=[24, 24]),
            "its model cannot decide on such observations: ",
        ),
    ],
    ids=["missing", "shape", "unset", "damaged", "no-vlm", "unknown-key", "other-size", "does-not-run"],
)
def test_what_is_wrong_with_a_folder_is_one_line(tmp_path, folder, spoil, message):
    path = tmp_path / "policy"
    shutil.copytree(folder, path)
    spoil(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        build(path)
    assert str(caught.value).startswith(f"policy.checkpoint = {path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cameras": ("front",)}, "missing: top; not the model's: front"),
        ({"state_dim": 5}, r"observation.state has 4 numbers, the environment's state has the shape \[5\]"),
        ({"action_dim": 7}, "actions have 2 numbers, the environment's 7"),
        ({"horizon": CHUNK + 1}, "policy.horizon = 6: .* predicts chunks of 5"),
        ({"lora_rank": 2}, "policy.vla.lora_rank = 2: a LeRobot folder has no place for adapters"),
    ],
)
def test_what_does_not_fit_a_folder_is_one_line(folder, keys, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(folder, **keys)
    assert "\n" not in str(caught.value)


def test_the_command_line_recognises_a_folder(run_cli, folder, tmp_path):
    overrides = [f"{key}={value}" for key, value in (TRAIN | {"trainer.total_updates": 1}).items()]
    done = run_cli("train", "--config", "toy_vla_tiny", "--checkpoint", str(folder), "--out", "run", *overrides)
    assert done.returncode == 0, done.stderr
    assert f"lerobot from {folder}" in done.stdout.replace("\n", "")
    assert (tmp_path / "run" / "checkpoints" / "last" / "lerobot" / "model.safetensors").exists()


def test_code_that_a_vision_language_model_brings_is_neither_run_nor_asked_about(folder, tmp_path, monkeypatch):
    """transformers would ask on a terminal whether to run it, and run it after a `y`."""
    copy, vlm = shutil.copytree(folder, tmp_path / "copy"), tmp_path / "vlm"
    vlm.mkdir()
    (vlm / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": {"AutoConfig": "odd.Config"}}))
    (vlm / "odd.py").write_text(
        f"open({str(tmp_path / 'mark')!r}, 'w')\n"
        "from transformers import PretrainedConfig\n"
        "class Config(PretrainedConfig):\n    model_type = 'odd'\n"
    )
    change_config(copy, vlm_model_name=str(vlm))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(CheckpointError, match=r"LeRobot cannot build it: ValueError: .*custom code"):
        build(copy)
    assert not (tmp_path / "mark").exists()
