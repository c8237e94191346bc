"""Models from elsewhere: both kinds train, and what is wrong with one is said in a line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from silent import TOY, Silent, go_on, start
from specs import spec_of
from tensordict import TensorDict
from torch import nn

from asyncflow.config.plugins import trust_class
from asyncflow.config.presets import load_config
from asyncflow.config.sections import PolicyConfig, VLAConfig
from asyncflow.errors import ConfigError
from asyncflow.policies import VLAPolicy, make_policy
from asyncflow.policies.vla.foreign import ForeignPolicy, without_weights
from asyncflow.run.evaluate_file import evaluate_checkpoint
from asyncflow.run.launch import train
from asyncflow.seeding import policy_noise
from asyncflow.simulators.spec import EnvSpec

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {"width": 16, "horizon": 2, "action_dim": 2}
N = 4


class ActorCritic(nn.Module):
    """A Gaussian with its own log-probs."""

    def __init__(self, scale: float = 0.5) -> None:
        super().__init__()
        self.scale = scale
        self.mean, self.value_head, self.dropout = nn.Linear(4, 4), nn.Linear(4, 1), nn.Dropout(0.5)

    def forward(self, obs):
        mean = self.dropout(self.mean(obs["state"]))
        return (mean + self.scale * obs["noise"] if "noise" in obs.keys() else mean).view(-1, 2, 2)  # noqa: SIM118

    def get_value(self, obs):
        return self.value_head(obs["state"]).squeeze(-1)

    def evaluate_actions(self, obs, actions):
        mean = self.dropout(self.mean(obs["state"])).view(-1, 2, 2)[:, : actions.shape[1]]
        return {"log_probs": torch.distributions.Normal(mean, self.scale).log_prob(actions).sum((1, 2))}


class Headless(ActorCritic):
    """Values with what it acts with."""

    def __init__(self) -> None:
        super().__init__()
        self.value_head = None

    def get_value(self, obs):
        return self.mean(obs["state"]).sum(1)


class Pretrained(ActorCritic):
    """Knows how to load itself."""

    @classmethod
    def from_pretrained(cls, path, scale):
        model = cls(scale)
        model.path = path
        return model


class Empty(nn.Module):
    """Has no method of a policy."""


class Wrong(ActorCritic):
    """Predicts chunks of another length."""

    def forward(self, obs):
        return super().forward(obs)[:, :1]


class Lazy(nn.Module):
    """A layer of it learns its size from what it sees first."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LazyLinear(4)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setitem(sys.modules, "elsewhere", sys.modules[__name__])


def build(name, freeze=False, **vla):
    trust_class(name)
    config = PolicyConfig(
        kind="vla", horizon=2, n_action_steps=1, freeze_backbone=freeze, vla=VLAConfig(model_class=name, **vla)
    )
    return make_policy(
        config,
        spec_of((4,), 2, {"top": (3, 28, 28)}),
        seed=0,
    )


def test_a_model_with_a_layer_without_a_size_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"elsewhere.Lazy: its parameter layer.weight has no size yet"):
        build("elsewhere.Lazy")


def observe():
    images = torch.randint(256, (N, 3, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return TensorDict({"state": torch.linspace(-1, 1, 16).view(N, 4), "images": {"top": images}}, [N])


def decide(policy, obs, mode="train"):
    return policy.sample_actions(obs, mode, policy_noise(0, range(N), 0, policy.noise_size))


@pytest.mark.parametrize(
    ("name", "arguments", "kind"),
    [("my_vla.MyVLA", ARGUMENTS, VLAPolicy), ("elsewhere.ActorCritic", {}, ForeignPolicy)],
)
def test_the_ratio_is_one_before_any_step(name, arguments, kind):
    policy, obs = build(name, model_config=arguments), observe()
    assert isinstance(policy, kind)
    batch = decide(policy, obs).set("obs", obs)
    evaluated = policy.default_forward(batch)
    torch.testing.assert_close(evaluated["log_probs"], batch["log_probs"], rtol=0, atol=1e-5)
    assert torch.equal(evaluated["values"], batch["values"])
    assert evaluated["entropy"].shape == (N,)


@pytest.mark.parametrize("name", ["my_vla.MyVLA", "elsewhere.ActorCritic"])
def test_eval_is_deterministic_and_gives_only_actions(name):
    policy, obs = build(name, model_config=ARGUMENTS if "my" in name else {}), observe()
    first, second = (decide(policy, obs, "eval") for _ in range(2))
    assert set(first.keys()) == {"actions"}
    assert torch.equal(first["actions"], second["actions"])


def test_an_actor_critic_is_asked_about_the_executed_actions_alone():
    policy, obs = build("elsewhere.ActorCritic"), observe()
    batch = decide(policy, obs).set("obs", obs)
    before = policy.default_forward(batch)["log_probs"]
    batch["actions"][:, 1:] += 9.0  # predicted, never executed
    assert torch.equal(policy.default_forward(batch)["log_probs"], before)


def test_the_example_is_sixty_lines():
    assert len((EXAMPLES / "my_vla.py").read_text().splitlines()) <= 60


@pytest.mark.parametrize("buffer_type", ["vla", "standard"])
@pytest.mark.parametrize("keys", [{}, {"policy.freeze_backbone": True}], ids=["trained", "frozen"])
def test_the_example_trains(tmp_path, buffer_type, keys):
    changes = TOY | keys | {"trainer.buffer_type": buffer_type, "logging.out": str(tmp_path / "run")}
    changes |= {"policy.vla.model_class": "my_vla.MyVLA", "policy.vla.model_config": ARGUMENTS}
    reporter = Silent()
    done = train(load_config("toy_vla_tiny", changes), reporter)
    assert reporter.rows[-1]["updates"] == 6
    assert set(done.trainer.channel.buffer.plan.obs.keys()) == ({"prefix"} if keys else {"state", "images"})


@pytest.mark.parametrize("name", ["ActorCritic", "Headless"])
def test_an_actor_critic_trains(tmp_path, name):
    changes = {"policy.vla.model_class": f"elsewhere.{name}", "logging.out": str(tmp_path / "run")}
    reporter = Silent()
    config = load_config("toy_vla_tiny", TOY | changes)
    done = train(config, reporter)
    fresh = make_policy(config.policy, EnvSpec({"state": (4,)}, 2, 10), 0)
    assert reporter.rows[-1]["updates"] == 6
    assert not torch.equal(done.trainer.policy.model.mean.weight, fresh.model.mean.weight)


def test_weights_are_read_from_a_file(tmp_path):
    source = ActorCritic()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    for name in ("weights.safetensors", "weights.pt"):
        policy = build("elsewhere.ActorCritic", model_path=str(tmp_path / name), model_config={"scale": 0.1})
        assert torch.equal(policy.model.mean.weight, source.mean.weight)
        assert policy.model.scale == 0.1


def test_a_class_that_loads_itself_is_given_the_path():
    assert build("elsewhere.Pretrained", model_path="there", model_config={"scale": 0.1}).model.path == "there"


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("nowhere.Model", {}, r"policy.vla.model_class = nowhere.Model: No module named 'nowhere'; expected package"),
        ("my_vla.Missing", {}, r"policy.vla.model_class = my_vla.Missing: .* has no attribute 'Missing'"),
        ("Model", {}, r"policy.vla.model_class = Model: "),
        ("elsewhere.Empty", {}, r"needs the methods encode_prefix, velocity, value, or forward, get_value, evaluate"),
        ("elsewhere.N", {}, r"policy.vla.model_class = elsewhere.N: not a torch.nn.Module, but int"),
        ("builtins.dict", {}, r"policy.vla.model_class = builtins.dict: not a torch.nn.Module"),
        ("my_vla.MyVLA", {"model_config": {"wide": 3}}, r"cannot build it: .*unexpected keyword argument 'wide'"),
        (
            "asyncflow.policies.vla.policy.VLAPolicy",
            {"model_config": {"config": 1, "model": 2, "action_dim": 3}},
            "cannot build it",
        ),
        ("elsewhere.ActorCritic", {"model_path": "none.safetensors"}, r"policy.vla.model_path = none.safetensors: "),
        ("elsewhere.ActorCritic", {"freeze": True}, r"policy.freeze_backbone = true: .* has no encode_prefix"),
    ],
)
def test_what_is_wrong_with_a_model_is_one_line(name, keys, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(name, **keys)
    assert "\n" not in str(caught.value)


def test_a_prefix_that_depends_on_trained_parameters_cannot_be_frozen():
    policy = build("my_vla.MyVLA", freeze=True, model_config=ARGUMENTS)
    policy.model.backbone.feel.requires_grad_(True)
    with pytest.raises(ConfigError, match="encode_prefix depends on parameters outside `backbone`"):
        policy.encode_obs(observe())


def test_a_prefix_with_names_needs_features(monkeypatch):
    policy = build("my_vla.MyVLA", model_config=ARGUMENTS)
    monkeypatch.setattr(policy.model, "encode_prefix", lambda obs: TensorDict({"state": obs["state"]}, obs.batch_size))
    with pytest.raises(ConfigError, match=r"MyVLA: encode_prefix returned names without `features`: state$"):
        policy.make_context(observe())


def test_of_a_prefix_with_names_the_features_alone_are_rounded(monkeypatch):
    policy, obs = build("my_vla.MyVLA", freeze=True, feature_dtype="bfloat16", model_config=ARGUMENTS), observe()
    encode = policy.model.encode_prefix

    def named(obs):
        is_low = obs["state"] < 0
        others = {"state": obs["state"], "is_low": is_low}
        return TensorDict({"features": encode(obs), **others}, obs.batch_size)

    monkeypatch.setattr(policy.model, "encode_prefix", named)
    kept = policy.encode_obs(obs)
    context = policy.make_context(kept)
    assert kept["prefix", "features"].dtype == torch.bfloat16
    assert torch.equal(context["features"], encode(obs).bfloat16().float())
    assert torch.equal(context["state"], obs["state"])
    assert context["is_low"].dtype == torch.bool
    assert (policy.make_context(obs) == context).all()


def test_actions_of_another_shape_are_refused():
    with pytest.raises(
        ConfigError,
        match=r"Wrong.forward returned .*\(4, 1, 2\), .*; expected .* \(4, 2, 2\)",
    ):
        decide(build("elsewhere.Wrong"), observe())


def test_a_class_that_cannot_be_imported_is_found_before_simulators_are_built(tmp_path, monkeypatch):
    changes = {"policy.vla.model_class": "nowhere.Model", "logging.out": str(tmp_path / "run")}
    monkeypatch.setattr("asyncflow.run.parts.make_vec_env", lambda *_: pytest.fail("simulators were built"))
    with pytest.raises(ConfigError, match="No module named 'nowhere'"):
        train(load_config("toy_vla_tiny", TOY | changes), Silent())


def test_a_run_goes_on_and_is_evaluated_without_the_weights_that_it_began_with(tmp_path):
    save_file({name: tensor.clone() for name, tensor in ActorCritic().state_dict().items()}, tmp_path / "w.safetensors")
    keys = {"policy.kind": "vla", "policy.vla.model_class": "elsewhere.ActorCritic", "trainer.total_updates": 1}
    start(tmp_path / "run", "toy", TOY | keys | {"policy.vla.model_path": str(tmp_path / "w.safetensors")})
    (tmp_path / "w.safetensors").unlink()
    assert go_on(tmp_path / "run", **{"trainer.total_updates": 2}).ended
    assert evaluate_checkpoint(str(tmp_path / "run"), load_config("toy", TOY), 2).num_episodes == 2


def test_a_model_that_loads_itself_keeps_its_path():
    for name, path in (("elsewhere.Pretrained", "hub/name"), ("elsewhere.ActorCritic", None)):
        trust_class(name)
        config = PolicyConfig(kind="vla", vla=VLAConfig(model_class=name, model_path="hub/name"))
        assert without_weights(config).vla.model_path == path
