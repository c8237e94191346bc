"""Point clouds in a policy: a function of the set of points, and what every policy promises of its decisions."""

import pytest
import torch
from camera_promises import (
    assert_every_camera_moves_decision_and_value,
    assert_ratio_is_one_in_every_minibatch_shape,
    assert_the_value_teaches_the_critic_alone_and_the_decision,
    decide,
)
from tensordict import TensorDict

from asyncflow.config.plugins import trust_class
from asyncflow.config.sections import PolicyConfig, VLAConfig
from asyncflow.errors import ConfigError
from asyncflow.policies import make_policy
from asyncflow.policies.networks.point_encoder import NUM_FEATURES, PointEncoder, PointNet
from asyncflow.simulators.spec import EnvSpec

N, D, A, P = 6, 5, 3, 50
CLOUDS = {"points.left": (P, 6), "points.right": (P, 6)}
SPEC = EnvSpec({"state": (D,)} | CLOUDS, A, 10)
SEEING = EnvSpec({"state": (D,), "images.left": (3, 24, 20)} | CLOUDS, A, 10)
KEYS = {"horizon": 4, "n_action_steps": 2, "hidden_sizes": [32], "critic_hidden_sizes": [16], "log_prob": "joint_sum"}
CASES = [("flow", 1, SPEC), ("flow", 2, SPEC), ("gaussian", 1, SPEC), ("gaussian", 2, SPEC), ("flow", 2, SEEING)]


def make_obs(spec: EnvSpec, seed: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    obs = spec.empty_obs(N)
    obs["state"] = torch.randn(obs["state"].shape, generator=generator)
    for camera, clouds in obs["points"].items():
        obs["points", camera] = torch.rand(clouds.shape, generator=generator)
    return obs


@pytest.fixture(
    params=CASES, ids=lambda case: f"{case[0]}-{case[1]}{'-images' if 'images' in case[2].rendered else ''}"
)
def case(request):
    kind, n_obs_steps, spec = request.param
    spec = spec.with_history(n_obs_steps)
    policy = make_policy(PolicyConfig(kind=kind, **KEYS), spec, seed=1)
    return policy, make_obs(spec)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return PointNet()


@pytest.fixture
def clouds():
    return torch.rand(3, P, 6, generator=torch.Generator().manual_seed(0))


def test_the_order_of_the_points_does_not_matter(network, clouds):
    order = torch.randperm(P, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(network(clouds[:, order]), network(clouds), rtol=0, atol=1e-6)


def test_points_that_are_repeated_do_not_matter(network, clouds):
    repeated = clouds.repeat_interleave(2, 1)[:, : P + 7]
    torch.testing.assert_close(network(repeated), network(repeated.unique(dim=1)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("channel", range(6))
def test_where_a_point_is_and_its_colour_matter(network, clouds, channel):
    other = clouds.clone()
    other[..., channel] += 0.1
    assert ((network(other) - network(clouds)).abs().amax(1) > 1e-4).all()


def test_an_encoder_gives_each_camera_and_step_its_own_features():
    encoder = PointEncoder({"left": (2, P, 6), "right": (2, P, 6)})
    obs = make_obs(SPEC.with_history(2))
    features = encoder(obs["points"])
    assert features.shape == (N, encoder.num_features) == (N, 4 * NUM_FEATURES)
    other = obs.clone()
    other["points", "right"][:, 1] += 0.1
    changed = (encoder(other["points"]) != features).view(N, 4, NUM_FEATURES).any(2)
    assert changed.tolist() == [[False, False, False, True]] * N


def test_features_do_not_depend_on_the_batch_nor_on_a_training_flag():
    encoder = PointEncoder(SPEC.shapes("points"))
    points = make_obs(SPEC)["points"]
    torch.testing.assert_close(encoder.eval()(points[:1]), encoder.train()(points)[:1], rtol=1e-6, atol=1e-6)


def test_ratio_is_one_before_any_optimizer_step_in_every_minibatch_shape(case):
    assert_ratio_is_one_in_every_minibatch_shape(*case)


def test_every_camera_moves_the_decision_and_the_value(case):
    assert_every_camera_moves_decision_and_value(*case, "points", lambda cloud: 1 - cloud)


def test_the_value_teaches_the_critic_alone_and_the_decision_the_encoder(case):
    assert_the_value_teaches_the_critic_alone_and_the_decision(*case, case[0].point_encoder)


def test_weights_without_clouds_are_those_of_a_policy_that_knows_none():
    blind, seeing = (
        make_policy(PolicyConfig(**KEYS), EnvSpec(shapes, A, 10), 1).state_dict()
        for shapes in ({"state": (D,)}, SPEC.obs)
    )
    assert set(seeing) - set(blind) == {name for name in seeing if name.startswith("point_encoder.")} != set()
    assert set(blind) <= set(seeing)


def test_asyncflows_own_vla_refuses_clouds_in_one_line():
    with pytest.raises(
        ConfigError, match=r"^env.point_clouds = \['left', 'right'\]: policy.kind = vla: asyncflow's own"
    ) as caught:
        make_policy(PolicyConfig(kind="vla"), SPEC, 0)
    assert "\n" not in str(caught.value)


def test_a_model_from_elsewhere_is_given_the_clouds():
    trust_class("clouds_only.Model")
    config = PolicyConfig(kind="vla", horizon=2, n_action_steps=2, vla=VLAConfig(model_class="clouds_only.Model"))
    policy = make_policy(config, SPEC, 0)
    obs = make_obs(SPEC)
    other = obs.clone()
    other["points", "left"] += 1
    assert (decide(policy, obs)["values"] != decide(policy, other)["values"]).all()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """A package with a model that looks at nothing but a camera's points."""
    (tmp_path / "clouds_only.py").write_text(
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.value_head = torch.nn.Linear(6, 1)\n"
        "    def encode_prefix(self, obs):\n"
        "        return obs['points', 'left'].mean(1)\n"
        "    def velocity(self, prefix, x, time):\n"
        "        return x * prefix[:, None, None, :1]\n"
        "    def value(self, prefix):\n"
        "        return self.value_head(prefix).squeeze(-1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
