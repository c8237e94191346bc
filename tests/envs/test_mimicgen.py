"""MimicGen's tasks, and robosuite 1.4 below them: by packages that stand for both, and by the real ones where they are.

`asyncflow envs use mimicgen PYTHON`, or the variable below, names an interpreter that has the real ones.
"""

import os

import fake_robosuite14
import pytest
import torch

from asyncflow.config.interpreters import remembered
from asyncflow.config.sections import EnvConfig
from asyncflow.config.task_table import MIMICGEN
from asyncflow.envs import make_vec_env
from asyncflow.envs.workers import WorkerVecEnv
from asyncflow.errors import ConfigError
from tools.stress.bare_python import make_bare_python

VARIABLE = "ASYNCFLOW_MIMICGEN_PYTHON"


@pytest.fixture
def fake(tmp_path):
    """Return a function that makes an interpreter which has these packages, and numpy alone besides."""
    bare = make_bare_python(tmp_path / "bare")

    def make_python(**changes):
        fake_robosuite14.write(tmp_path / "bare/packages", **changes)
        return str(bare)

    return make_python


def make(python, task="stack_d0", num_envs=1, num_workers=1, **keys) -> WorkerVecEnv:
    env = make_vec_env(EnvConfig(python=python, task=task, num_workers=num_workers, **keys), 4, num_envs, 0)
    assert isinstance(env, WorkerVecEnv)
    return env


def play(env, num_chunks):
    states = []
    for index in range(num_chunks):
        env.step_async(torch.full((env.num_envs, 4, env.spec.action_dim), 0.1 * index), range(env.num_envs))
        states.append(env.step_wait(range(env.num_envs)).obs["state"])
    return torch.stack(states)


@pytest.mark.parametrize("task", ["stack_d0", "Lift"])
def test_episodes_are_functions_of_their_seeds_however_many_workers_there_are(task, fake):
    python = fake()
    with make(python, task, 4, 1, horizon=8) as one, make(python, task, 4, 2, horizon=8) as two:
        assert torch.equal(one.reset(3)["state"], two.reset(3)["state"])
        first = play(one, 4)
        assert torch.equal(first, play(two, 4))
        one.reset(3)
        assert torch.equal(first, play(one, 4))
        assert len(first[0, :, -4:-1].unique(dim=0)) == 4


def test_the_description_builds_the_same_task_again(fake):
    with make(fake()) as env:
        meta, state = env.spec.env_meta, env.reset(1)["state"]
        assert (meta["env_name"], meta["env_version"]) == ("Stack_D0", "1.4.1")
        with make(env.interpreter, "Lift", env_meta=meta) as again:
            assert torch.equal(again.reset(1)["state"], state)
            assert again.spec.horizon == MIMICGEN["stack_d0"].horizon


def test_what_is_missing_is_one_line_with_what_installs_it(fake):
    absent = {name: None for name in fake_robosuite14.FILES if name.startswith("mimicgen")}
    with pytest.raises(
        ConfigError, match=r"it has no package mimicgen; run: .* -m pip install 'mimicgen @ git\+https://"
    ):
        make(fake(**absent))


def test_the_package_indexs_mimicgen_is_told_to_be_another(fake):
    absent = {name: None for name in fake_robosuite14.FILES if name.startswith("mimicgen/envs")}
    with pytest.raises(
        ConfigError, match=r"the package index's, is not NVIDIA's MimicGen; run: .* 'mimicgen @ git\+http"
    ):
        make(fake(**absent))


def test_another_robosuite_is_told_to_be_another(fake):
    with pytest.raises(
        ConfigError, match=r"cannot simulate MimicGen: its robosuite is 1.5.2, but 1.4 is needed; run: .* "
    ):
        make(fake(version="1.5.2"))


def test_a_robosuite_of_years_ago_is_one_line(fake):
    with pytest.raises(ConfigError, match=r"has robosuite 1.2.0; expected 1.5 or 1.4; run: .* -m pip install "):
        make(fake(version="1.2.0"), "Lift")


def test_what_mimicgen_prints_instead_of_raising_is_said(fake):
    broken = {"mimicgen/envs/robosuite/stack.py": "import absent_package"}
    with pytest.raises(ConfigError, match=r"has no package absent_package; run: .* -m pip install absent_package$"):
        make(fake(**broken))


@pytest.mark.sim
@pytest.mark.parametrize("task", ["stack_d0", "stack_three_d1", "square_d2"])
def test_the_real_one_simulates(task):
    python = os.environ.get(VARIABLE) or remembered("mimicgen")
    if python is None:
        pytest.skip(f"needs an interpreter that has MimicGen: asyncflow envs install mimicgen, or {VARIABLE}")
    with make(python, task, num_envs=2, horizon=12) as env:
        state = env.reset(1)["state"]
        assert state.shape[1] == 9 + MIMICGEN[task].object_size
        first = play(env, 6)
        assert torch.equal(env.reset(1)["state"], state)
        assert torch.equal(play(env, 6), first)
        assert not torch.equal(state[0], state[1])
