"""Makes, checks and remembers the interpreters of simulators: what `asyncflow envs` does.

An interpreter is remembered once it has built a simulator in the way in which a run does, so that one whose
installation was cut is not. The lists of what each kind needs are in `config/interpreters.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from asyncflow.config.interpreters import KINDS, choose_interpreter, envs_folder, find_python, record_file
from asyncflow.config.sections import validate
from asyncflow.envs import make_vec_env
from asyncflow.envs.workers import WorkerVecEnv
from asyncflow.errors import AsyncflowError, ConfigError
from asyncflow.files import write_atomically

_ASK_VERSION = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
_TIMEOUT_S = 60.0
_OFFLINE = re.compile(r"NewConnectionError|Temporary failure in name resolution|Network is unreachable|ConnectTimeout")


class Built(NamedTuple):
    """A simulator that was built to check an interpreter.

    Attributes:
        python: The interpreter.
        versions: Of Python and of the packages that simulate, by name.
        task: What was simulated.
        wall_s: Seconds that it took.
    """

    python: str
    versions: Mapping[str, str]
    task: str
    wall_s: float


def check(kind: str, python: str | None = None) -> Built:
    """Build one simulator of a kind, reset it and execute an action, as a run does.

    Args:
        kind: One of `KINDS`.
        python: As `env.python`; None means the interpreter that a run of this kind would use.

    Raises:
        ConfigError: There is no interpreter, or it cannot simulate the kind; one line that says what mends it.
    """
    start, task = time.monotonic(), KINDS[kind].task
    chosen = choose_interpreter(python, kind)
    config = validate({"env": {"task": task, "num_workers": 1, "python": chosen}}).env
    try:
        env = make_vec_env(config, 1, 1, 0)
        try:
            assert isinstance(env, WorkerVecEnv)  # every kind is simulated in processes
            env.reset(0)
            low, high = env.spec.action_limits
            env.step_async(((low + high) / 2).view(1, 1, -1), range(1))
            faults, versions = env.step_wait(range(1)).faults, env.versions
        finally:
            env.close()
    except ConfigError:
        raise
    except AsyncflowError as error:
        raise ConfigError(f"{chosen or sys.executable} cannot simulate {task}: {_last_line(str(error))}") from error
    if faults:
        raise ConfigError(f"{chosen or sys.executable} cannot simulate {task}: {_last_line(faults[0].message)}")
    _check_versions(kind, versions, chosen or sys.executable)
    return Built(chosen or sys.executable, versions, task, time.monotonic() - start)


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def _check_versions(kind: str, versions: Mapping[str, str], python: str) -> None:
    wanted = KINDS[kind]
    found = versions.get(wanted.package)
    if found is not None and not re.match(wanted.version, found):
        packages = " ".join(f"'{each}'" for each in wanted.packages)
        raise ConfigError(
            f"{python} has {wanted.package} {found}, which is not what {kind} means; run: {python} -m pip install "
            f"{packages}"
        )


def install(kind: str, python: str | None, tell: Callable[[str], None]) -> Built:
    """Make a virtual environment with a kind's packages, check it, and remember its interpreter.

    Args:
        kind: One of `KINDS`.
        python: Interpreter that the environment is made from; None looks for one for which the packages resolve.
        tell: Called with what is going on, a line each.

    Raises:
        ConfigError: No such Python is found, the packages cannot be installed, or they do not simulate; one line.
    """
    with _locked(kind) as folder:
        base = _find_base(kind, python)
        venv, log = folder / kind, folder / f"{kind}.log"
        _forget(kind)
        shutil.rmtree(venv, ignore_errors=True)  # of an installation that was cut, or that is replaced
        tell(f"{kind}: installing {', '.join(KINDS[kind].packages)} into {venv}; minutes, see {log}")
        with log.open("w") as output:
            _call([base, "-m", "venv", str(venv)], output, kind, log)
            made = str(venv / "bin" / "python")
            pip = [made, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
            _call([*pip, *KINDS[kind].packages], output, kind, log)
        tell(f"{kind}: building {KINDS[kind].task} with {made}")
        built = check(kind, made)
        _remember(kind, built)
        return built


def use(kind: str, python: str) -> Built:
    """Check an interpreter that is there already, and remember it.

    Raises:
        ConfigError: As `check`.
    """
    with _locked(kind):
        built = check(kind, find_python(python))
        _remember(kind, built)
        return built


def _remember(kind: str, built: Built) -> None:
    record = {"python": built.python, "packages": list(KINDS[kind].packages), "versions": built.versions}
    write_atomically(record_file(kind), json.dumps(record, indent=2).encode())


def _forget(kind: str) -> None:
    record_file(kind).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(kind: str) -> Iterator[Path]:
    """Keep other processes from installing the same kind; yields the folder of all of them."""
    folder = envs_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{kind}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{folder / kind}: another process is installing it; wait until it has") from None
            yield folder
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror}); set ASYNCFLOW_HOME to a folder that can"
        ) from None


def _find_base(kind: str, python: str | None) -> str:
    """Return an interpreter for which the packages of a kind resolve.

    Raises:
        ConfigError: There is none, or the one named is none.
    """
    versions = KINDS[kind].pythons
    expected = f"Python {' or '.join(sorted(versions, key=lambda each: int(each[2:])))} with the venv module"
    if python is not None:
        found = _version_of(find_python(python))
        if found not in versions:
            raise ConfigError(f"--python {python}: Python {found}; {kind} needs {expected}")
        return find_python(python)
    for version in versions:
        for candidate in _candidates(version):
            if _version_of(candidate) == version:
                return candidate
    raise ConfigError(f"asyncflow envs install {kind}: needs {expected}; found none: name one by --python PATH")


def _candidates(version: str) -> Iterator[str]:
    """Yield where an interpreter of a version may be: this one's, on the path, pyenv's."""
    if f"{sys.version_info[0]}.{sys.version_info[1]}" == version:
        yield sys.executable
    if on_path := shutil.which(f"python{version}"):
        yield on_path
    versions = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser() / "versions"
    yield from map(str, sorted(versions.glob(f"{version}.*/bin/python")))


def _version_of(python: str) -> str | None:
    """Return the version of an interpreter that can make virtual environments; None of one that cannot."""
    try:
        done = subprocess.run(
            [python, "-c", _ASK_VERSION], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _call(command: list[str], output: IO[str], kind: str, log: Path) -> None:
    """Run a step of an installation.

    Raises:
        ConfigError: It failed; one line with what it said, and where the rest is.
    """
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    output.write(f"$ {' '.join(command)}\n")
    output.flush()
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=variables, check=False
    )
    if done.returncode == 0:
        return
    text = log.read_text(errors="replace")
    errors = [line.strip() for line in text.splitlines() if re.match(r"\s*(ERROR|error|Error|fatal)\b", line)]
    said = errors[-1] if errors else f"exit code {done.returncode}"
    hint = f"the whole of it is in {log}; then run again: asyncflow envs install {kind}"
    if _OFFLINE.search(text):
        hint = (
            "no package index is reached; from a folder of wheels: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER asyncflow envs "
            f"install {kind}; see {log}"
        )
    raise ConfigError(f"{command[0]} -m {command[2]} failed for {kind}: {said}; {hint}")
