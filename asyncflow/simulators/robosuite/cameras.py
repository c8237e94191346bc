"""Cameras of one robosuite simulation, rendered when asked, on EGL or OSMesa: images and point clouds.

Each simulation has an OpenGL context of its own, which is made current before it is used.

robosuite's own camera observations would be rendered at every step, and its `render` draws into whichever context was
used last, so that simulators of one process would draw each other's scenes.

Shapes: C cameras of one kind, P points of a cloud.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from ctypes.util import find_library
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping

import numpy as np

from asyncflow.config.observations import IMAGES, POINTS, name_in
from asyncflow.config.simulator_settings import SimulatorSettings, check_camera_names
from asyncflow.errors import ConfigError
from asyncflow.simulators.imports import explain_import
from asyncflow.simulators.robosuite.point_clouds import Picture, View, cloud_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}
_CONTEXTS = {"egl": "EGLGLContext", "osmesa": "OSMesaGLContext"}
_ADVICE = (
    "a GPU's driver brings EGL; without one install EGL (Debian: libegl1 libegl-mesa0) or OSMesa (Debian: libosmesa6); "
    "MUJOCO_GL=egl or MUJOCO_GL=osmesa chooses"
)
_EGL_DEVICE, _CUDA_DEVICES = "MUJOCO_EGL_DEVICE_ID", "CUDA_VISIBLE_DEVICES"
_READ_ON_IMPORT = ("PYOPENGL_PLATFORM", _EGL_DEVICE)


def import_robosuite() -> Any:
    """Import robosuite and MuJoCo whatever the environment says of OpenGL, and return robosuite.

    Both read it on import and fail where it names what is not installed, though nothing may be going to be rendered.
    What renders chooses for itself.

    Raises:
        ConfigError: It is not installed, or cannot be imported; one line.
    """
    if "robosuite" not in sys.modules:
        with _variables(MUJOCO_GL="disable", **dict.fromkeys(_READ_ON_IMPORT)):
            _switch_gpu_off()
            try:
                importlib.import_module("robosuite")
            except Exception as error:  # whatever it or a package below it raises
                raise ConfigError(explain_import(error, "asyncflow")) from error
    return sys.modules["robosuite"]


def _switch_gpu_off() -> None:
    """Let robosuite 1.4 heed `MUJOCO_GL=disable`: unless a macro of its own says so, it imports EGL with itself."""
    found = importlib.util.find_spec("robosuite")
    if found is None or found.origin is None or not importlib.metadata.version("robosuite").startswith("1.4"):
        return
    name = "robosuite.macros"
    spec = importlib.util.spec_from_file_location(name, Path(found.origin).parent / "macros.py")
    assert spec is not None  # it is a file
    assert spec.loader is not None
    macros = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(macros)
    setattr(macros, "MUJOCO_GPU_RENDERING", False)  # noqa: B010  which mypy does not know
    sys.modules[name] = macros


def choose_gl(key: str = "env.cameras") -> None:
    """Choose EGL, else OSMesa, unless the environment variable MUJOCO_GL does.

    Args:
        key: Of the configuration, because of which there is something to render.

    Raises:
        ConfigError: Neither library is installed, or MUJOCO_GL is something else.
    """
    installed = [name for name, library in _LIBRARIES.items() if find_library(library)]
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower() or (installed or [""])[0]
    if chosen not in installed:
        found = f"MUJOCO_GL = {chosen} is not installed" if chosen else "neither EGL nor OSMesa is installed"
        raise ConfigError(f"{key}: cannot render: {found}; {_ADVICE}")
    os.environ["MUJOCO_GL"] = chosen


def image_of(picture: Picture, settings: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Return a picture's colours, [3, height, width], upright."""
    return picture.pixels.transpose(2, 0, 1)


MADE_OF_PICTURES: dict[str, Callable[[Picture, Mapping[str, Any]], NDArray[Any]]] = {IMAGES: image_of, POINTS: cloud_of}
"""Kind -> what makes it of a camera's picture and `EnvSpec.rendered_with`."""


class Cameras:
    """Renders some cameras of a simulation."""

    def __init__(self, sim: Any, settings: SimulatorSettings, data: Any = None) -> None:
        """Create an OpenGL context of its own.

        Args:
            sim: robosuite's `MjSim`, which must outlive this.
            settings: What is rendered, and how large; where points are kept.
            data: robosuite's `MjData` of the moment that is seen; None means the simulation's present one.

        Raises:
            ConfigError: The simulation lacks one of the cameras, or OpenGL does not work here.
        """
        available = tuple(sim.model.camera_names)
        self._settings = settings
        self._ids: dict[str, list[int]] = {}  # kind -> the cameras that yield it
        for key, field in settings.rendered.items():
            camera = name_in(field.kind, key)
            check_camera_names(field.kind, (camera,), available)
            self._ids.setdefault(field.kind, []).append(sim.model.camera_name2id(camera))
        self._context = _create_context(sim, settings.rendering_key)
        self._context.data = sim.data if data is None else data
        self._context.vopt.geomgroup[0] = 0  # what collides is not what is seen

    def render(self) -> dict[str, NDArray[Any]]:
        """Return what the cameras see now; a camera that yields several kinds is rendered once.

        Returns:
            Kind -> [C, ...], as the kind's function in `MADE_OF_PICTURES` makes it; a kind not asked for is absent.
        """
        self._context.gl_ctx.make_current()
        pictures = {camera: self._render(camera) for camera in {each for ids in self._ids.values() for each in ids}}
        return {
            kind: np.stack([MADE_OF_PICTURES[kind](pictures[camera], self._settings.rendered_with) for camera in ids])
            for kind, ids in self._ids.items()
        }

    def _render(self, camera: int) -> Picture:
        height, width = self._settings.camera_size
        self._context.render(width, height, camera)
        if all(camera not in ids for kind, ids in self._ids.items() if kind != IMAGES):  # depth takes longer to read
            pixels, depth = self._context.read_pixels(width, height), np.empty((0, width), np.float32)
        else:
            pixels, depth = self._context.read_pixels(width, height, depth=True)
        return Picture(pixels[::-1], depth[::-1], self._view(camera))  # OpenGL's first row is the lowest

    def _view(self, camera: int) -> View:
        model, data = self._context.model, self._context.data
        planes, extent = model.vis.map, model.stat.extent
        position, rotation = data.cam_xpos[camera], data.cam_xmat[camera].reshape(3, 3)
        return View(float(model.cam_fovy[camera]), position, rotation, planes.znear * extent, planes.zfar * extent)

    def close(self) -> None:
        """Give the context back to the simulation, which frees it at its own end; may be called twice."""
        if self._context is not None:
            self._context.gl_ctx.make_current()  # or what is freed would be another context's
            self._context = None


def _create_context(sim: Any, key: str | None) -> Any:
    from robosuite.utils import binding_utils  # noqa: PLC0415  seconds

    gl = os.environ["MUJOCO_GL"]
    binding_utils._MUJOCO_GL = gl  # it was read when robosuite was imported
    os.environ["PYOPENGL_PLATFORM"] = gl
    try:
        if gl == "egl":
            _open_egl_display()
        module = importlib.import_module(f"robosuite.renderers.context.{gl}_context")
        binding_utils.GLContext = getattr(module, _CONTEXTS[gl])  # robosuite 1.4 has chosen with its import, too
        return binding_utils.MjRenderContextOffscreen(sim, device_id=-1)
    except Exception as error:  # whatever OpenGL, its loader or MuJoCo find missing
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{key}: cannot render with MUJOCO_GL = {gl}: {reason}; {_ADVICE}") from None


def _open_egl_display() -> None:
    """Let robosuite render on the first EGL device that works; it would read a number in `CUDA_VISIBLE_DEVICES`.

    Raises:
        ConfigError: None works, or `MUJOCO_EGL_DEVICE_ID` names none.
    """
    from robosuite.renderers.context import egl_context  # noqa: PLC0415  needs the library

    if egl_context.EGL_DISPLAY:
        return
    problem = "there is none"
    for device in order_egl_devices(len(egl_context.EGL.eglQueryDevicesEXT())):
        egl_context.EGL_DISPLAY = None
        try:
            with _variables(**{_EGL_DEVICE: str(device)}):
                context = egl_context.EGLGLContext(1, 1)
            context.make_current()
        except Exception as error:  # as above
            problem = f"device {device}: {error}"
        else:
            context.free()
            return
    egl_context.EGL_DISPLAY = None
    raise ConfigError(f"no EGL device works ({_name_devices()}): {problem}")


def order_egl_devices(count: int) -> list[int]:
    """Return which of `count` EGL devices to try, in this order.

    `MUJOCO_EGL_DEVICE_ID` says which one; else the first number in `CUDA_VISIBLE_DEVICES` says which one comes first,
    where it is one of them. A UUID, a MIG device or -1 is not.

    Raises:
        ConfigError: `MUJOCO_EGL_DEVICE_ID` is not the number of a device.
    """
    asked, devices = os.environ.get(_EGL_DEVICE, ""), [str(device) for device in range(count)]
    if asked and asked not in devices:
        raise ConfigError(f"{_EGL_DEVICE} is to be a number below {count}, the EGL devices here ({_name_devices()})")
    first = os.environ.get(_CUDA_DEVICES, "").split(",")[0].strip()
    return [int(asked)] if asked else sorted(range(count), key=lambda device: str(device) != first)


def _name_devices() -> str:
    return ", ".join(f"{name} = {os.environ.get(name, 'not set')}" for name in (_EGL_DEVICE, _CUDA_DEVICES))


@contextlib.contextmanager
def _variables(**values: str | None) -> Iterator[None]:
    """Set environment variables for a while, or remove those that are None."""
    saved = {name: os.environ.get(name) for name in values}
    try:
        _set_variables(values)
        yield
    finally:
        _set_variables(saved)


def _set_variables(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
