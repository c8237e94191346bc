"""Environments from elsewhere that break their contract, and what neither side can change of the other's."""

from dataclasses import replace

import pytest
import torch
from tensordict import TensorDict

from asyncflow.envs.base import EnvInterrupted
from asyncflow.envs.checked_env import CheckedVecEnv
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.errors import ContractError

N, H = 3, 2


class Registered(ToyVecEnv):
    """The toy, whose spec, observations and results the test changes."""

    def __init__(self, change_obs=lambda obs: obs, change_result=lambda result: result, **changes):
        super().__init__(N, H)
        self.spec = replace(self.spec, **changes)
        self.change_obs, self.change_result = change_obs, change_result

    def reset(self, seed, journal=None):
        return self.change_obs(super().reset(seed, journal))

    def step_wait(self, env_ids):
        return self.change_result(super().step_wait(env_ids))


def check(env) -> CheckedVecEnv:
    return CheckedVecEnv(env, H, N, "Mine")


def step(env, env_ids=range(N), actions=None):
    env.step_async(torch.zeros(len(env_ids), H, 2) if actions is None else actions, env_ids)
    return env.step_wait(env_ids)


def test_a_success_needs_an_end():
    nothing, all_of_them = torch.zeros(N, dtype=torch.bool), torch.ones(N, dtype=torch.bool)
    env = check(Registered(change_result=lambda result: replace(result, succeeded=nothing)))
    env.reset(0)
    assert torch.equal(step(env).is_success, nothing)
    env = check(Registered(change_result=lambda result: replace(result, succeeded=all_of_them)))
    env.reset(0)
    with pytest.raises(ContractError, match="environment 0: executed 2, terminated False"):
        step(env)


def test_what_keeps_the_contract_is_passed_on():
    env, plain = check(Registered()), ToyVecEnv(N, H)
    assert torch.equal(env.reset(0)["state"], plain.reset(0)["state"])
    result, expected = step(env, range(1, N)), step(plain, range(1, N))
    for name in ("rewards", "executed", "terminated", "truncated", "episode_return", "episode_length", "broken"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name
    assert torch.equal(result.final_obs["state"], expected.final_obs["state"])
    assert env.journal().episodes == [0] * N
    env.interrupt()
    with pytest.raises(EnvInterrupted):
        env.reset(0)


@pytest.mark.parametrize(
    ("change", "came"),
    [
        (lambda obs: None, "returned None"),
        (lambda obs: {"state": obs["state"]}, r"returned a dict of \['state'\]"),
        (lambda obs: obs.exclude("state"), "returned nothing"),
        (lambda obs: obs.set("goal", obs["state"]), "returned state: Tensor .*, goal: Tensor"),
        (lambda obs: obs.apply(torch.Tensor.double), "returned state: Tensor of shape .*float64"),
        (lambda obs: obs[:2], r"returned state: Tensor of shape \(2, 4\)"),
        (lambda obs: obs.apply(lambda x: x.requires_grad_()), "returned state: .* requires a gradient"),
        (lambda obs: obs.apply(lambda x: x / 0), "returned state numbers that are not finite"),
    ],
)
def test_a_first_observation_that_is_not_as_in_the_spec_is_refused(change, came):
    with pytest.raises(ContractError, match=rf"^test_checked_env.Registered.reset {came}.*; expected"):
        check(Registered(change_obs=change)).reset(0)


@pytest.mark.parametrize(
    ("change", "came"),
    [
        (lambda result: None, "returned None"),
        (lambda result: (result.obs, result.rewards), "returned a tuple of 2"),
        (lambda result: replace(result, terminated=result.terminated.long()), "returned as terminated .*int64"),
        (lambda result: replace(result, executed=result.executed.float()), "returned as executed .*float32"),
        (lambda result: replace(result, rewards=result.rewards.sum(1)), r"returned as rewards .*\(3,\)"),
        (lambda result: replace(result, rewards=None), "returned as rewards None"),
        (lambda result: replace(result, rewards=result.rewards * torch.nan), "returned as rewards numbers that are"),
        (lambda result: replace(result, obs=TensorDict({}, [N])), "returned as obs nothing"),
        (lambda result: replace(result, final_obs=None), "returned as final_obs None"),
        (lambda result: replace(result, faults=["worker 0 died"]), "returned as faults a list of 1"),
        (lambda result: replace(result, executed=result.executed + H), "environment 0: executed 4, .*broken False"),
        (lambda result: replace(result, broken=~result.broken), "environment 0: executed 2, .*broken True"),
        (
            lambda result: replace(result, terminated=~result.broken, truncated=~result.broken),
            "environment 0: executed 2, terminated True, truncated True",
        ),
    ],
)
def test_a_result_that_is_not_as_promised_is_refused(change, came):
    env = check(Registered(change_result=change))
    env.reset(0)
    with pytest.raises(
        ContractError, match=rf"^test_checked_env.Registered.step_wait (returned for )?{came}.*; expected"
    ):
        step(env)


def test_floats_and_whole_numbers_of_any_size_are_taken():
    def widen(result):
        return replace(result, rewards=result.rewards.double(), executed=result.executed.int())

    env = check(Registered(change_result=widen))
    env.reset(0)
    result = step(env)
    assert (result.rewards.dtype, result.executed.dtype) == (torch.float32, torch.int64)


def test_a_spec_or_a_number_of_environments_that_cannot_be_is_refused():
    with pytest.raises(ContractError, match=r"Registered\.spec\.horizon has 0; expected a whole number"):
        check(Registered(horizon=0))
    with pytest.raises(ContractError, match=r"Registered\.num_envs is 3; expected 4, as asked for"):
        CheckedVecEnv(Registered(), H, N + 1, "Mine")


@pytest.mark.parametrize("notices", ["hello", None, (1,)])
def test_notices_are_texts(notices):
    env = Registered()
    env.notices = notices
    with pytest.raises(ContractError, match=r"Registered\.notices is .*; expected a tuple of texts"):
        check(env)


def test_a_description_that_is_none_is_refused():
    with pytest.raises(ContractError, match=r"Registered\.spec\.env_meta is 'Lift'; expected a dictionary"):
        check(Registered(env_meta="Lift"))


class Careless(Registered):
    """It changes in place what it is given, and what it returned."""

    def reset(self, seed, journal=None):
        self.returned = super().reset(seed, journal)
        if journal is not None:
            journal.chunks[0][0].fill_(7.0)
        return self.returned

    def step_async(self, actions, env_ids):
        super().step_async(actions, env_ids)
        self.returned["state"].fill_(7.0)
        actions.fill_(7.0)


def test_neither_side_changes_what_the_other_keeps():
    env = check(Careless())
    obs, actions = env.reset(0), torch.zeros(N, H, 2)
    seen = obs.clone()
    step(env, actions=actions)
    assert torch.equal(obs["state"], seen["state"])
    assert not actions.any()
    journal = env.journal()
    kept = [chunk.clone() for chunk in journal.chunks[0]]
    env.reset(0, journal)
    assert torch.equal(journal.chunks[0][0], kept[0])
