"""What pre-training does with any velocity field: the loss, and which parameters it reaches."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from specs import spec_of
from tensordict import TensorDict

from asyncflow.config.plugins import trust_class
from asyncflow.config.sections import PolicyConfig, VLAConfig
from asyncflow.policies import make_policy
from asyncflow.policies.velocity import VelocityPolicy

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = {"model_class": "my_vla.MyVLA", "model_config": {"width": 16, "horizon": 3, "action_dim": 2}}
N, P, A, K = 5, 3, 2, 4
POLICIES = [("flow", {}), ("vla", {"instruction": "lift"}), ("vla", EXAMPLE)]
NAMES = ["flow", "vla", "foreign"]
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the extra `lora`")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    trust_class(EXAMPLE["model_class"])
    monkeypatch.syspath_prepend(str(EXAMPLES))


def build(kind, vla, **keys):
    keys = {"horizon": P, "n_action_steps": P, "num_inference_steps": K, "hidden_sizes": [32]} | keys
    config = PolicyConfig(kind=kind, critic_hidden_sizes=[16], vla=VLAConfig(**vla), **keys)
    return make_policy(
        config,
        spec_of((4,), A, {"top": (3, 28, 28)}),
        seed=0,
    )


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def obs(generator):
    images = torch.randint(256, (N, 3, 28, 28), generator=generator).to(torch.uint8)
    return TensorDict({"state": torch.linspace(-1, 1, 4 * N).view(N, 4), "images": {"top": images}}, [N])


def loss_of(policy, obs, generator):
    actions, noise = (torch.randn(N, P, A, generator=generator) for _ in range(2))
    return policy.flow_matching_loss(obs, actions, noise, torch.rand(N, generator=generator))


def taught(policy, obs, generator):
    """Return the names of the parameters to which the loss has a gradient other than zero."""
    loss_of(policy, obs, generator).backward()
    return {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


class Constant(VelocityPolicy):
    """Has the velocity 1, wherever and whenever it is asked, and keeps what it was asked."""

    def make_context(self, obs):
        return None

    def velocity_field(self, context):
        return lambda x, steps: torch.ones_like(x)

    def velocity_at(self, context, x, time):
        self.asked = x, time
        return torch.ones_like(x)

    def value(self, context):
        return torch.zeros(N)

    def critic_parameters(self):
        return iter(())


@pytest.fixture
def constant():
    policy = Constant(PolicyConfig(horizon=P, n_action_steps=P), A)
    policy.action_normalizer.set_range(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 4.0]))
    return policy


def test_the_loss_is_the_squared_distance_to_noise_minus_action_in_normalised_units(constant):
    actions = torch.tensor([1.0, 4.0]).expand(N, P, A)  # normalised: 0.5, 1
    noise = torch.tensor([2.5, -2.0]).expand(N, P, A)  # noise - action: 2, -3; less the velocity: 1, -4
    loss = constant.flow_matching_loss(None, actions, noise, torch.full((N,), 0.3))
    assert loss.item() == pytest.approx((1 + 16) / 2)


def test_the_velocity_is_asked_between_action_and_noise(constant):
    actions, noise = torch.tensor([1.0, 4.0]).expand(N, P, A), torch.full((N, P, A), -1.0)
    times = torch.tensor([0.0, 1.0, 0.5, 0.25, 0.75])
    constant.flow_matching_loss(None, actions, noise, times)
    x, asked_times = constant.asked
    assert torch.equal(asked_times, times)
    torch.testing.assert_close(x[:, 0, 0], torch.tensor([0.5, -1.0, -0.25, 0.125, -0.625]))
    torch.testing.assert_close(x[:, 0, 1], torch.tensor([1.0, -1.0, 0.0, 0.5, -0.5]))


def test_padding_is_taught_an_action_of_zero():
    padded = Constant(PolicyConfig(horizon=P, n_action_steps=P), A, A + 1)
    noise = torch.tensor([0.5, 0.5, 2.5]).expand(N, P, A + 1)  # noise - action: 0.5, 0.5, 2.5; less 1: -0.5, -0.5, 1.5
    loss = padded.flow_matching_loss(None, torch.zeros(N, P, A), noise, torch.full((N,), 0.5))
    assert loss.item() == pytest.approx((0.25 + 0.25 + 2.25) / 3)
    torch.testing.assert_close(padded.asked[0][..., -1], torch.full((N, P), 1.25))


@pytest.mark.parametrize(("kind", "vla"), POLICIES, ids=NAMES)
def test_at_a_steps_time_it_is_the_velocity_that_the_sampler_follows(kind, vla, obs, generator):
    policy = build(kind, vla)
    x = torch.randn(N, P, A, generator=generator)
    with torch.no_grad():
        context = policy.make_context(obs)
        for step, time in enumerate(policy.sampler.time):
            expected = policy.velocity_field(context)(x, step)
            torch.testing.assert_close(policy.velocity_at(context, x, time.expand(N)), expected)


@pytest.mark.parametrize(("kind", "vla"), POLICIES, ids=NAMES)
def test_every_chunk_has_a_time_of_its_own_between_the_steps_too(kind, vla, obs, generator):
    policy = build(kind, vla)
    x, times = torch.randn(N, P, A, generator=generator), torch.tensor([0.0, 0.1, 0.4, 0.9, 1.0])
    with torch.no_grad():
        together = policy.velocity_at(policy.make_context(obs), x, times)
        for i in range(N):
            alone = policy.velocity_at(policy.make_context(obs[i : i + 1]), x[i : i + 1], times[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone)
        others = policy.velocity_at(policy.make_context(obs), x, times.flip(0))
    assert not torch.allclose(together[0], others[0])


def test_the_whole_vla_learns_but_its_value_and_its_exploration(obs, generator):
    policy = build("vla", {})
    everything = {name for name, _ in policy.named_parameters()}
    untaught = everything - taught(policy, obs, generator)
    assert all(name.startswith(("model.value_head.", "sampler.")) for name in untaught)
    assert any(name.startswith("model.value_head.") for name in untaught)


@pytest.mark.parametrize("vla", [{}, EXAMPLE, {"dtype": "bfloat16"}], ids=["own", "foreign", "bfloat16"])
def test_of_a_frozen_vla_only_the_expert_learns(vla, obs, generator):
    policy = build("vla", vla, freeze_backbone=True)
    names = taught(policy, obs, generator)
    assert names
    assert not [name for name in names if ".backbone." in name]


@needs_peft
def test_of_an_adapted_backbone_only_the_adapters_learn(obs, generator):
    names = taught(build("vla", {"lora_rank": 2}), obs, generator)
    of_backbone = {name for name in names if ".backbone." in name}
    assert of_backbone
    assert all("lora_" in name for name in of_backbone)


@pytest.mark.parametrize("freeze", [False, True], ids=["trained", "frozen"])
def test_the_loss_is_float32_of_networks_that_compute_in_bfloat16(freeze, obs):
    losses = []
    for dtype in ("float32", "bfloat16"):
        policy = build("vla", {"dtype": dtype}, freeze_backbone=freeze)
        losses.append(loss_of(policy, obs, torch.Generator().manual_seed(0)))
    assert losses[1].dtype == torch.float32
    assert 0 < abs(losses[0].item() - losses[1].item()) < 0.05
