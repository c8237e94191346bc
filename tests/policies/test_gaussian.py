"""The Gaussian policy's maths."""

import pytest
import torch
from tensordict import TensorDict
from torch.distributions import Normal

from asyncflow.config.sections import PolicyConfig
from asyncflow.errors import ConfigError
from asyncflow.policies import make_policy
from asyncflow.simulators.spec import EnvSpec

OBS = TensorDict({"state": torch.linspace(-1, 1, 12).view(4, 3)}, batch_size=[4])


def _policy(**keys):
    keys = {"kind": "gaussian", "horizon": 4, "n_action_steps": 2, "hidden_sizes": [8], "log_prob": "joint_sum"} | keys
    return make_policy(PolicyConfig(**keys), EnvSpec({"state": (3,)}, 2, 10), seed=0)


def test_log_prob_and_entropy_are_those_of_a_normal_over_the_executed_actions():
    policy = _policy()
    batch = policy.sample_actions(OBS, "train", torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    evaluated = policy.default_forward(batch.set("obs", OBS))
    mean = policy.actor(OBS["state"]).view(4, 4, 2).double()
    normal = Normal(mean[:, :2], 0.5)
    expected = normal.log_prob(batch["raw_actions"][:, :2].double()).sum((1, 2))
    torch.testing.assert_close(batch["log_probs"].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(evaluated["entropy"].double(), normal.entropy().sum((1, 2)), rtol=1e-5, atol=1e-5)


def test_zero_noise_is_the_eval_action():
    policy = _policy()
    sampled = policy.sample_actions(OBS, "train", torch.zeros(4, 8))["actions"]
    assert torch.equal(sampled, policy.sample_actions(OBS, "eval", torch.ones(4, 8))["actions"])


def test_actions_that_are_not_executed_leave_the_log_prob():
    policy = _policy()
    batch = policy.sample_actions(OBS, "train", torch.ones(4, 8)).set("obs", OBS)
    batch["raw_actions"][:, 2:] += 5.0
    assert torch.equal(policy.default_forward(batch)["log_probs"], batch["log_probs"])


def test_min_std_floors_sampling_and_log_prob_alike():
    policy = _policy(min_std=0.3, initial_std=0.4)
    with torch.no_grad():
        policy.log_std.fill_(-50.0)
    batch = policy.sample_actions(OBS, "train", torch.ones(4, 8)).set("obs", OBS)
    mean = policy.sample_actions(OBS, "eval", torch.ones(4, 8))["actions"]
    torch.testing.assert_close(batch["actions"] - mean, torch.full((4, 4, 2), 0.3))
    expected = Normal(0.0, 0.3).log_prob(torch.tensor(0.3)) * 4
    torch.testing.assert_close(policy.default_forward(batch)["log_probs"], expected.expand(4))


@pytest.mark.parametrize("mode", ["per_step", "single_step"])
def test_modes_of_denoising_steps_are_refused(mode):
    with pytest.raises(ConfigError, match=f"policy.log_prob = {mode} .* allows joint_sum, joint_mean"):
        _policy(log_prob=mode)


@pytest.mark.parametrize("floor", [0.5, 0.6])
def test_a_floor_that_is_not_below_the_initial_std_is_refused(floor):
    with pytest.raises(ConfigError, match=f"policy.min_std = {floor} must be below policy.initial_std = 0.5"):
        _policy(min_std=floor)


def test_a_std_near_its_floor_still_has_a_gradient():
    policy = _policy(min_std=0.3, initial_std=0.4)
    torch.testing.assert_close(policy._std(), torch.full((2,), 0.4))
    with torch.no_grad():
        policy.log_std.fill_(-9.0)
    batch = policy.sample_actions(OBS, "train", torch.ones(4, 8)).set("obs", OBS)
    policy.default_forward(batch)["entropy"].sum().backward()
    assert (policy.log_std.grad > 0).all()
