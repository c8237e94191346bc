"""What building a run refuses: a ring that does not fit, a checkpoint without the weights that rollouts act with."""

import math
from dataclasses import replace

import pytest
import torch
from silent import TOY, Silent, build, start

from asyncflow import devices
from asyncflow.config.policy import MappingConfig
from asyncflow.config.presets import load_config
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.envs.mapping import NameMapping
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.ppo.ppo import PPO
from asyncflow.rollout.weights import WeightPublisher, changing_tensors
from asyncflow.run import collecting
from asyncflow.run import parts as run_parts
from asyncflow.run.checkpoint import list_checkpoints, load_checkpoint
from asyncflow.run.launch import train
from asyncflow.run.parts import build_policy
from asyncflow.simulators.spec import EnvSpec


def test_a_ring_that_does_not_fit_is_refused_before_it_is_allocated(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "free_memory", lambda device: 80_000)
    monkeypatch.setattr(collecting, "RolloutRing", lambda *_: pytest.fail("the ring was allocated"))
    with pytest.raises(ConfigError, match=r"device cpu: .* are free; lower buffer.buffer_size or"):
        train(load_config("toy", TOY | {"logging.out": str(tmp_path / "run")}), Silent())
    assert not (tmp_path / "run").exists()


PICTURES = TOY | {"trainer.buffer_type": "standard", "trainer.total_updates": 1}


def test_the_copies_that_an_update_makes_of_a_rollout_are_checked_for(tmp_path, monkeypatch):
    """What is asked for beside ring, weights and optimizer suffices for all that an update holds of pictures."""
    asked, held = [], {}

    def note(name, method):
        def noting(*arguments):
            made = method(*arguments)
            held[name] = made.bytes()
            return made

        monkeypatch.setattr(PPO, name, noting)

    monkeypatch.setattr(collecting, "check_memory", lambda num_bytes, device, keys: asked.append(num_bytes))
    for name in ("_prepare", "_shuffle"):
        note(name, getattr(PPO, name))
    parts = train(load_config("toy_vla_tiny", PICTURES | {"logging.out": str(tmp_path / "run")}), Silent()).trainer
    weights = sum(p.nbytes for p in parts.policy.parameters())
    rest = parts.channel.buffer.plan.num_bytes + sum(t.nbytes for t in changing_tensors(parts.policy).values())
    left = asked[0] - rest - collecting.NUM_OPTIMIZER_COPIES * weights
    assert 0.7 * left < held["_prepare"] + held["_shuffle"] <= left


@pytest.mark.parametrize(
    ("obs_keys", "said"), [(["object", "cube"], r"Lift has no cube; it has"), (["object"], r"made for env.obs_keys = ")]
)
def test_observations_that_do_not_fit_are_found_before_simulators_are_built(tmp_path, monkeypatch, obs_keys, said):
    monkeypatch.setattr(run_parts, "make_vec_env", lambda *_: pytest.fail("simulators were built"))
    config = load_config("lift", {"env.obs_keys": obs_keys, "logging.out": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=said):
        train(config, Silent())


LAG_4 = TOY | {"buffer.max_policy_lag": 4, "trainer.buffer_type": "vla", "trainer.total_updates": 8}


def unmapped(spec):
    return NameMapping(MappingConfig(), spec)


def scale_of_a_new_policy(**limits):
    spec = EnvSpec({"state": (4,)}, 2, 10, **limits)
    policy = build_policy(load_config("toy", TOY | {"policy.checkpoint": None}), unmapped(spec), torch.device("cpu"))
    return policy.action_normalizer


def test_a_policy_without_data_decides_within_the_simulators_limits():
    gains = scale_of_a_new_policy(action_low=(0.0, -0.02), action_high=(300.0, 0.02))
    ends = gains.denormalize(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    torch.testing.assert_close(ends, torch.tensor([[0.0, -0.02], [300.0, 0.02]]))
    default = scale_of_a_new_policy()
    assert (default.offset.tolist(), default.scale.tolist()) == ([0, 0], [1, 1])  # exactly, or runs would change


def test_absolute_targets_need_a_policy_that_demonstrations_scaled():
    with pytest.raises(ConfigError, match=r"policy.checkpoint = None: .*absolute targets.*asyncflow pretrain"):
        scale_of_a_new_policy(action_low=(-math.inf, -1.0), action_high=(math.inf, 1.0), env_meta={"env_name": "Lift"})


def checkpoint_with(folder, kept):
    """Return the checkpoint after 6 updates of a run of lag 4, with the weights of the versions `kept` alone."""
    start(folder, "toy", LAG_4 | {"trainer.total_updates": 6})
    whole = load_checkpoint(list_checkpoints(folder)[-1])
    lost = {f"weights_{version}" for version in range(2, 7)} - {f"weights_{version}" for version in kept}
    return replace(whole, groups={name: tensors for name, tensors in whole.groups.items() if name not in lost})


@pytest.mark.parametrize(
    ("kept", "lacking"),
    [([2, 3, 4, 5], "6"), ([3, 4, 5, 6], "2"), ([2, 4, 6], "3, 5"), ([4, 5, 6], "2, 3"), ([6], "2, 3, 4, 5")],
)
def test_a_checkpoint_without_weights_that_rollouts_act_with_is_refused_by_version(tmp_path, kept, lacking):
    checkpoint = checkpoint_with(tmp_path / "run", kept)
    with pytest.raises(CheckpointError, match=rf"update_000006: lacks the weights of version {lacking}, with which"):
        build(load_config("toy", LAG_4), resumed=checkpoint)


@pytest.mark.parametrize(
    ("group", "change", "said"),
    [
        ("weights_6", lambda x: dict(list(x.items())[1:]), "version 6 of the weights does not fit the policy"),
        ("weights_6", lambda x: {k: t.to(torch.int8) for k, t in x.items()}, r"torch\.float32 vs torch\.int8"),
        ("journal", lambda x: EpisodeJournal.start(3).to_tensors(), "its journal is of 3 environments"),
        ("journal", lambda x: x | {"chunks": x["chunks"][..., :1]}, r"and chunks of \[\(2, 1\)\]"),
        ("optimizer", lambda x: {k: t[None] for k, t in x.items()}, "the optimizer's state does not fit the policy"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_before_it_is_taken_over(uncut, group, change, said):
    folder = uncut(LAG_4 | {"trainer.total_updates": 6})
    whole = load_checkpoint(list_checkpoints(folder)[-1])
    other = replace(whole, groups=whole.groups | {group: change(whole.groups[group])})
    with pytest.raises(CheckpointError, match=said):
        build(load_config("toy", LAG_4), resumed=other)


def test_with_bounded_lag_the_newest_weights_suffice(tmp_path):
    checkpoint = checkpoint_with(tmp_path / "run", [6])
    parts = build(load_config("toy", LAG_4 | {"buffer.lag_mode": "bounded"}), resumed=checkpoint)
    parts.close()
    assert list(parts.channel.publisher.snapshots()) == [6]


def test_a_lag_limit_that_was_raised_by_hand_is_refused(tmp_path):
    start(tmp_path / "run", "toy", LAG_4 | {"buffer.max_policy_lag": 1, "trainer.total_updates": 6})
    checkpoint = load_checkpoint(list_checkpoints(tmp_path / "run")[-1])
    with pytest.raises(CheckpointError, match=r"lacks the weights of version 2, 3, 4, with which"):
        build(load_config("toy", LAG_4), resumed=checkpoint)


@pytest.mark.parametrize("num_kept", [0, 1, 3])
def test_weights_that_were_not_restored_are_noticed_before_anything_waits_for_them(tmp_path, monkeypatch, num_kept):
    restore = WeightPublisher.restore

    def forget_the_oldest(publisher, snapshots):
        restore(publisher, {version: snapshots[version] for version in sorted(snapshots)[len(snapshots) - num_kept :]})

    monkeypatch.setattr(WeightPublisher, "restore", forget_the_oldest)
    with pytest.raises(CheckpointError, match=r"lacks the weights of version 2, 3"):
        build(load_config("toy", LAG_4), resumed=checkpoint_with(tmp_path / "run", range(2, 7)))
