"""Cameras of one robosuite simulation, rendered when asked, on EGL or OSMesa.

Owns the OpenGL context and the order of the pixels. It must not know when an image is needed, nor what reads it.

robosuite's own camera observations would be rendered at every step, and its `render` draws into whichever context was
used last, so that simulators of one process would draw each other's scenes.

Shapes: C cameras.
"""

from __future__ import annotations

import os
from ctypes.util import find_library
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncflow.envs.tasks import SimulatorSettings, check_camera_names
from asyncflow.errors import ConfigError

_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}
_ADVICE = (
    "a GPU's driver brings EGL; without one install EGL (Debian: libegl1 libegl-mesa0) or OSMesa (Debian: libosmesa6); "
    "MUJOCO_GL=egl or MUJOCO_GL=osmesa chooses"
)


def choose_gl() -> None:
    """Choose EGL, else OSMesa, unless the environment variable MUJOCO_GL does. Before robosuite is first imported.

    Raises:
        ConfigError: Neither library is installed, or MUJOCO_GL is something else.
    """
    installed = [name for name, library in _LIBRARIES.items() if find_library(library)]
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower() or (installed or [""])[0]
    if chosen not in installed:
        found = f"MUJOCO_GL = {chosen} is not installed" if chosen else "neither EGL nor OSMesa is installed"
        raise ConfigError(f"env.cameras: cannot render: {found}; {_ADVICE}")
    os.environ["MUJOCO_GL"] = chosen
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # robosuite would read a number there
        os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", "0")


class Cameras:
    """Renders some cameras of a simulation."""

    def __init__(self, sim: Any, settings: SimulatorSettings) -> None:
        """Create an OpenGL context of its own.

        Args:
            sim: robosuite's `MjSim`, which must outlive this.
            settings: Its `cameras` and `camera_size` are read.

        Raises:
            ConfigError: The simulation lacks one of the cameras, or OpenGL does not work here.
        """
        check_camera_names(settings.cameras, tuple(sim.model.camera_names))
        self._height, self._width = settings.camera_size
        self._ids = [sim.model.camera_name2id(name) for name in settings.cameras]
        self._context = _create_context(sim)
        self._context.vopt.geomgroup[0] = 0  # what collides is not what is seen

    def render(self) -> NDArray[np.uint8]:
        """Return what the cameras see now, [C, 3, height, width], upright."""
        self._context.gl_ctx.make_current()
        return np.stack([self._render(camera) for camera in self._ids])

    def _render(self, camera: int) -> NDArray[np.uint8]:
        self._context.render(self._width, self._height, camera)
        pixels: NDArray[np.uint8] = self._context.read_pixels(self._width, self._height)
        return pixels[::-1].transpose(2, 0, 1)  # OpenGL's first row is the lowest

    def close(self) -> None:
        """Give the context back to the simulation, which frees it at its own end; may be called twice."""
        if self._context is not None:
            self._context.gl_ctx.make_current()  # or what is freed would be another context's
            self._context = None


def _create_context(sim: Any) -> Any:
    from robosuite.utils.binding_utils import MjRenderContextOffscreen  # noqa: PLC0415  seconds

    try:
        return MjRenderContextOffscreen(sim, device_id=-1)
    except Exception as error:  # whatever OpenGL, its loader or MuJoCo find missing
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"env.cameras: cannot render with MUJOCO_GL = {os.environ.get('MUJOCO_GL')}: {reason}; {_ADVICE}"
        ) from None
