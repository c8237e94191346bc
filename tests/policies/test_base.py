"""The normaliser's range and limit, and the share of inputs that it cuts."""

import copy

import pytest
import torch
from tensordict import TensorDict

from asyncflow.config.sections import PolicyConfig
from asyncflow.policies import make_policy
from asyncflow.policies.base import clipped_inputs
from asyncflow.policies.networks.layers import Normalizer
from asyncflow.simulators.spec import EnvSpec


def _policy(kind="flow"):
    keys = {"kind": kind, "hidden_sizes": [8], "critic_hidden_sizes": [8], "log_prob": "joint_mean"}
    return make_policy(PolicyConfig(**keys), EnvSpec({"state": (3,)}, 2, 10), seed=0)


def _fitted(low, high):
    normalizer = Normalizer((len(low),))
    normalizer.set_range(torch.tensor(low), torch.tensor(high))
    return normalizer


@pytest.mark.parametrize("kind", ["flow", "gaussian"])
def test_without_demonstrations_large_observations_are_told_apart(kind):
    obs = TensorDict({"state": torch.tensor([[6.0] * 3, [600.0] * 3])}, batch_size=[2])
    near, far = _policy(kind).get_value(obs)
    assert near != far


def test_demonstrations_set_a_range_and_a_limit():
    normalizer = _fitted([0.0, -2.0], [10.0, 2.0])
    normalized = normalizer.normalize(torch.tensor([[0.0, 2.0], [1000.0, -1000.0]]))
    torch.testing.assert_close(normalized, torch.tensor([[-1.0, 1.0], [5.0, -5.0]]))


@pytest.mark.parametrize("copied", ["loaded", "deep"])
@pytest.mark.parametrize(("fitted", "largest"), [(True, 5.0), (False, 600.0)])
def test_a_copy_keeps_the_limit_or_its_absence(copied, fitted, largest):
    original = _fitted([-2.0], [2.0]) if fitted else Normalizer((1,))
    if copied == "loaded":
        other = Normalizer((1,))
        other.load_state_dict(original.state_dict())
    else:
        other = copy.deepcopy(original)
    assert other.normalize(torch.tensor([600.0])).item() == largest


def test_the_share_of_cut_inputs_is_counted_by_number_over_rows_and_histories():
    normalizer = _fitted([0.0, -2.0], [10.0, 2.0])
    rows = torch.tensor([[[5.0, 0.0], [5.0, 11.0]], [[31.0, -11.0], [29.0, -9.0]]])
    assert normalizer.clipped_shares(rows).tolist() == [0.25, 0.5]


def test_nothing_is_counted_without_demonstrations_or_without_a_state():
    policy, obs = _policy(), TensorDict({"state": torch.full((2, 3), 9.0)}, batch_size=[2])
    assert clipped_inputs(policy, obs) is None
    policy.obs_normalizer.set_range(-torch.ones(3), torch.ones(3))
    assert clipped_inputs(policy, obs).tolist() == [1.0] * 3
    assert clipped_inputs(policy, TensorDict({"features": torch.ones(2, 3)}, batch_size=[2])) is None


@pytest.mark.parametrize(("column", "name"), [(1, "state[1] (eef_pos)"), (3, "state[3] (object)"), (9, "state[9]")])
def test_a_number_of_the_state_is_named_after_its_observation(column, name):
    spec = EnvSpec({"state": (5,)}, 2, 10, obs_keys=("eef_pos", "object"), obs_widths=(3, 2))
    assert spec.name_number(column) == name
