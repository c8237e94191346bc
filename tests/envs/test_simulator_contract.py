"""Simulators from elsewhere that break their contract, and what neither side can change of the other's."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_simulator import ACTION_DIM, FakeSimulator

from asyncflow.config.observations import Field
from asyncflow.envs.chunks import ChunkBoard
from asyncflow.errors import ContractError
from asyncflow.simulators.base import StepResult
from asyncflow.simulators.checked import CheckedSimulator, check_spec
from asyncflow.simulators.runner import EpisodeRunner
from asyncflow.simulators.spec import EnvSpec

H = 4
NO_ROOMS = {"images": (0, 3, 0, 0), "points": (0, 0, 6)}
SPEC = EnvSpec({"state": (4,)}, ACTION_DIM, 10)


def check(simulator) -> CheckedSimulator:
    return CheckedSimulator(simulator, NO_ROOMS)


def returning(**answers):
    """Return a fake whose methods return these things."""
    simulator = FakeSimulator(0)
    for method, answer in answers.items():
        setattr(simulator, method, lambda *_, answer=answer: answer)
    return simulator


@pytest.mark.parametrize(
    ("answer", "came"),
    [
        ((np.zeros(4), 0.0, False, False, {}), "a tuple of 5: ndarray of shape (4,), float64, 0.0, False, False, ..."),
        (0.0, "0.0"),
        (None, "None"),
        (("much", False), "a tuple of 2: 'much', False"),
        ((0.0, "no"), "a tuple of 2: 0.0, 'no'"),
        ((0.0, 0.5), "a tuple of 2: 0.0, 0.5"),
        ((torch.ones(1), False), "a tuple of 2: Tensor of shape (1,), torch.float32, False"),
        (
            (torch.ones((), requires_grad=True), False),
            "a tuple of 2: a tensor of shape (), torch.float32, that requires a gradient,",
        ),
    ],
)
def test_a_step_that_returns_anything_but_a_number_and_a_flag_is_refused_in_one_line(answer, came):
    with pytest.raises(ContractError, match=r"^fake_simulator\.FakeSimulator\.step returned ") as caught:
        check(returning(step=answer)).step(np.zeros(ACTION_DIM))
    assert came in str(caught.value)
    assert str(caught.value).endswith("; expected (reward, is_solved), a number and a bool")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "answer", [(1, False), [np.float32(1.0), np.True_], (torch.tensor(1.0), torch.tensor(True)), (np.ones(()), 1)]
)
def test_numbers_and_flags_of_any_library_are_taken(answer):
    step = check(returning(step=answer)).step(np.zeros(ACTION_DIM))
    assert step == (1.0, bool(answer[1]), False, bool(answer[1]))  # what is solved is over, and a success
    assert [type(value) for value in step] == [float, bool, bool, bool]


def test_an_end_that_is_no_success_and_a_cut_are_told_apart():
    for flags in [(True, False, False), (False, True, False), (False, True, True)]:
        answer = StepResult(0.5, *map(np.bool_, flags))
        assert check(returning(step=answer)).step(np.zeros(ACTION_DIM)) == (0.5, *flags)
    with pytest.raises(ContractError, match=r"returned a StepResult of 4: 0\.5, 'no', False, False; "):
        check(returning(step=StepResult(0.5, "no", False, False))).step(np.zeros(ACTION_DIM))


@pytest.mark.parametrize(
    "answer",
    [np.zeros(5), np.zeros(1), np.zeros((1, 4)), None, "state", 1.0, torch.ones(4, requires_grad=True), [[1], [1, 2]]],
)
def test_an_observation_that_is_not_as_in_the_spec_is_refused(answer):
    expected = r"^fake_simulator.FakeSimulator.observe returned .*; expected numbers of shape \(4,\), as in its spec$"
    with pytest.raises(ContractError, match=expected):
        check(returning(observe=answer)).observe()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"obs": {"joints": (4,)}}, r"obs is a dict of \['joints'\]; expected `state`"),
        ({"obs": {"state": (4, 1)}}, "obs is a dict"),
        ({"obs": {"state": (4,), "goal": (2,)}}, "and what cameras yield, alone"),
        ({"obs": {"state": 4}}, "a tuple of sizes"),
        ({"obs": {"state": Field("smell", (4,))}}, "has for state the kind 'smell'; expected vector"),
        ({"obs": {"state": (4,), "top": Field("images", (3, 8, 8), "uint8")}}, "has for top the kind 'images'"),
        ({"obs": {"state": Field("vector", (4,), "uint8")}}, "has for state the dtype 'uint8'; expected float32"),
        ({"horizon": 0}, "horizon has 0; expected a whole number of at least 1"),
        ({"horizon": math.inf}, "horizon has inf"),
        ({"action_dim": (6,)}, "action_dim has a tuple of 1: 6"),
        (
            {"obs": {"state": (4,), "images.top": (8, 8, 3)}},
            r"obs has for images.top a tuple of 3: 8, 8, 3; expected \(3, height",
        ),
        (
            {"obs": {"state": (4,), "images.top": (3, 8, 8)}},
            r"images of shapes \[\(3, 8, 8\)\]; expected none, by env.cameras",
        ),
        ({"env_meta": {"robot": object()}}, "cannot be written as JSON"),
        ({"obs_keys": "state"}, "obs_keys is 'state'; expected a tuple of names"),
        ({"obs_widths": 4}, "obs_widths is 4; expected a tuple of whole numbers"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(change, named):
    simulator = FakeSimulator(0)
    simulator.spec = replace(simulator.spec, **change)
    with pytest.raises(ContractError, match=f"^fake_simulator.FakeSimulator.spec.*{named}"):
        check(simulator)


def test_a_spec_without_a_dictionary_of_shapes_is_refused_where_it_is_made():
    with pytest.raises(ContractError, match=r"EnvSpec.obs is None; expected a dictionary of shapes"):
        replace(SPEC, obs=None)


def test_what_is_no_simulator_is_refused():
    with pytest.raises(ContractError, match=r"NoneType.spec is None; expected an asyncflow.envs.base.EnvSpec"):
        check(None)


@pytest.mark.parametrize(
    ("method", "named"),
    [(None, r"observe is None; expected a function of 0"), (lambda _: 0, r"observe\(_\) cannot be called with 0")],
)
def test_a_simulator_whose_method_is_missing_or_takes_other_arguments_is_refused(method, named):
    simulator = FakeSimulator(0)
    simulator.observe = method
    with pytest.raises(ContractError, match=rf"FakeSimulator\.{named} argument\(s\)"):
        check(simulator)


def test_sizes_of_numpy_become_plain_ones_which_a_policy_file_can_hold():
    limits = {"action_low": -np.ones(6), "action_high": np.ones(6)}
    spec = replace(SPEC, action_dim=np.int64(6), obs={"state": (np.int32(4),)}, obs_keys=["mine"], **limits)
    plain = check_spec(spec, "mine")
    assert plain == replace(SPEC, obs_keys=("mine",), action_low=(-1.0,) * 6, action_high=(1.0,) * 6)
    assert (type(plain.action_dim), type(plain.state_shape[0])) == (int, int)


class Changing(FakeSimulator):
    """It changes its action in place, and returns its own state, which it changes later."""

    def step(self, action):
        action *= 0.5
        return super().step(action)

    def observe(self):
        return self.own

    def reset(self, seed):
        super().reset(seed)
        self.own = self.state = self.state.astype(np.float32)


def test_a_simulator_that_changes_its_action_in_place_changes_a_copy():
    board = ChunkBoard.allocate(1, H)
    runner = EpisodeRunner(Changing(0), 0, board.memory)
    runner.begin(0, 0)
    board.actions[0, :, 0] = 0.25
    runner.execute()
    assert board.actions[0, :, 0].tolist() == [0.25] * H


def test_an_observation_that_a_simulator_changes_later_stays_as_it_was():
    board = ChunkBoard.allocate(1, H, n_obs_steps=2)
    runner = EpisodeRunner(Changing(0), 0, board.memory)
    runner.begin(0, 0)
    runner.execute()
    assert board.obs[0, [2, 6]].tolist() == [H - 1, H]  # two env steps, not the last one twice


class Seeing(FakeSimulator):
    """One camera, whose picture is what the test says."""

    def __init__(self, picture):
        super().__init__(0)
        self.spec = replace(self.spec, obs={"state": (4,), "images.top": (3, 2, 2)})
        self.picture = picture

    def render(self):
        return self.picture


@pytest.mark.parametrize(
    "picture",
    [
        {"images": np.zeros((1, 3, 2, 2))},  # in [0, 1], perhaps
        {"images": np.zeros((3, 2, 2), np.uint8)},
        {"image": np.zeros((1, 3, 2, 2), np.uint8)},
        {},
        np.zeros((1, 3, 2, 2), np.uint8),
    ],
)
def test_pictures_that_are_not_as_in_the_spec_are_refused(picture):
    simulator = CheckedSimulator(Seeing(picture), NO_ROOMS | {"images": (1, 3, 2, 2)})
    with pytest.raises(ContractError, match=r"^test_simulator_contract.Seeing.render returned .*; expected "):
        simulator.render()


def test_a_picture_that_a_simulator_changes_later_stays_as_it_was():
    picture = {"images": np.full((1, 3, 2, 2), 7, np.uint8)}
    seen = CheckedSimulator(Seeing(picture), NO_ROOMS | {"images": (1, 3, 2, 2)}).render()
    picture["images"][:] = 0
    assert (seen["images"] == 7).all()
