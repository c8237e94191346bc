"""Simulators of several tasks in worker processes: each environment has its task's, and start states come in turn."""

from functools import partial

import numpy as np
import pytest
import torch
from fake_simulator import ACTION_DIM, HORIZON, SUCCEED, FakeSimulator
from inline_worker import InlineWorker
from worker_cases import H, make

from asyncflow.config.sections import PolicyConfig
from asyncflow.envs import workers
from asyncflow.envs.base import VecEnv
from asyncflow.errors import ConfigError, ContractError
from asyncflow.policies import make_policy
from asyncflow.run.evaluate import evaluate
from asyncflow.simulators.checked import CheckedSimulator
from asyncflow.simulators.spec import EnvSpec

SHORT = 5


class NamedSimulator(FakeSimulator):
    """The fake, of a task; its state begins with the start state that it was reset to."""

    def __init__(self, instruction: str, horizon: int, num_start_states: int, seed: int) -> None:
        super().__init__(seed)
        told = {"instruction": instruction, "num_start_states": num_start_states}
        self.spec = EnvSpec({"state": (4,)}, ACTION_DIM, horizon, **told)

    def reset_to(self, seed: int, start_state: int) -> None:
        self.reset(seed)
        self.state[0] = start_state


class WideSimulator(FakeSimulator):
    """The fake, which observes more."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.spec = EnvSpec({"state": (5,)}, ACTION_DIM, HORIZON)

    def observe(self):
        return np.append(super().observe(), 0.0)


class UnstartedSimulator(FakeSimulator):
    """Says that it has start states, and lacks the method that begins in one."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.spec = EnvSpec({"state": (4,)}, ACTION_DIM, HORIZON, num_start_states=3)


LIFT_AND_PUSH = {
    "lift": partial(NamedSimulator, "lift it", HORIZON, 0),
    "push": partial(NamedSimulator, "push it", SHORT, 0),
}


@pytest.fixture
def _inline(monkeypatch):
    monkeypatch.setattr(workers, "Worker", InlineWorker)


def idle(env: VecEnv):
    env.step_async(torch.zeros(env.num_envs, H, ACTION_DIM), range(env.num_envs))
    return env.step_wait(range(env.num_envs))


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_environments_have_their_tasks_simulator_horizon_and_index_however_many_workers_there_are(num_workers):
    with make(num_workers, make_simulator=LIFT_AND_PUSH) as env:
        assert [(task.name, task.instruction, task.horizon) for task in env.spec.tasks] == [
            ("lift", "lift it", HORIZON),
            ("push", "push it", SHORT),
        ]
        assert env.reset(0)["task"].tolist() == [0, 1, 0, 1, 0]
        results = [idle(env) for _ in range(3)]
        assert results[-1].final_obs["task"].tolist() == [0, 1, 0, 1, 0]
    lengths = torch.stack([result.episode_length for result in results]).amax(0)
    assert lengths.tolist() == [HORIZON, SHORT, HORIZON, SHORT, HORIZON]


@pytest.mark.usefixtures("_inline")
def test_tasks_of_simulators_that_differ_are_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"^env\.tasks: a and b differ in obs: {'state': \[4\]} and {'state': \[5\]}"):
        make(1, make_simulator={"a": FakeSimulator, "b": WideSimulator})


@pytest.mark.usefixtures("_inline")
def test_more_tasks_than_environments_are_refused():
    with pytest.raises(ConfigError, match=r"^num_envs = 1: 2 tasks need one environment each at least$"):
        make(1, 1, make_simulator=LIFT_AND_PUSH)


def test_a_simulator_with_start_states_must_be_able_to_begin_in_one():
    with pytest.raises(ContractError, match=r"UnstartedSimulator\.reset_to"):
        CheckedSimulator(UnstartedSimulator(0), {})


@pytest.mark.usefixtures("_inline")
def test_episode_k_of_a_task_begins_in_its_start_state_k_modulo_their_number():
    """Episodes are counted over all environments of the task: environment 0 has 0, 3, 6, ... of the first."""
    tasks = {"a": partial(NamedSimulator, "a", H, 4), "b": partial(NamedSimulator, "b", H, 0)}
    with make(2, make_simulator=tasks) as env:
        first = env.reset(0)
        starts = torch.stack([first["state"][:, 0], *(idle(env).obs["state"][:, 0] for _ in range(3))])
    assert starts[:, ::2].long().tolist() == [[0, 1, 2], [3, 0, 1], [2, 3, 0], [1, 2, 3]]
    assert ((starts[:, 1::2] > 0) & (starts[:, 1::2] < 1)).all()  # drawn


@pytest.mark.usefixtures("_inline")
def test_every_environment_comes_to_every_start_state():
    """Two environments and four states: an environment that kept to every second one would never meet the others."""
    with make(1, 2, make_simulator=partial(NamedSimulator, "a", H, 4)) as env:
        first = env.reset(0)
        starts = torch.stack([first["state"][:, 0], *(idle(env).obs["state"][:, 0] for _ in range(3))])
    assert starts.long().tolist() == [[0, 1], [2, 3], [1, 2], [3, 0]]


@pytest.mark.usefixtures("_inline")
@pytest.mark.parametrize(("num_envs", "num_episodes"), [(2, 12), (3, 12), (5, 24), (4, 12), (6, 36)])
def test_an_evaluation_runs_every_start_state_equally_often(num_envs, num_episodes, monkeypatch):
    begun = []
    monkeypatch.setattr(NamedSimulator, "reset_to", lambda self, seed, start: begun.append((self, start)))
    tasks = {name: partial(NamedSimulator, name, H, 3) for name in ("a", "b")}
    with make(1, num_envs, make_simulator=tasks) as env:
        policy = make_policy(PolicyConfig(kind="gaussian", hidden_sizes=[4], critic_hidden_sizes=[4]), env.spec, 0)
        result = evaluate(policy, env, num_episodes, seed=0)
    starts = {name: [] for name in ("a", "b")}
    for simulator in {simulator for simulator, _ in begun}:
        own = [start for each, start in begun if each is simulator]
        starts[simulator.spec.instruction] += own[:-1]  # an environment begins one more episode, which nobody counts
    for begun_states in starts.values():
        assert [begun_states.count(state) for state in range(3)] == [num_episodes // 6] * 3
    assert [task.num_start_states for task in result.tasks] == [3, 3]


def test_a_run_goes_on_in_the_start_states_of_the_journal():
    tasks = {"a": partial(NamedSimulator, "a", 2 * H, 4), "b": partial(NamedSimulator, "b", 2 * H, 4)}
    with make(1, make_simulator=tasks) as env:
        env.reset(0)
        for _ in range(3):
            state = idle(env).obs["state"]
        journal = env.journal()
    with make(2, make_simulator=tasks) as env:
        assert torch.equal(env.reset(0, journal)["state"], state)
    assert state[:, 0].tolist() == [3, 2, 0, 3, 1]


def test_success_is_each_tasks_own():
    with make(1, make_simulator=LIFT_AND_PUSH) as env:
        env.reset(0)
        actions = torch.zeros(5, H, ACTION_DIM)
        actions[1, 0, SUCCEED] = 1.0
        env.step_async(actions, range(5))
        assert env.step_wait(range(5)).is_success.tolist() == [False, True, False, False, False]
