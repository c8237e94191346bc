"""A model from elsewhere that breaks a promise is refused before a run, by its method and the promise."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from silent import TOY, Silent
from torch import nn

from asyncflow.config.plugins import trust_class
from asyncflow.config.presets import load_config
from asyncflow.config.sections import PolicyConfig, VLAConfig
from asyncflow.errors import ConfigError, ContractError
from asyncflow.policies import GaussianPolicy, make_policy
from asyncflow.ppo.promises import _difference, check_promises
from asyncflow.run.launch import train
from asyncflow.simulators.spec import EnvSpec

SPEC = EnvSpec({"state": (4,)}, 2, 10)
P, A, W = 3, 2, 8


class Velocity(nn.Module):
    """Keeps every promise, with a dropout and batch statistics that evaluation switches off."""

    def __init__(self):
        super().__init__()
        self.backbone, self.value_head = nn.Sequential(nn.Linear(4, W), nn.BatchNorm1d(W)), nn.Linear(W, 1)
        self.expert, self.dropout = nn.Linear(W + P * A + 1, P * A), nn.Dropout(0.5)

    def encode_prefix(self, obs):
        return self.dropout(self.backbone(obs["state"]))

    def velocity(self, prefix, x, time):
        seen = prefix[:, None].expand(-1, x.shape[1], -1)
        return self.expert(torch.cat([seen, x.flatten(2), time[..., None]], -1)).view(x.shape)

    def value(self, prefix):
        return self.value_head(prefix).squeeze(-1)


class ActorCritic(nn.Module):
    """Keeps every promise, with log-probs of its own."""

    def __init__(self):
        super().__init__()
        self.mean, self.value_head = nn.Linear(4, P * A), nn.Linear(4, 1)

    def forward(self, obs):
        mean = self.mean(obs["state"])
        return (mean + 0.5 * obs["noise"] if "noise" in obs.keys() else mean).view(-1, P, A)  # noqa: SIM118

    def get_value(self, obs):
        return self.value_head(obs["state"]).squeeze(-1)

    def evaluate_actions(self, obs, actions):
        mean = self.mean(obs["state"]).view(-1, P, A)[:, : actions.shape[1]]
        return {"log_probs": torch.distributions.Normal(mean, 0.5).log_prob(actions).sum((1, 2))}


class Stubborn(Velocity):
    """Puts itself into training mode, whatever it is told."""

    def train(self, mode=True):
        return super().train(True)


class Frozen(Velocity):
    """Has a velocity that nothing trains."""

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
        self.value_head.requires_grad_(True)


class Double(Velocity):
    """Trains numbers of 64 bits."""

    def __init__(self):
        super().__init__()
        self.expert.double()


class Cached(Velocity):
    """Adds to the cache that all denoising steps share."""

    def cache_prefix(self, prefix):
        return [prefix]

    def velocity(self, prefix, x, time):
        prefix.append(prefix[-1] + 1)
        return super().velocity(prefix[-1], x, time)


class Lambda(Velocity):
    """Holds a function that holds the model, which copies share."""

    def __init__(self):
        super().__init__()
        self.head = lambda features: self.expert(features) * 1.0

    def velocity(self, prefix, x, time):
        seen = prefix[:, None].expand(-1, x.shape[1], -1)
        return self.head(torch.cat([seen, x.flatten(2), time[..., None]], -1)).view(x.shape)


class Locked(Velocity):
    """Holds what cannot be copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class Forgetful(Velocity):
    """Counts in a buffer that no checkpoint holds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def value(self, prefix):
        self.count += 1
        return super().value(prefix)


class Headed(ActorCritic):
    """Has a value head that is no module."""

    def __init__(self):
        super().__init__()
        self.value_head = nn.Parameter(torch.ones(4))

    def get_value(self, obs):
        return obs["state"] @ self.value_head


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "elsewhere", sys.modules[__name__])


def build(model, changes=None, freeze_backbone=False, log_prob="joint_mean", noise_method="flow_noise", **vla):
    """Return a policy whose model has some of its methods replaced."""
    trust_class(f"elsewhere.{model}")
    keys = {"freeze_backbone": freeze_backbone, "log_prob": log_prob, "noise_method": noise_method}
    vla_config = VLAConfig(model_class=f"elsewhere.{model}", **vla)
    config = PolicyConfig(kind="vla", horizon=P, n_action_steps=2, vla=vla_config, **keys)
    policy = make_policy(config, SPEC, seed=0)
    for name, change in (changes or {}).items():
        policy.model.__dict__[name] = _change(getattr(policy.model, name), change)
    return policy


def _change(method, change):
    return lambda *inputs: change(method, *inputs)


def no_grad(method, *inputs):
    with torch.no_grad():
        return method(*inputs)


def nothing(method, *inputs):
    return None


def noisy(method, *inputs):
    result = method(*inputs)
    return result + 0.1 * torch.randn_like(result)


def normalised(method, *inputs):
    result = method(*inputs)
    return result - result.mean(0)


def in_place(number):
    """Return a change that writes into an input, by its number."""

    def change(method, *inputs):
        given = inputs[number]
        (given if isinstance(given, torch.Tensor) else given["state"]).mul_(0.5)
        return method(*inputs)

    return change


def add_a_key(method, obs):
    obs["seen"] = obs["state"]
    return method(obs)


def fail(method, *inputs):
    raise ZeroDivisionError("by\nzero")


def of_log_probs(change):
    return lambda method, *inputs: {"log_probs": change(method(*inputs)["log_probs"])}


VELOCITY = [
    ("encode_prefix", noisy, r"gives other numbers when it is called again \(dropout, randomness\)"),
    ("encode_prefix", normalised, r"gives a decision other numbers alone than beside another one \(batch statistics\)"),
    ("encode_prefix", nothing, r"returned None; expected a batch of 2 prefixes"),
    (
        "encode_prefix",
        lambda method, obs: {"features": method(obs)},
        r"returned a dict of \['features'\]; expected a",
    ),
    ("encode_prefix", lambda method, obs: method(obs).sum(), r"returned .* of shape \(\).*; expected a batch"),
    ("encode_prefix", in_place(0), r"changed obs in place; expected a copy"),
    ("encode_prefix", add_a_key, r"changed obs in place"),
    ("encode_prefix", fail, r"failed on 2 decision\(s\): ZeroDivisionError: by zero"),
    ("velocity", noisy, r"gives other numbers when it is called again"),
    ("velocity", normalised, r"gives a decision other numbers alone"),
    (
        "velocity",
        nothing,
        r"returned None; expected a tensor of shape \(2, 4, 3, 2\): decisions, steps, p",
    ),
    ("velocity", lambda method, *inputs: method(*inputs)[:, 0], r"returned .*\(2, 3, 2\).*; expected .*\(2, 4, 3, 2\)"),
    ("velocity", lambda method, *inputs: method(*inputs)[:, :, :1], r"returned .*\(2, 4, 1, 2\).*; expected"),
    ("velocity", no_grad, r"returned numbers without a gradient, so that nothing of it would be trained"),
    ("velocity", in_place(0), r"changed prefix in place"),
    ("velocity", in_place(1), r"changed x in place"),
    (
        "velocity",
        lambda method, p, x, t: method(p, x, t) + x.mean(1, True),
        r"gives other numbers for one denoising step",
    ),
    ("value", noisy, r"gives other numbers when it is called again"),
    ("value", normalised, r"gives a decision other numbers alone"),
    ("value", nothing, r"returned None; expected float32 of shape \(2,\)"),
    ("value", lambda method, prefix: method(prefix)[:, None], r"returned .*\(2, 1\).*; expected float32 of shape"),
    ("value", lambda method, prefix: method(prefix).sum(), r"returned .*; expected float32 of shape"),
    ("value", lambda method, prefix: method(prefix).half(), r"returned .*; expected float32 of shape"),
    ("value", no_grad, r"returned numbers without a gradient"),
    ("value", in_place(0), r"changed prefix in place"),
]
ACTOR_CRITIC = [
    ("forward", noisy, r"gives other numbers when it is called again"),
    ("forward", normalised, r"gives a decision other numbers alone"),
    ("forward", nothing, r"returned None; expected a tensor of shape \(2, 3, 2\)"),
    ("forward", lambda method, obs: method(obs)[:, :1], r"returned .*\(2, 1, 2\).*; expected a tensor of shape"),
    ("forward", in_place(0), r"changed obs in place"),
    ("get_value", lambda method, obs: method(obs)[:, None], r"returned .*\(2, 1\).*; expected float32 of shape"),
    ("get_value", noisy, r"gives other numbers when it is called again"),
    ("get_value", no_grad, r"returned numbers without a gradient"),
    ("evaluate_actions", nothing, r"returned None; expected a dict or TensorDict with log_probs"),
    ("evaluate_actions", of_log_probs(torch.Tensor.half), r"returned as log_probs .*; expected float32"),
    ("evaluate_actions", of_log_probs(lambda x: x[:, None]), r"returned as log_probs .*\(2, 1\).*; expected float32"),
    ("evaluate_actions", of_log_probs(torch.Tensor.detach), r"returned numbers without a gradient"),
    (
        "evaluate_actions",
        of_log_probs(lambda x: x + torch.randn_like(x)),
        r"gives other numbers when it is called again",
    ),
    ("evaluate_actions", of_log_probs(lambda x: x - x.mean()), r"gives a decision other numbers alone"),
    ("evaluate_actions", in_place(1), r"changed actions in place"),
]


@pytest.mark.parametrize("model", ["Velocity", "Stubborn", "ActorCritic"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_keeps_its_promises_passes_and_stays_as_it_was(model, dtype):
    policy = build(model, dtype=dtype)
    before, generator = {name: x.clone() for name, x in policy.state_dict().items()}, torch.get_rng_state()
    check_promises(policy, policy.n_action_steps, SPEC)
    assert all(torch.equal(policy.state_dict()[name], x) for name, x in before.items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(module.training for module in policy.modules())


@pytest.mark.parametrize("freeze_backbone", [False, True])
@pytest.mark.parametrize("log_prob", ["joint_sum", "per_step", "single_step"])
@pytest.mark.parametrize("noise_method", ["flow_sde", "flow_cps", "flow_noise"])
def test_a_velocity_field_passes_whatever_is_made_of_it(freeze_backbone, log_prob, noise_method):
    check_promises(build("Velocity", None, freeze_backbone, log_prob, noise_method), 2, SPEC)


@pytest.mark.parametrize(
    ("model", "method", "change", "said"),
    [("Velocity", *case) for case in VELOCITY] + [("ActorCritic", *case) for case in ACTOR_CRITIC],
)
def test_a_broken_promise_is_named_with_its_method(model, method, change, said):
    with pytest.raises(ContractError, match=rf"{model}.{method} {said}") as caught:
        check_promises(build(model, {method: change}), 2, SPEC)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("Frozen", r"Frozen.velocity returned numbers without a gradient"),
        ("Double", r"Double: its parameter model.expert.weight is torch.float64; expected torch.float32"),
        ("Lambda", r"Lambda: its copy for the collector \(copy.deepcopy\) computes with model.expert.weight of the"),
        ("Locked", r"Locked: cannot be copied for the collector \(copy.deepcopy\): TypeError: cannot pickle"),
        ("Forgetful", r"Forgetful: its buffer model.count changes when it is evaluated and is in no checkpoint"),
        ("Headed", r"Headed: has no parameters of a critic: AttributeError"),
        ("Cached", r"Cached.velocity gives other numbers for one denoising step than for all"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(model, said):
    with pytest.raises(ContractError, match=said):
        check_promises(build(model), 2, SPEC)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("n_action_steps", 1, r"GaussianPolicy.n_action_steps is 1; expected 4, as the environments have it"),
        ("action_dim", 5, r"GaussianPolicy.action_dim is 5; expected 2"),
        ("noise_size", None, r"GaussianPolicy.noise_size is None; expected a number"),
    ],
)
def test_a_policy_of_another_package_has_the_sizes_of_the_environments(name, value, said):
    policy = make_policy(PolicyConfig(kind="gaussian", hidden_sizes=[8]), SPEC, 0)
    setattr(policy, name, value)
    with pytest.raises(ContractError, match=said):
        check_promises(policy, 4, SPEC)


def test_a_policy_of_another_package_has_something_to_train():
    policy = make_policy(PolicyConfig(kind="gaussian"), SPEC, 0).requires_grad_(False)
    with pytest.raises(ContractError, match=r"GaussianPolicy: has no parameter that requires a gradient"):
        check_promises(policy, 4, SPEC)


def test_a_critic_that_claims_every_parameter_is_refused(monkeypatch):
    policy = make_policy(PolicyConfig(kind="gaussian", hidden_sizes=[8]), SPEC, 0)
    monkeypatch.setattr(policy, "critic_parameters", policy.parameters)
    with pytest.raises(ContractError, match=r"GaussianPolicy: critic_parameters yields every parameter; expected"):
        check_promises(policy, 4, SPEC)


@pytest.mark.parametrize(
    ("field", "change", "said"),
    [
        ("log_probs", lambda x: x + 1, r"other log-probs in training than when they were taken, by 8 nats on average"),
        ("log_probs", lambda x: x + 0.01, r"by 0\.08 nats on average \(at most its ratio_tolerance = 0\.01\)"),
        ("log_probs", torch.Tensor.detach, r"default_forward returned log_probs without a gradient"),
        ("values", torch.Tensor.detach, r"default_forward returned values without a gradient"),
        ("values", lambda x: x[:, None], r"default_forward returned as values"),
        ("entropy", lambda x: None, r"default_forward returned .*; expected also entropy"),
    ],
)
def test_a_policy_of_another_package_evaluates_the_decisions_that_it_took(monkeypatch, field, change, said):
    policy = make_policy(PolicyConfig(kind="gaussian", hidden_sizes=[8]), SPEC, 0)
    check_promises(policy, policy.n_action_steps, SPEC)
    forward = GaussianPolicy.default_forward

    def other(policy, batch):
        evaluated = forward(policy, batch)
        changed = change(evaluated.pop(field))
        return evaluated if changed is None else evaluated.set(field, changed)

    monkeypatch.setattr(GaussianPolicy, "default_forward", other)
    with pytest.raises(ContractError, match=said):
        check_promises(policy, policy.n_action_steps, SPEC)


@pytest.mark.parametrize("model", ["Frozen", "Cached"])
def test_a_run_does_not_begin_with_a_broken_promise(tmp_path, model):
    changes = {"policy.horizon": P, "policy.n_action_steps": 2, "policy.vla.model_class": f"elsewhere.{model}"}
    with pytest.raises(ConfigError, match=rf"{model}.velocity"):
        train(load_config("toy_vla_tiny", TOY | changes | {"logging.out": str(tmp_path / "run")}), Silent())
    assert not (tmp_path / "run").exists()


class Late(ActorCritic):
    """Depends on the size of a batch, but not of small ones."""

    def evaluate_actions(self, obs, actions):
        evaluated = super().evaluate_actions(obs, actions)
        return {"log_probs": evaluated["log_probs"] + (3.0 if len(actions) > 4 else 0.0)}


@pytest.mark.parametrize("buffer_type", ["vla", "standard"])
def test_a_ratio_away_from_one_before_the_first_step_ends_the_run(tmp_path, buffer_type):
    changes = {"policy.horizon": P, "policy.n_action_steps": 2, "policy.vla.model_class": "elsewhere.Late"}
    changes |= {"trainer.buffer_type": buffer_type, "logging.out": str(tmp_path / "run")}
    reporter = Silent()
    with pytest.raises(ContractError, match=r"Late: before any training, decisions have other log-probs in training"):
        train(load_config("toy_vla_tiny", TOY | changes), reporter)
    assert not reporter.rows


def test_answers_that_are_nan_alone_can_be_compared():
    nan = torch.full((2,), torch.nan)
    assert _difference(nan, nan) == 0
    assert _difference(nan, torch.zeros(2)) == torch.inf
