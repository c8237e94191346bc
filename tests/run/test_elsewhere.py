"""Runs whose simulators have another interpreter: both modes equal, as with this one, and resumed exactly."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from silent import LIFT, outcome, start
from test_library_trainer import POLICY, SETTINGS, assert_same, everything

import asyncflow as af
from tools.stress.bare_python import make_bare_python

FAKE = Path(__file__).parents[1] / "support/fake_simulator.py"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield an interpreter that has numpy alone, in a folder that holds a simulator's file."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copy(FAKE, folder / "elsewhere.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        yield str(make_bare_python(folder / "interpreter"))


def make(python: str | None, buffer_type: str) -> af.Trainer:
    recipe = af.Recipe("elsewhere:HarmlessSimulator")
    env = af.SimulatorVecEnv(recipe, num_envs=4, n_action_steps=2, num_workers=2, python=python)
    policy = af.make_policy("gaussian", env, **POLICY)
    return af.Trainer(
        policy, env, af.PPO(policy, **SETTINGS), buffer_size=32, buffer_type=buffer_type, max_policy_lag=1
    )


def test_both_modes_end_equal_there_and_as_they_do_here(bare):
    ends = []
    for python, buffer_type in ((None, "standard"), (bare, "standard"), (bare, "vla")):
        with make(python, buffer_type) as trainer:
            trainer.train(total_updates=3)
            ends.append(everything(trainer))
    assert_same(ends[0], ends[1])
    assert_same(ends[1], ends[2])


def test_a_run_is_saved_there_and_resumed_exactly(bare, tmp_path):
    with make(bare, "vla") as trainer:
        trainer.train(total_updates=2)
        trainer.save(tmp_path / "saved")
        trainer.train(total_updates=2)
        uncut = everything(trainer)
    with make(bare, "vla") as other, af.Trainer.resume(tmp_path / "saved", env=other.env) as resumed:
        resumed.train(total_updates=2)
        assert_same(everything(resumed), uncut)


@pytest.mark.sim
def test_a_run_of_lift_is_the_same_under_an_interpreter_that_env_python_names(tmp_path):
    ends = []
    for name, python in (("here", None), ("there", sys.executable)):
        start(tmp_path / name, "lift", LIFT | {"env.python": python, "trainer.total_updates": 2})
        ends.append(outcome(tmp_path / name))
    (policy, groups, _, rows), (other_policy, other_groups, _, other_rows) = ends
    assert all(torch.equal(policy[name], other_policy[name]) for name in policy)
    assert all(torch.equal(groups[g][name], other_groups[g][name]) for g in groups for name in groups[g])
    assert rows == other_rows
