"""A frozen backbone is run by the collector alone; what it made of observations is trained on, with the same result."""

from __future__ import annotations

import pytest
import torch
from silent import TOY, Silent, assert_equal, build, go_on, outcome, start

from asyncflow.config.presets import load_config
from asyncflow.errors import ConfigError
from asyncflow.policies.base import Policy
from asyncflow.policies.vla.policy import VLAPolicy
from asyncflow.ppo.ppo import PPO
from asyncflow.rollout.weights import changing_tensors
from asyncflow.run.launch import train

FROZEN = TOY | {"policy.freeze_backbone": True, "trainer.total_updates": 3, "env.horizon": 8}
TOKENS, WIDTH = 4 + len("reach the goal") + 1 + 1, 64  # patches, bytes, the instruction's end, the state


def run(folder, changes):
    reporter = Silent()
    done = train(load_config("toy_vla_tiny", FROZEN | changes | {"logging.out": str(folder)}), reporter)
    return done.trainer, reporter.rows


def count_backbone(monkeypatch):
    """Count the backbone's runs, by whether an update is under way."""
    counts, state = {"update": 0, "elsewhere": 0}, {"where": "elsewhere"}
    run_backbone, update = VLAPolicy._run_backbone, PPO.update

    def counted(self, obs):
        counts[state["where"]] += 1
        return run_backbone(self, obs)

    def updating(self, *arguments):
        state["where"] = "update"
        try:
            return update(self, *arguments)
        finally:
            state["where"] = "elsewhere"

    monkeypatch.setattr(VLAPolicy, "_run_backbone", counted)
    monkeypatch.setattr(PPO, "update", updating)
    return counts


@pytest.mark.parametrize("lag", [0, 1])
def test_an_update_never_runs_the_backbone(tmp_path, monkeypatch, lag):
    """Inline, so that the collector's runs are not taken for the update's; at lag 1 proximal log-probs are computed."""
    counts = count_backbone(monkeypatch)
    run(tmp_path / "run", {"trainer.buffer_type": "standard", "buffer.max_policy_lag": lag})
    assert counts["elsewhere"] > 0
    assert counts["update"] == 0


def test_without_features_in_the_ring_an_update_runs_it(tmp_path, monkeypatch):
    """Otherwise the count above would prove nothing."""
    counts = count_backbone(monkeypatch)
    monkeypatch.setattr(VLAPolicy, "encode_obs", lambda self, obs: obs)
    monkeypatch.setattr(VLAPolicy, "make_context", lambda self, obs: self._run_backbone(obs).float())
    run(tmp_path / "run", {"trainer.buffer_type": "standard"})
    assert counts["update"] > 0


def test_an_observation_is_encoded_once(tmp_path, monkeypatch):
    """T decisions and a bootstrap that begins the next rollout; one more call for each truncation; one for the plan."""
    counts = count_backbone(monkeypatch)
    changes = {"trainer.buffer_type": "standard", "env.horizon": 1000, "trainer.total_updates": 2}
    run(tmp_path / "run", changes)
    num_steps = 32 // 4
    assert counts["elsewhere"] == 2 * num_steps + 1 + 1


@pytest.mark.parametrize("feature_dtype", ["float32", "bfloat16"])
def test_results_are_those_of_running_the_backbone_bit_for_bit_in_the_same_batch_shapes(
    tmp_path, monkeypatch, feature_dtype
):
    """Four environments, rollouts of one decision, one minibatch: every batch holds four observations."""
    shapes = {"buffer.buffer_size": 4, "algorithm.num_minibatches": 1, "env.horizon": 1000, "trainer.total_updates": 12}
    assert_same_training(tmp_path, monkeypatch, shapes | {"policy.vla.feature_dtype": feature_dtype}, 0.0)


def test_results_are_those_of_running_the_backbone_in_any_batch_shape(tmp_path, monkeypatch):
    """Stated tolerance on trained parameters after three updates: 1e-5, truncated episodes included."""
    assert_same_training(tmp_path, monkeypatch, {}, 1e-5)


def assert_same_training(tmp_path, monkeypatch, changes, tolerance):
    kept, _ = run(tmp_path / "kept", changes)
    encode = VLAPolicy.encode_obs
    with monkeypatch.context() as patch:
        patch.setattr(VLAPolicy, "encode_obs", Policy.encode_obs)
        patch.setattr(VLAPolicy, "make_context", lambda self, obs: encode(self, obs)["prefix"].float())
        run_again, _ = run(tmp_path / "again", changes)
    assert set(kept.channel.buffer.plan.obs.keys()) == {"prefix"}
    assert set(run_again.channel.buffer.plan.obs.keys()) == {"state", "images"}
    for (name, a), b in zip(kept.policy.named_parameters(), run_again.policy.parameters(), strict=True):
        assert (a - b).abs().max() <= tolerance, name


def test_a_frozen_run_still_learns_its_expert_and_nothing_else(tmp_path):
    parts, _ = run(tmp_path / "run", {})
    fresh = build(load_config("toy_vla_tiny", FROZEN)).policy
    moved = {n for (n, a), b in zip(parts.policy.named_parameters(), fresh.parameters(), strict=True) if (a != b).any()}
    assert moved == {name for name, _ in parts.policy.named_parameters() if "backbone" not in name}


def test_only_trainable_parameters_and_buffers_are_published():
    policy = build(load_config("toy_vla_tiny", FROZEN)).policy
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    buffers = {name for name, _ in policy.named_buffers()}
    assert set(changing_tensors(policy)) == trainable | buffers
    assert not any("backbone" in name for name in trainable)


@pytest.mark.parametrize(("feature_dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_the_plan_counts_the_features_and_no_pictures(feature_dtype, size):
    config = load_config("toy_vla_tiny", FROZEN | {"policy.vla.feature_dtype": feature_dtype})
    plan = build(config).channel.buffer.plan
    assert plan.obs.bytes() == 4 * TOKENS * WIDTH * size
    rows = plan.num_steps * plan.fields.bytes() + (plan.num_steps + 1 + plan.max_truncations) * plan.obs.bytes()
    assert plan.num_bytes == plan.num_slots * rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vla_equals_standard_with_a_frozen_backbone(tmp_path, dtype):
    changes = {"buffer.max_policy_lag": 1, "policy.vla.dtype": dtype, "policy.vla.feature_dtype": dtype}
    runs = [run(tmp_path / mode, changes | {"trainer.buffer_type": mode})[0] for mode in ("vla", "standard")]
    pairs = zip(*(parts.policy.parameters() for parts in runs), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_cut_and_resumed_run_equals_the_uncut_one(tmp_path):
    start(tmp_path / "uncut", "toy_vla_tiny", FROZEN)
    start(tmp_path / "cut", "toy_vla_tiny", FROZEN, stop_at=2)
    go_on(tmp_path / "cut")
    assert_equal(outcome(tmp_path / "cut"), outcome(tmp_path / "uncut"))


def test_a_policy_without_a_backbone_cannot_freeze_it():
    with pytest.raises(ConfigError, match=r"policy.freeze_backbone = true: policy.kind = gaussian has no backbone"):
        load_config("toy", {"policy.freeze_backbone": True})
