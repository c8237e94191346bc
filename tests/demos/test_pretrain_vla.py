"""Pre-training of policies whose velocity field is a VLA's: asyncflow's own, and models from elsewhere."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from test_pretrain import write_images
from torch import nn

from asyncflow.config.plugins import trust_class
from asyncflow.config.sections import Config, EnvConfig, PolicyConfig, VLAConfig
from asyncflow.demos.dataset import read_dataset
from asyncflow.demos.pretrain import PretrainOptions, pretrain
from asyncflow.errors import ConfigError
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import load_into, load_policy_file

EXAMPLES = Path(__file__).parents[2] / "examples"
VLA = PolicyConfig(kind="vla", critic_hidden_sizes=[8], horizon=2, n_action_steps=2, vla=VLAConfig(instruction="lift"))
ENV = EnvConfig(cameras=["top"], obs_keys=["robot0_eef_quat"])  # what examples/my_vla.py sees
OPTIONS = PretrainOptions(num_steps=20, batch_size=16)


class ActorCritic(nn.Module):
    """Brings its own log-probs, and is refused before anything of it is called."""

    def forward(self, obs):
        raise NotImplementedError

    get_value = evaluate_actions = forward


class Padded(nn.Module):
    """Makes of the example a model that denoises another number of dimensions than an action has."""

    def __new__(cls, padded_action_dim):
        model = import_module("my_vla").MyVLA(width=16, horizon=2, action_dim=padded_action_dim)
        model.padded_action_dim = padded_action_dim
        return model


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Return a dataset with pictures; models from elsewhere can be imported."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setitem(sys.modules, "elsewhere", sys.modules[__name__])
    return write_images(tmp_path / "demos.hdf5", cameras=("top",), size=(28, 28))


def run_vla(pictures, out, options=OPTIONS, changes=None, **vla):
    """Pre-train with changed keys; return the policy as built and as read from its file."""
    trust_class(vla.get("model_class", ""))
    policy = VLA.model_copy(update={"vla": VLA.vla.model_copy(update=vla)} | (changes or {}))
    result = pretrain(pictures, out, Config(env=ENV, policy=policy), options)
    file = load_policy_file(out)
    spec = file.env_spec
    fresh, trained = (make_policy(policy, spec, options.seed) for _ in range(2))
    load_into(trained, file)
    return result, fresh, trained


def changed(fresh, trained):
    """Return the names of the parameters that differ."""
    pairs = zip(fresh.named_parameters(), trained.parameters(), strict=True)
    return {name for (name, before), after in pairs if not torch.equal(before, after)}


def test_a_vla_learns_from_demonstrations(pictures, tmp_path):
    result, fresh, trained = run_vla(pictures, tmp_path / "out", PretrainOptions(num_steps=120, batch_size=32))
    assert result.final_loss < 0.8 * result.first_loss
    parts = {".".join(name.split(".")[:2]) for name in changed(fresh, trained)}
    assert {"model.backbone", "model.layers", "model.action_out"} <= parts
    assert not {"model.value_head", "sampler.noise_logit"} & parts


def test_a_vla_is_scaled_to_the_data(pictures, tmp_path):
    _, _, trained = run_vla(pictures, tmp_path / "out")
    demos = read_dataset(pictures, ENV)
    for normalizer, rows in ((trained.obs_normalizer, demos.obs["state"]), (trained.action_normalizer, demos.actions)):
        assert normalizer.normalize(torch.cat(rows)).abs().amax(0).tolist() == pytest.approx([1.0] * rows[0].shape[1])


def test_a_vla_is_told_the_instruction(pictures, tmp_path):
    _, _, lift = run_vla(pictures, tmp_path / "lift")
    _, _, push = run_vla(pictures, tmp_path / "push", instruction="push")
    assert "model.action_out.1.weight" in changed(lift, push)


def test_a_frozen_backbone_stays_as_it_was_built(pictures, tmp_path):
    _, fresh, trained = run_vla(pictures, tmp_path / "out", changes={"freeze_backbone": True})
    names = changed(fresh, trained)
    assert "model.action_out.1.weight" in names
    assert not [name for name in names if ".backbone." in name]


def test_a_model_from_elsewhere_with_a_velocity_field_learns_in_its_own_units(pictures, tmp_path):
    foreign = {"model_class": "my_vla.MyVLA", "model_kwargs": {"width": 16, "horizon": 2, "action_dim": 7}}
    _, fresh, trained = run_vla(pictures, tmp_path / "out", **foreign)
    assert {"model.backbone.feel.weight", "model.expert.0.weight"} <= changed(fresh, trained)
    actions = torch.linspace(-1, 1, 7)
    assert torch.equal(trained.action_normalizer.denormalize(actions), actions)


def test_a_model_with_its_own_log_probs_is_refused_in_one_line(pictures, tmp_path):
    with pytest.raises(ConfigError, match=r"policy.vla.model_class = elsewhere.ActorCritic: has no velocity") as caught:
        run_vla(pictures, tmp_path / "out", model_class="elsewhere.ActorCritic")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_padded_model_learns_its_padding_too(pictures, tmp_path):
    padded = {"model_class": "elsewhere.Padded", "model_kwargs": {"padded_action_dim": 9}}
    _, fresh, trained = run_vla(pictures, tmp_path / "out", **padded)
    moved = (fresh.model.expert[2].bias - trained.model.expert[2].bias).view(2, 9).abs()
    assert (moved > 0).all()


def test_chunks_narrower_than_the_actions_are_refused(pictures, tmp_path):
    narrow = {"model_class": "elsewhere.Padded", "model_kwargs": {"padded_action_dim": 3}}
    with pytest.raises(ConfigError, match=r"MyVLA: padded_action_dim = 3 is less than the 7 dimensions of an action"):
        run_vla(pictures, tmp_path / "out", **narrow)


def test_a_lerobot_folder_is_refused_before_anything_is_read(tmp_path):
    config = PolicyConfig(kind="lerobot", checkpoint=str(tmp_path))
    with pytest.raises(ConfigError, match=r"policy.kind = lerobot: LeRobot itself trains its policies") as caught:
        pretrain(tmp_path / "none.hdf5", tmp_path / "out", Config(env=ENV, policy=config), OPTIONS)
    assert "\n" not in str(caught.value)
