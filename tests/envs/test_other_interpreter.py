"""Simulators under another interpreter: the same transitions, and every refusal one line that says what mends it."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_simulator import DIE
from worker_cases import SEED, H, N, command, left_behind, process_of, run, tensors, wait_for_end

from asyncflow.config.sections import EnvConfig
from asyncflow.envs import worker
from asyncflow.envs.worker import Recipe
from asyncflow.envs.workers import WorkerVecEnv
from asyncflow.errors import ConfigError, EnvError
from tools.stress.bare_python import make_bare_python

FAKE = Path(__file__).parents[1] / "support/fake_simulator.py"
OTHERS = {name: shutil.which(name) for name in ("python3.8", "python3.9", "python3.12", "python3.13")}
PYENV = Path("/root/.pyenv/versions")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return make_bare_python(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module", autouse=True)
def folder_of_simulators(tmp_path_factory):
    """Work in a folder that holds a simulator's file: another interpreter imports it from there."""
    folder = tmp_path_factory.mktemp("simulators")
    shutil.copy(FAKE, folder / "elsewhere.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        yield folder


def make(python, target="elsewhere:FakeSimulator", num_workers=2, num_envs=N, **keys):
    config = EnvConfig(python=None if python is None else str(python), num_workers=num_workers, **keys)
    return WorkerVecEnv(Recipe(target), config, num_envs, H, SEED)


def play(env: WorkerVecEnv) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    seen = [{"obs": env.reset(SEED)["state"]}]
    for _ in range(8):
        actions = torch.rand(N, H, env.spec.action_dim, generator=generator) - 0.45
        actions[..., 1:] = actions[..., 1:].clamp(max=0.5)
        seen.append(tensors(run(env, actions, range(N))))
    return seen


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_interpreter_with_nothing_but_numpy_gives_the_same_transitions(bare):
    with make(None) as own, make(bare) as other:
        assert other.spec == own.spec
        assert_equal(play(other), play(own))


def test_it_has_nothing_but_numpy(bare):
    found = subprocess.run([bare, "-c", "import numpy, torch"], capture_output=True, text=True, check=False)
    assert "No module named 'torch'" in found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10", "3.12", "3.13"])
def test_other_versions_of_python_give_the_same_transitions(version, tmp_path):
    """With numpy of today and of years ago; left out where a version is not installed."""
    found = [*sorted(PYENV.glob(f"{version}.*/bin/python")), *filter(None, [shutil.which(f"python{version}")])]
    if not found:
        pytest.skip(f"no Python {version} here")
    subprocess.run([found[0], "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([tmp_path / "venv/bin/python", "-m", "pip", "install", "-q", "numpy"], check=True)
    with make(None) as own, make(tmp_path / "venv") as other:  # the folder names the interpreter, too
        assert_equal(play(other), play(own))


CARELESS = """
import random
import numpy as np
from elsewhere import FakeSimulator

class Careless(FakeSimulator):
    def reset(self, seed):
        super().reset(seed)
        self.state[3] = np.random.uniform() + 10 * random.random()
"""


def test_workers_that_draw_from_global_generators_do_not_draw_alike(bare, folder_of_simulators):
    """They are forked from one process."""
    (folder_of_simulators / "careless.py").write_text(CARELESS)
    seen = []
    for _ in range(2):
        with make(bare, "careless:Careless", num_envs=2) as env:
            seen.append(env.reset(SEED)["state"][:, 3])
    assert seen[0][0] != seen[0][1]
    assert torch.equal(*seen)


def test_faults_there_are_survived_like_those_here(bare):
    before = left_behind()[0]
    with make(bare, num_workers=1, num_envs=2) as env:
        env.reset(SEED)
        for kind, harm in (("died", 3), ("raised", 1)):
            result = run(env, command(harm, env=0))
            assert [fault.kind for fault in result.faults] == [kind]
            assert result.broken.all()
        assert not run(env, torch.zeros(2, H, 6)).broken.any()
        process = process_of(env)
    assert left_behind()[0] == before
    assert not Path(f"/proc/{process}").exists()


def test_a_server_that_dies_takes_its_workers_along_and_another_takes_its_place(bare):
    with make(bare, num_envs=2) as env:
        env.reset(SEED)
        server = env._workers[0]._server.process
        os.kill(server, signal.SIGKILL)
        for each in env._workers:
            wait_for_end(each.process)
        faults = run(env, torch.zeros(2, H, 6)).faults
        assert [fault.kind for fault in faults] == ["died", "died"]
        assert all("died with its server" in fault.message for fault in faults)
        assert not run(env, torch.zeros(2, H, 6)).broken.any()
        assert env._workers[0]._server.process != server


def test_a_server_that_is_killed_before_it_has_started_a_worker_is_another_restart(bare, monkeypatch):
    """As by a system without memory: no setting is to blame, so that the run goes on."""
    asked = []

    def start_worker(interpreter, board):
        if not asked:
            os.kill(server, signal.SIGSTOP)  # it is asked, and does not answer
        answer = asked.append(server) or start(interpreter, board)
        if len(asked) == 1:
            os.kill(server, signal.SIGKILL)
        return answer

    with make(bare, num_workers=1, num_envs=2) as env:
        env.reset(SEED)
        server, start = env._workers[0]._server.process, worker.start_worker
        monkeypatch.setattr(worker, "start_worker", start_worker)
        faults = run(env, command(DIE, env=0)).faults
        assert [fault.kind for fault in faults] == ["died", "died"]
        assert "died with its server" in faults[1].message
        assert not run(env, torch.zeros(2, H, 6)).broken.any()


def test_an_interpreter_that_hangs_is_given_up_though_it_was_to_be_sent_megabytes(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 20\n")
    python.chmod(0o755)
    monkeypatch.setattr(worker, "_START_TIMEOUT_S", 0.5)
    recipe = Recipe("elsewhere:FakeSimulator", {"weights": "0" * 2**20})
    with pytest.raises(EnvError, match=r"^worker 0 .* was silent for 0\.5 s \(the time to construct one simulator\)$"):
        WorkerVecEnv(recipe, EnvConfig(python=str(python), num_workers=1), 1, H, SEED)


def test_a_journal_of_here_is_rebuilt_there(bare):
    actions = torch.rand(N, H, 6, generator=torch.Generator().manual_seed(1)) * 0.5
    with make(None) as own, make(bare) as other:
        own.reset(SEED)
        for _ in range(2):
            run(own, actions, range(N))
        assert torch.equal(other.reset(SEED, own.journal())["state"], run_nothing(own))


def run_nothing(env: WorkerVecEnv) -> torch.Tensor:
    return env.reset(SEED, env.journal())["state"]


REFUSALS = {
    "no such program": ("missing/python", r"^env.python = .*missing/python: no interpreter there; expected a python"),
    "a folder without one": (".", r"^env.python = .: no interpreter there"),
    "no interpreter": (
        "/bin/true",
        r"^env.python = .*/true: it ended with exit code 0 before it could simulate; ex",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_no_interpreter_is_refused_in_one_line(name):
    python, complaint = REFUSALS[name]
    with pytest.raises(ConfigError, match=complaint) as info:
        make(python)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7"])
def test_a_python_that_is_too_old_says_so(version):
    found = sorted(PYENV.glob(f"{version}.*/bin/python"))
    if not found:
        pytest.skip(f"no Python {version} here")
    with pytest.raises(ConfigError, match=rf"^env.python: .* \(Python {version}\) is too old to simulate: Python 3.8"):
        make(found[0])


def test_an_interpreter_without_numpy_says_what_to_install(tmp_path):
    python = make_bare_python(tmp_path, with_numpy=False)
    with pytest.raises(ConfigError, match=r"^env.python: .* cannot import numpy: .*; run: .* -m pip install numpy$"):
        make(python)


def test_a_missing_package_is_named_with_what_installs_it(bare):
    with pytest.raises(
        ConfigError, match=r"^.* \(Python .*\) has no package missing; if it is a file of yours, set PYTHONPATH"
    ):
        make(bare, "missing.simulators:Reach")


WITHOUT = {
    "a name": ("elsewhere:Missing", r"^elsewhere:Missing: elsewhere has no Missing$"),
    "a seed": ("seedless:Seedless", r"^seedless:Seedless, which is given a seed,.* cannot be called with 1 argument"),
}


@pytest.mark.parametrize("what", WITHOUT)
def test_what_cannot_make_a_simulator_is_one_line(bare, folder_of_simulators, what):
    (folder_of_simulators / "seedless.py").write_text("class Seedless:\n    def __init__(self):\n        pass\n")
    target, complaint = WITHOUT[what]
    with pytest.raises(ConfigError, match=complaint):
        make(bare, target)


def test_a_module_that_raises_is_one_line(bare, folder_of_simulators):
    (folder_of_simulators / "raising.py").write_text("raise RuntimeError('numpy is too new\\nfor this')")
    with pytest.raises(
        ConfigError, match=r"^.* \(Python .*\) cannot import raising: RuntimeError: numpy is too new for"
    ):
        make(bare, "raising:Reach")


def test_a_module_that_crashes_the_interpreter_is_named(bare, folder_of_simulators):
    (folder_of_simulators / "crashing.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(ConfigError, match=r"^env.python = .*: it ended by SIGSEGV while it imported crashing$"):
        make(bare, "crashing:Reach", num_workers=1)


def test_a_crash_while_all_workers_packages_are_imported_is_one_line(bare, folder_of_simulators):
    (folder_of_simulators / "fragile.py").write_text(
        "def preload():\n    import os, signal\n    os.kill(os.getpid(), 11)"
    )
    recipe = Recipe("elsewhere:FakeSimulator", preload="fragile:preload")
    with pytest.raises(ConfigError, match=r"^env.python = .*: it ended by SIGSEGV before it had imported fragile$"):
        WorkerVecEnv(recipe, EnvConfig(python=str(bare), num_workers=1), 1, H, SEED)


def test_a_module_that_leaves_is_one_line(bare, folder_of_simulators):
    """Both where a worker imports it and where the server does."""
    (folder_of_simulators / "leaving.py").write_text("import sys\nsys.exit(3)")
    complaint = r"^.* \(Python .*\) cannot import leaving: SystemExit: 3$"
    with pytest.raises(ConfigError, match=complaint):
        make(bare, "leaving:Reach")
    recipe = Recipe("elsewhere:FakeSimulator", preload="leaving:preload")
    with pytest.raises(ConfigError, match=complaint):
        WorkerVecEnv(recipe, EnvConfig(python=str(bare), num_workers=1), 1, H, SEED)


def test_an_installed_package_that_fails_in_its_import_is_named_with_the_command_that_mends_it(tmp_path):
    """Its own simulator imports it: the package is at fault, not the simulator."""
    packages = tmp_path / "site-packages"
    packages.mkdir()
    (packages / "physics.py").write_text("raise AttributeError('module numpy has no attribute bool')")
    (packages / "reach.py").write_text("import physics")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    complaint = (
        r"cannot import physics: AttributeError: module numpy has no attribute bool; run: .* pip install physics$"
    )
    with pytest.raises(ConfigError, match=complaint):
        make(python, "reach:Reach")


@pytest.mark.parametrize("numpy", ["import sys; sys.exit('not today')", "raise ImportError('one line' + chr(10) * 9)"])
def test_a_numpy_that_cannot_be_imported_is_one_line(numpy, tmp_path):
    (tmp_path / "numpy.py").write_text(numpy)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with pytest.raises(
        ConfigError, match=r"^env.python: .* cannot import numpy: .*; run: .* -m pip install num"
    ) as info:
        make(python)
    assert "\n" not in str(info.value)


def test_an_interpreter_that_prints_when_it_starts_does_not_reach_standard_output(bare, tmp_path, capfd):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho a banner\nexec {bare} "$@"\n')
    python.chmod(0o755)
    with make(python) as env:
        env.reset(SEED)
    assert capfd.readouterr().out == ""


def test_a_script_that_starts_the_interpreter_without_exec_will_do(bare, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n{bare} "$@"\n')
    python.chmod(0o755)
    with make(python, num_workers=1) as env:
        env.reset(SEED)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="older Pythons do not read PYTHONSAFEPATH")
def test_the_first_folder_of_pythonpath_is_kept_where_no_scripts_folder_comes_before_it(tmp_path, monkeypatch):
    shutil.copy(FAKE, tmp_path / "only_there.py")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with make(sys.executable, "only_there:FakeSimulator", num_workers=1) as env:
        env.reset(SEED)


def test_versions_are_those_of_the_interpreter_that_simulates(bare):
    with make(bare) as env:
        assert set(env.versions) == {"python", "numpy"}
        assert env.versions["numpy"] == np.__version__


def test_a_function_cannot_cross_to_another_interpreter(bare):
    with pytest.raises(ConfigError, match=r"is an object of this interpreter; .* as in Recipe\('my_module:MySim"):
        WorkerVecEnv(lambda seed: None, EnvConfig(python=str(bare)), 1, H, SEED)


def test_what_a_simulator_prints_does_not_reach_standard_output(bare, folder_of_simulators, capfd):
    (folder_of_simulators / "loud.py").write_text(
        "print('a banner')\nfrom elsewhere import FakeSimulator as Reach\nimport os\nos.system('echo another one')"
    )
    with make(bare, "loud:Reach") as env:
        env.reset(SEED)
    assert capfd.readouterr().out == ""
