"""The flow policy's networks: what they cost, and that flow matching teaches them a distribution."""

import pytest
import torch
from tensordict import TensorDict

from asyncflow.config.sections import PolicyConfig
from asyncflow.policies import make_policy
from asyncflow.policies.networks.layers import time_features
from asyncflow.simulators.spec import EnvSpec

OBS = TensorDict({"state": torch.linspace(-1, 1, 12).view(4, 3)}, batch_size=[4])


def _policy(state_dim=3, action_dim=2, **keys):
    keys = {"horizon": 3, "n_action_steps": 2, "hidden_sizes": [32, 32]} | keys
    return make_policy(PolicyConfig(**keys), EnvSpec({"state": (state_dim,)}, action_dim, 10), seed=0)


def _noise(policy, rows=4):
    return torch.randn(rows, policy.noise_size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def count_forwards():
    """Return a function that counts from now on the forwards of a policy's velocity network, as their shapes."""

    def start(policy):
        shapes = []
        policy.velocity.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
        return shapes

    return start


def test_get_value_never_runs_the_velocity_network(count_forwards):
    policy = _policy()
    shapes = count_forwards(policy)
    policy.get_value(OBS)
    assert shapes == []


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"log_prob": "single_step"}, (4, 3, 2)),
        ({"log_prob": "joint_mean"}, (4, 5, 3, 2)),
        ({"log_prob": "per_step"}, (4, 5, 3, 2)),
        ({"log_prob": "joint_sum", "noise_method": "flow_cps"}, (4, 4, 3, 2)),
    ],
)
def test_evaluation_is_one_forward_over_the_stochastic_steps(count_forwards, keys, expected):
    policy = _policy(num_inference_steps=5, **keys)
    batch = policy.sample_actions(OBS, "train", _noise(policy)).set("obs", OBS)
    shapes = count_forwards(policy)
    policy.default_forward(batch)
    assert shapes == [expected]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_decision_is_one_forward_per_denoising_step(count_forwards, mode):
    policy = _policy(num_inference_steps=5)
    shapes = count_forwards(policy)
    policy.sample_actions(OBS, mode, _noise(policy))
    assert shapes == [(4, 3, 2)] * 5


def test_eval_depends_on_the_initial_noise():
    policy = _policy()
    first = policy.sample_actions(OBS, "eval", _noise(policy))["actions"]
    assert not torch.allclose(first, policy.sample_actions(OBS, "eval", -_noise(policy))["actions"])


def test_annealing_reaches_the_stored_noise_level():
    policy = _policy(noise_method="flow_sde", noise_level=0.6, noise_level_final=0.2, anneal_updates=2)
    policy.anneal(1)
    stored = policy.sample_actions(OBS, "train", _noise(policy))["noise_level"]
    torch.testing.assert_close(stored, torch.full((4,), 0.4))


def test_time_features_tell_the_steps_apart():
    features = time_features(torch.linspace(0, 1, 11))
    assert features.shape == (11, 32)
    assert torch.pdist(features).min() > 0.5
    torch.testing.assert_close(features[0], torch.cat([torch.zeros(16), torch.ones(16)]))


def test_flow_matching_loss_by_hand():
    """A network that answers zero leaves the mean of (noise - action)^2, in normalised units."""
    policy = _policy()
    policy.action_normalizer.set_range(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 4.0]))
    with torch.no_grad():
        policy.velocity.trunk[-1][-1].weight.zero_()
    actions = torch.tensor([1.0, 4.0]).expand(4, 3, 2)  # normalised: 0.5, 1
    noise = torch.tensor([2.5, -2.0]).expand(4, 3, 2)  # noise - action: 2, -3
    loss = policy.flow_matching_loss(OBS, actions, noise, torch.full((4,), 0.3))
    assert loss.item() == pytest.approx((4 + 9) / 2)


def test_flow_matching_loss_feeds_the_network_the_interpolated_chunk():
    policy = _policy()
    seen = []
    policy.velocity.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    actions, noise = torch.full((4, 3, 2), 0.5), torch.full((4, 3, 2), -1.0)
    policy.flow_matching_loss(OBS, actions, noise, torch.tensor([0.0, 1.0, 0.5, 0.2]))
    torch.testing.assert_close(seen[0][:, 0, 0], torch.tensor([0.5, -1.0, -0.25, 0.2]))


def test_training_and_sampling_see_the_same_network():
    """The split first layer gives the velocity of the loss's own call at the step's time."""
    policy = _policy()
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    state = policy.velocity.state_in(OBS["state"])
    expected = policy.velocity(x, state, policy.velocity.time_in(time_features(torch.full((4,), 0.75))))
    torch.testing.assert_close(policy.velocity_field(policy.make_context(OBS))(x, 1), expected)


def test_flow_matching_learns_both_modes_of_a_bimodal_dataset():
    keys = {"horizon": 1, "n_action_steps": 1, "hidden_sizes": [64, 64], "num_inference_steps": 20}
    policy = _policy(state_dim=1, action_dim=1, **keys)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.actor_parameters(), lr=1e-2)
    obs = TensorDict({"state": torch.zeros(256, 1)}, batch_size=[256])
    actions = torch.tensor([-0.8, 0.8]).repeat(128).view(256, 1, 1)
    for _ in range(500):
        noise, time = torch.randn(256, 1, 1, generator=generator), torch.rand(256, generator=generator)
        optimizer.zero_grad()
        policy.flow_matching_loss(obs, actions, noise, time).backward()
        optimizer.step()
    samples = policy.sample_actions(obs, "eval", _noise(policy, rows=256))["actions"].flatten()
    assert (samples.abs() - 0.8).abs().mean() < 0.1
    assert 0.4 < (samples > 0).float().mean() < 0.6
