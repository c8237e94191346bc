"""`asyncflow envs`: an interpreter is remembered once it has simulated; a failure is one line with what mends it."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from asyncflow import cli
from asyncflow.config import interpreters as kinds
from asyncflow.config.interpreters import KINDS, choose_interpreter, has_kind, record_file, remembered
from asyncflow.config.sections import EnvConfig
from asyncflow.envs import make_vec_env
from asyncflow.errors import ConfigError

BASE = """#!/bin/sh
# Stands for a Python that makes an environment: what that does instead of pip is in $FAKE_PIP.
if [ "$1" = -c ]; then echo 3.12; exit; fi
mkdir -p "$3/bin"
cat > "$3/bin/python" <<'EOF'
#!/bin/sh
if [ "$2" = pip ]; then echo "$@"; eval "$FAKE_PIP"; exit; fi
exec {python} "$@"
EOF
chmod +x "$3/bin/python"
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ASYNCFLOW_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FAKE_PIP", "exit 0")
    base = tmp_path / "base"
    base.write_text(BASE.replace("{python}", sys.executable))
    base.chmod(0o755)
    return tmp_path / "home"


@pytest.fixture
def install(tmp_path):
    return lambda: cli.run(["envs", "install", "gym", "--python", str(tmp_path / "base")])


def test_what_is_installed_is_remembered_and_used_by_the_tasks_name_alone(install, home, capsys):
    assert install() == 0
    assert "gym: gym:Pendulum-v1 built in" in capsys.readouterr().out
    assert remembered("gym") == str(home / "envs/gym/bin/python")
    packages = (home / "envs/gym.log").read_text()
    assert all(each in packages for each in KINDS["gym"].packages)
    env = make_vec_env(EnvConfig(task="gym:Pendulum-v1", num_workers=1), 1, 1, 0)
    with env:
        assert env.interpreter == remembered("gym")


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (
            "echo 'ERROR: No matching distribution found for x'; exit 1",
            "pip failed for gym: ERROR: No matching .*; the",
        ),
        (
            "echo 'NewConnectionError(...)'; echo 'ERROR: none'; exit 1",
            "no package index is reached; .* PIP_NO_INDEX=1",
        ),
        ("rm $0; exit 0", r"gym/bin/python: no interpreter there"),
    ],
)
def test_an_installation_that_fails_is_one_line_and_not_remembered(said, complaint, install, monkeypatch, capsys):
    assert install() == 0
    monkeypatch.setenv("FAKE_PIP", said)
    capsys.readouterr()
    assert install() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(complaint, line)
    assert remembered("gym") is None


def test_an_installation_that_is_killed_half_way_is_not_remembered_and_can_be_repeated(tmp_path, home):
    command = [sys.executable, "-m", "asyncflow", "envs", "install", "gym", "--python", str(tmp_path / "base")]
    kill = {**os.environ, "FAKE_PIP": "kill -9 $(cut -d' ' -f4 /proc/$$/stat)"}
    killed = subprocess.run(command, env=kill, capture_output=True, check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert (home / "envs/gym/bin/python").exists()
    assert remembered("gym") is None
    subprocess.run(command, capture_output=True, check=True, timeout=60)
    assert remembered("gym") is not None


def test_no_python_that_fits_is_one_line(install, monkeypatch, capsys):
    monkeypatch.setitem(KINDS, "gym", KINDS["libero"])
    assert install() == 2
    assert "Python 3.12; gym needs Python 3.10 or 3.11 with the venv module" in capsys.readouterr().err
    monkeypatch.setattr("asyncflow.envs.interpreters._candidates", lambda version: iter([]))
    assert cli.run(["envs", "install", "libero"]) == 2
    assert "needs Python 3.10 or 3.11 with the venv module; found none: name one by --python" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(install, home, capsys):
    home.write_text("a file")
    assert install() == 2
    assert "set ASYNCFLOW_HOME to a folder that can" in capsys.readouterr().err


def test_two_installations_at_once_are_refused(install, home, capsys):
    from asyncflow.envs.interpreters import _locked  # noqa: PLC0415

    with _locked("gym"):
        assert install() == 2
    assert "another process is installing it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (
            '{"python": "/missing/python"}',
            r"names /missing/python, which is no interpreter any more; run: asyncflow envs",
        ),
        ("{", r"gym.json: JSONDecodeError: .*; run: asyncflow envs install gym"),
        ("{}", r"gym.json: KeyError: 'python'; run: asyncflow envs install gym"),
    ],
)
def test_what_is_remembered_and_gone_or_damaged_is_one_line(record, complaint):
    record_file("gym").parent.mkdir(parents=True)
    record_file("gym").write_text(record)
    with pytest.raises(ConfigError, match=complaint):
        make_vec_env(EnvConfig(task="gym:Pendulum-v1"), 1, 1, 0)


def test_a_kinds_name_stands_for_its_interpreter():
    with pytest.raises(
        ConfigError, match=r"^env.python = robosuite14: it is not installed; run: asyncflow envs install r"
    ):
        choose_interpreter("robosuite14", "robosuite")
    record_file("robosuite14").parent.mkdir(parents=True)
    record_file("robosuite14").write_text(json.dumps({"python": sys.executable}))
    assert choose_interpreter("robosuite14", "robosuite") == sys.executable


def test_env_python_wins_over_what_is_remembered():
    record_file("gym").parent.mkdir(parents=True)
    record_file("gym").write_text(json.dumps({"python": "/missing"}))
    assert choose_interpreter(sys.executable, "gym") == sys.executable


def test_a_task_whose_packages_nobody_has_names_the_command_that_brings_them(monkeypatch):
    monkeypatch.setattr(kinds, "is_there", lambda package, inside="": False)
    with pytest.raises(
        ConfigError, match=r"cannot simulate robosuite: it has no .*; run: pip install 'asyncflow\[robos"
    ):
        choose_interpreter(None, "robosuite")
    with pytest.raises(
        ConfigError, match=r"cannot simulate libero: it has no package libero; run: asyncflow envs insta"
    ):
        choose_interpreter(None, "libero")


def test_the_package_index_has_another_mimicgen(tmp_path, monkeypatch):
    (tmp_path / "mimicgen").mkdir()
    (tmp_path / "mimicgen/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert not has_kind("mimicgen")
    with pytest.raises(
        ConfigError, match=r"its mimicgen .*is not NVIDIA's MimicGen; run: asyncflow envs install mimicgen"
    ):
        choose_interpreter(None, "mimicgen")


def test_the_list_says_which_interpreter_each_kind_would_use(capsys):
    record_file("libero").parent.mkdir(parents=True)
    record_file("libero").write_text(json.dumps({"python": sys.executable}))
    assert cli.run(["envs"]) == 0
    rows = dict(line.split("\t")[:2] for line in capsys.readouterr().out.splitlines())
    assert rows["gym"] == "this one"
    assert rows["libero"] == sys.executable
    assert rows["robosuite14"] == "none; asyncflow envs install robosuite14"


def test_an_interpreter_that_is_there_is_checked_before_it_is_remembered(tmp_path, capsys):
    assert cli.run(["envs", "use", "gym", "/bin/true"]) == 2
    assert "it ended with exit code 0 before it had imported gymnasium; run: asyncflow envs install gym" in (
        capsys.readouterr().err
    )
    assert remembered("gym") is None
    assert cli.run(["envs", "use", "gym", sys.executable]) == 0
    assert remembered("gym") == sys.executable


def test_a_python_that_is_too_old_is_told_the_command_that_makes_another(tmp_path):
    old = tmp_path / "python"
    said = "old (Python 3.6) is too old to simulate"
    old.write_text(f"#!{sys.executable}\nimport os, sys\nos.write(int(sys.argv[2]), b'{said}')\nsys.exit(1)\n")
    old.chmod(0o755)
    with pytest.raises(
        ConfigError, match=r"^env.python: old .* is too old to simulate; run: asyncflow envs install gym$"
    ):
        make_vec_env(EnvConfig(task="gym:Pendulum-v1", python=str(old)), 1, 1, 0)


def test_an_unknown_kind_is_one_line(capsys):
    assert cli.run(["envs", "check", "isaac"]) == 2
    assert "isaac: no kind of simulators; kinds: robosuite, gym" in capsys.readouterr().err
