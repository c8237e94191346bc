"""A pi0 folder of LeRobot decides here as in LeRobot, is trained like any policy, and is written as LeRobot loads it.

LeRobot's code rounds to bfloat16. Where it is compared with, it computes in float32, but for one test.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import tiny_pi0
import torch
import transformers.utils.hub
from lerobot.configs.types import NormalizationMode
from lerobot.policies.pi0.modeling_pi0 import PI0Policy
from safetensors.torch import load_file
from silent import TOY, assert_equal, go_on, outcome, start
from test_smolvla import (
    MEAN,
    OUT,
    PADDED,
    STEPS,
    N,
    assert_trains_as_on_pictures,
    assert_vla_equals_standard,
    build,
    change_config,
    change_tensors,
    initial_noise,
    load_trained,
    noise_of,
    observe,
)
from test_smolvla import TRAIN as TRAIN_SMOLVLA
from tiny_pi0 import float32, their_actions, tiny_sizes, write_cache, write_policy
from tiny_smolvla import ACTION_DIM, CAMERA, CHUNK, STATE, STATE_DIM, STATS

from asyncflow.config.presets import load_config
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.run.build import build_trainer
from asyncflow.run.evaluate_file import evaluate_checkpoint

TRAIN = TRAIN_SMOLVLA | {"policy.horizon": CHUNK}
EXPERT = ("gemma_expert", ".action_", "state_proj")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """What LeRobot names and nobody can download: tiny sizes and a tokenizer stand in for them."""
    path = write_cache(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as monkeypatch, tiny_sizes():
        monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(path))
        yield path


def write_float32(folder, **changes):
    with float32():
        return write_policy(folder, **changes)


@pytest.fixture(scope="module")
def folder(cache, tmp_path_factory):
    """A policy folder, which is only read."""
    return write_float32(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def copied(folder, tmp_path):
    """A folder that may be spoilt."""
    return Path(shutil.copytree(folder, tmp_path / "policy"))


@pytest.fixture
def obs():
    return observe("top")


def make(folder, **keys):
    return build(folder, **{"horizon": CHUNK} | keys)


def difference(folder, obs, num_steps=STEPS, **keys):
    """Return by how much our decision and LeRobot's differ at most."""
    policy = make(folder, num_inference_steps=num_steps, **keys)
    noise = noise_of(policy)
    ours = policy.sample_actions(obs, "eval", noise)["actions"]
    with float32():
        theirs = their_actions(folder, obs, initial_noise(policy, noise), num_steps)
    assert ours.shape == theirs.shape == (N, CHUNK, ACTION_DIM)
    assert theirs.std() > 0.1  # of noise and normalisation
    return (ours - theirs).abs().max()


def test_a_decision_is_lerobots_own_from_the_same_noise(folder, obs):
    """Stated tolerance: 1e-5."""
    assert difference(folder, obs) <= 1e-5


def test_a_decision_of_ten_steps_is_lerobots_own(folder, obs):
    """LeRobot adds up the time, which then is off by rounding; its fastest sine sees that. Stated tolerance: 1e-3."""
    assert difference(folder, obs, num_steps=10) <= 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"empty_cameras": 2},
        {"tokenizer_max_length": 3},
        {"train_expert_only": True},
        {"chunk_size": CHUNK + 3},
        {"normalization": NormalizationMode.MIN_MAX},
        {"normalization": NormalizationMode.IDENTITY},
    ],
    ids="-".join,
)
def test_every_setting_of_a_folder_is_followed(tmp_path, obs, changes):
    """Stated tolerance: 3e-5, of actions up to 4; either is as far from the same in float64."""
    assert difference(write_float32(tmp_path, **changes), obs) <= 3e-5


@pytest.mark.parametrize("instruction", ["", "push", "push the goal\n"])
def test_the_instruction_is_read_as_lerobot_reads_it(folder, obs, instruction):
    policy = make(folder, instruction=instruction)
    noise = noise_of(policy)
    with float32():
        theirs = their_actions(folder, obs, initial_noise(policy, noise), STEPS, instruction)
    ours, other = (p.sample_actions(obs, "eval", noise)["actions"] for p in (policy, make(folder)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - other).abs().max() > 1e-4


def test_a_velocity_is_that_of_lerobots_denoising_step_however_many_are_evaluated_at_once(folder, obs):
    """Stated tolerance: 1e-5."""
    policy = make(folder)
    generator = torch.Generator().manual_seed(2)
    chunks, times = torch.randn(N, STEPS, CHUNK, PADDED, generator=generator), torch.rand(N, STEPS, generator=generator)
    with torch.no_grad():
        cache = policy.model.cache_prefix(policy.make_context(obs))
        together = policy.model.velocity(cache, chunks, times)
        alone = torch.cat([policy.model.velocity(cache, chunks[:, [j]], times[:, [j]]) for j in range(STEPS)], 1)
        theirs = their_velocity(folder, obs, chunks, times)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, theirs, rtol=0, atol=1e-5)


def their_velocity(folder, obs, chunks, times):
    """Return the velocity of LeRobot's `denoise_step` for each of J chunks, [N, J, P, M]."""
    with float32():
        policy = PI0Policy.from_pretrained(folder)
        pictures = {STATE: obs["state"], CAMERA: obs["images", "top"].float() / 255, "task": ["reach the goal"] * N}
        batch = policy.normalize_inputs(pictures)
        images, words, state = policy.prepare_images(batch), policy.prepare_language(batch), policy.prepare_state(batch)
        tokens, is_token, is_causal = policy.model.embed_prefix(*images, *words)
        assert not is_causal.any()
        _, cache = policy.model.paligemma_with_expert.forward(
            attention_mask=is_token[:, None] & is_token[:, :, None],
            position_ids=is_token.cumsum(1) - 1,
            inputs_embeds=[tokens, None],
            use_cache=True,
            fill_kv_cache=True,
        )
        step = policy.model.denoise_step
        steps = zip(chunks.unbind(1), times.unbind(1), strict=True)
        return torch.stack([step(state, is_token, cache, chunk, time) for chunk, time in steps], 1)


def test_lerobot_rounds_to_bfloat16_what_is_float32_here(tmp_path, obs):
    """Stated tolerance, of actions whose standard deviation is nearly 1: 0.05 on average."""
    folder = write_policy(tmp_path)
    policy = make(folder)
    noise = noise_of(policy)
    theirs = their_actions(folder, obs, initial_noise(policy, noise), STEPS)
    ours = policy.sample_actions(obs, "eval", noise)["actions"]
    assert 1e-4 < (ours - theirs).abs().mean() <= 0.05
    assert {"torch.bfloat16", "torch.float32"} == {str(x.dtype) for x in load_file(weights(folder)).values()}


def weights(folder):
    return folder / "model.safetensors"


@pytest.mark.parametrize("part", ["state", ("images", "top")])
def test_every_part_of_an_observation_moves_action_and_value(folder, obs, part):
    policy, changed = make(folder), obs.clone()
    changed[part] = 1 - obs[part] if part == "state" else 255 - obs[part]
    first, second = (policy.sample_actions(x, "train", noise_of(policy)) for x in (obs, changed))
    assert ((first["actions"] - second["actions"]).abs().amax((1, 2)) > 1e-4).all()
    assert ((first["values"] - second["values"]).abs() > 0).all()


def test_an_action_depends_on_those_after_it(folder, obs):
    """So that a chunk cannot be shortened."""
    policy = make(folder)
    chunk = torch.zeros(N, 1, CHUNK, PADDED)
    other = chunk.clone()
    other[:, :, -1] = 1
    with torch.no_grad():
        cache = policy.model.cache_prefix(policy.make_context(obs))
        first, second = (policy.model.velocity(cache, x, torch.ones(N, 1))[:, :, 0] for x in (chunk, other))
    assert (first - second).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize(
    ("method", "mode"), [("flow_sde", "joint_mean"), ("flow_noise", "per_step"), ("flow_cps", "single_step")]
)
def test_the_ratio_is_one_before_any_step(folder, obs, method, mode):
    policy = make(folder, noise_method=method, log_prob=mode)
    batch = policy.sample_actions(obs, "train", noise_of(policy)).set("obs", obs)
    evaluated = policy.default_forward(batch)
    torch.testing.assert_close(evaluated["log_probs"], batch["log_probs"], rtol=0, atol=1e-5)
    torch.testing.assert_close(evaluated["values"], batch["values"], rtol=0, atol=1e-5)
    assert batch["log_probs"].dtype == torch.float32
    assert batch["chains"].shape == (N, STEPS + 1, CHUNK, PADDED)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_ratio_is_one_in_bfloat16_within_the_stated_tolerance(folder, obs, frozen):
    """0.02 nats for a mean, as docs/policies.md states."""
    policy = make(folder, dtype="bfloat16", log_prob="joint_mean", freeze_backbone=frozen)
    batch = policy.sample_actions(obs, "train", noise_of(policy)).set("obs", obs)
    torch.testing.assert_close(policy.default_forward(batch)["log_probs"], batch["log_probs"], rtol=0, atol=0.02)


def test_a_frozen_backbone_decides_as_one_that_runs(folder, obs):
    frozen, running = make(folder, freeze_backbone=True), make(folder)
    encoded = frozen.encode_obs(obs)
    assert set(encoded.keys(True, True)) == {("prefix", "features"), ("prefix", "state")}
    decisions = [p.sample_actions(x, "train", noise_of(p)) for p, x in ((frozen, encoded), (running, obs))]
    assert all(torch.equal(decisions[0][key], decisions[1][key]) for key in ("actions", "log_probs", "values"))
    trained = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert not any("paligemma." in name or "lm_head" in name for name in trained)
    assert all(any(part in name for name in trained) for part in EXPERT)


def test_the_state_is_kept_as_it_is_beside_rounded_features(folder, obs):
    encoded = make(folder, freeze_backbone=True, feature_dtype="bfloat16").encode_obs(obs)["prefix"]
    assert (encoded["features"].dtype, encoded["state"].dtype) == (torch.bfloat16, torch.float32)
    mean, std = (STATS[STATE][name] for name in ("mean", "std"))
    torch.testing.assert_close(encoded["state"], (obs["state"] - mean) / std)


@pytest.mark.parametrize(
    ("changes", "learned"),
    [
        ({}, (*EXPERT, "language_model", "multi_modal_projector")),
        ({"freeze_vision_encoder": False}, (*EXPERT, "language_model", "multi_modal_projector", "vision_tower")),
        ({"train_expert_only": True}, EXPERT),
        ({"train_expert_only": True, "train_state_proj": False}, ("gemma_expert", ".action_")),
    ],
    ids=["language", "vision", "expert", "state-not"],
)
def test_what_lerobot_freezes_stays_frozen_and_the_rest_learns(tmp_path, obs, changes, learned):
    policy = make(write_float32(tmp_path, **changes))
    batch = policy.sample_actions(obs, "train", noise_of(policy)).set("obs", obs)
    policy.default_forward(batch)["log_probs"].sum().backward()
    moved = {n for n, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    parts = (*EXPERT, "language_model", "vision_tower", "multi_modal_projector")
    assert {part for part in parts for name in moved if part in name} == set(learned)
    expert = {name for name, _ in policy.named_parameters() if "gemma_expert.model" in name or ".action_" in name}
    assert expert <= moved


def test_the_values_gradient_reaches_its_head_alone(folder, obs):
    policy = make(folder)
    policy.get_value(obs).sum().backward()
    assert {name for name, p in policy.named_parameters() if p.grad is not None} == {
        name for name, _ in policy.named_parameters() if "value_head" in name
    }


@pytest.mark.parametrize("frozen", [False, True])
def test_vla_equals_standard(tmp_path, folder, frozen):
    changes = {"policy.checkpoint": str(folder), "policy.freeze_backbone": frozen}
    batch = assert_vla_equals_standard(tmp_path, TRAIN | changes)
    kept = {("prefix", "features"), ("prefix", "state")} if frozen else {"state", ("images", "top")}
    assert set(batch["obs"].keys(True, True)) == kept


def test_an_update_trains_as_much_on_features_as_on_pictures(tmp_path, monkeypatch, folder):
    assert_trains_as_on_pictures(tmp_path, monkeypatch, TRAIN | {"policy.checkpoint": str(folder)})


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """A run of two updates whose folder of weights was removed afterwards; only read."""
    source, path = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("run") / "run"
    write_float32(source)
    first = load_file(weights(source))
    start(path, "toy_vla_tiny", TRAIN | {"policy.checkpoint": str(source)})
    shutil.rmtree(source)
    return path, first


def exported(run):
    return run / "checkpoints" / "last" / "lerobot"


def test_a_checkpoint_holds_a_folder_that_decides_in_lerobot_as_the_trained_policy(trained, obs):
    """Stated tolerance: 1e-5."""
    policy = load_trained(trained[0])
    noise = noise_of(policy)
    with float32():
        theirs = their_actions(exported(trained[0]), obs, initial_noise(policy, noise))
    ours = policy.sample_actions(obs, "eval", noise)["actions"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_folder_denoises_as_it_was_trained_to_and_predicts_chunks_as_before(trained):
    config = json.loads((exported(trained[0]) / "config.json").read_text())
    assert (config["num_steps"], config["n_action_steps"], config["chunk_size"]) == (STEPS, CHUNK, CHUNK)


def test_lerobot_finds_every_tensor_of_the_folder_and_what_was_trained_alone_differs(trained):
    run, first = trained
    last = load_file(weights(exported(run)))
    with float32():
        loaded = PI0Policy.from_pretrained(exported(run), strict=True).state_dict()
    first, last = (PI0Policy._transform_state_dict_keys(tensors) for tensors in (first, last))
    assert first.keys() == last.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], last[name]) for name in last)
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert any("gemma_expert" in name for name in changed)
    assert any("language_model" in name for name in changed)
    assert not any("vision_tower" in name or "normalize" in name for name in changed)


def test_what_is_frozen_is_written_in_the_type_that_it_had(tmp_path):
    source = write_policy(tmp_path / "policy", train_expert_only=True)
    start(tmp_path / "run", "toy_vla_tiny", TRAIN | {"policy.checkpoint": str(source), "trainer.total_updates": 1})
    first, last = (load_file(weights(path)) for path in (source, exported(tmp_path / "run")))
    frozen = [name for name in last if "paligemma." in name and name in first]
    assert frozen
    assert all(torch.equal(first[name], last[name]) and last[name].dtype == torch.bfloat16 for name in frozen)
    assert all(last[name].dtype == torch.float32 for name in last if "gemma_expert.model" in name)


def test_a_trained_run_is_evaluated_without_the_folder_it_began_from(trained):
    assert evaluate_checkpoint(str(trained[0]), load_config("toy", TOY), num_episodes=2).num_episodes == 2


def test_a_run_can_begin_from_the_folder_of_another(trained):
    parts = build_trainer(load_config("toy_vla_tiny", TRAIN | {"policy.checkpoint": str(exported(trained[0]))}))
    parts.close()
    tensors = load_trained(trained[0]).model.lerobot.state_dict()
    own = parts.policy.model.lerobot.state_dict()
    assert all(torch.equal(own[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_cut_and_resumed_run_equals_the_uncut_one(tmp_path, frozen):
    """The folder that it began from is gone by then."""
    source = write_float32(tmp_path / "policy")
    changes = TRAIN | {"policy.checkpoint": str(source), "trainer.total_updates": 3, "policy.freeze_backbone": frozen}
    start(tmp_path / "uncut", "toy_vla_tiny", changes)
    start(tmp_path / "cut", "toy_vla_tiny", changes, stop_at=1)
    shutil.rmtree(source)
    go_on(tmp_path / "cut")
    assert_equal(outcome(tmp_path / "cut"), outcome(tmp_path / "uncut"))


def test_tensors_under_the_names_of_older_versions_are_read(copied, folder, obs):
    """As the folders that were published first have them."""
    change_tensors(copied, rename)
    assert not any("paligemma.model." in name for name in load_file(weights(copied)))
    policies = make(copied), make(folder)
    ours, theirs = (p.sample_actions(obs, "eval", noise_of(p))["actions"] for p in policies)
    assert torch.equal(ours, theirs)


def rename(tensors):
    older = {
        "paligemma.lm_head": "paligemma.language_model.lm_head",
        "paligemma.model.language_model": "paligemma.language_model.model",
        "paligemma.model.": "paligemma.",
    }
    for name in list(tensors):
        for new, old in older.items():
            if new in name:
                tensors[name.replace(new, old)] = tensors.pop(name)
                break


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: change_tensors(path, lambda x: x.pop(OUT)), rf"{OUT} \[3\] vs absent"),
        (lambda path: change_tensors(path, lambda x: x.update({OUT: torch.zeros(4)})), rf"{OUT} \[3\] vs \[4\]"),
        (lambda path: change_tensors(path, lambda x: x[MEAN].fill_(torch.inf)), f"is not set: {MEAN} is not finite"),
        (lambda path: weights(path).write_bytes(b"no"), "model.safetensors is truncated or damaged"),
        (lambda path: change_config(path, unheard_of=1), "LeRobot cannot build it: "),
        (lambda path: change_config(path, proj_width=16), r"action_in_proj.bias \[16\] vs \[24\].*and \d+ more"),
        (lambda path: change_config(path, resize_imgs_with_padding=[42, 42]), "cannot decide on such observations: "),
        (
            lambda path: change_config(path, n_action_steps=CHUNK - 1),
            "horizon = 5: .* chunks of 4, and type pi0 no others; use 4, ",
        ),
        (lambda path: change_config(path, type="pi0fast"), "of type 'pi0fast'; asyncflow reads: smolvla, pi0$"),
    ],
    ids=["missing", "shape", "unset", "damaged", "unknown-key", "other-size", "does-not-run", "chunk", "type"],
)
def test_what_is_wrong_with_a_folder_is_one_line(copied, spoil, message):
    spoil(copied)
    with pytest.raises(ConfigError, match=message) as caught:
        make(copied)
    assert str(copied) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"horizon": CHUNK - 1}, "policy.horizon = 4: .* predicts chunks of 5, and type pi0 no others; use 5, "),
        ({"horizon": CHUNK + 1}, "policy.horizon = 6: .* predicts chunks of 5"),
        ({"cameras": ("front",)}, "missing: top; not the model's: front"),
        ({"state_dim": STATE_DIM + 1}, r"observation.state has 4 numbers, the environment's state has the shape \[5\]"),
        ({"lora_rank": 2}, "policy.vla.lora_rank = 2: a LeRobot folder has no place for adapters"),
    ],
)
def test_what_does_not_fit_a_folder_is_one_line(folder, keys, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make(folder, **keys)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_one_line(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"pi0 needs the tokenizer google/paligemma-3b-pt-224, which") as caught:
        make(folder)
    assert str(caught.value).startswith(f"policy.checkpoint = {folder}: ")
    assert "\n" not in str(caught.value)


@pytest.fixture
def run_tiny(run_cli, cache, monkeypatch):
    """Return a function that runs `asyncflow train` on a folder, in tiny sizes and a process of its own."""
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(tiny_pi0.__file__).parent), *sys.path]))

    def run(folder, **changes):
        overrides = [f"{key}={value}" for key, value in (TRAIN | {"trainer.total_updates": 1} | changes).items()]
        options = ["--config", "toy_vla_tiny", "--checkpoint", str(folder), "--out", "run", *overrides]
        return run_cli("train", *options, timeout_s=240, module="tiny_pi0")

    return run


@pytest.mark.parametrize("mode", ["vla", "standard"])
def test_the_command_line_trains_a_folder(run_tiny, folder, tmp_path, mode):
    done = run_tiny(folder, **{"trainer.buffer_type": mode})
    assert done.returncode == 0, done.stderr
    assert f"lerobot from {folder}" in done.stdout.replace("\n", "")
    assert weights(exported(tmp_path / "run")).exists()


@pytest.mark.parametrize(
    ("spoil", "changes", "message"),
    [
        (lambda path: None, {"policy.horizon": 3}, "policy.horizon = 3: "),
        (lambda path: change_config(path, type="act"), {}, "a LeRobot policy of type 'act'; asyncflow reads: smolvla,"),
        (lambda path: change_tensors(path, lambda x: x.pop(OUT)), {}, f"{OUT} [3] vs absent"),
    ],
    ids=["horizon", "type", "tensors"],
)
def test_the_command_line_refuses_in_one_line(run_tiny, copied, spoil, changes, message):
    spoil(copied)
    assert_refused(run_tiny(copied, **changes), message)


def test_the_command_line_says_in_one_line_that_the_tokenizer_is_missing(run_tiny, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert_refused(run_tiny(folder), "pi0 needs the tokenizer google/paligemma-3b-pt-224, which is not in the cache")


def assert_refused(done, message):
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
