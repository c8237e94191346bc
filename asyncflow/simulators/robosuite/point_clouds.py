"""Point clouds: from a camera's depth and colours to coloured points in the world.

This file holds the geometry and chooses the points; it needs neither OpenGL nor a simulator. A cloud is a function of
one picture alone: an episode that is replayed has the same clouds, bit for bit.

Shapes: P points of a cloud, M points within the box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_CHANNELS = 6  # x, y, z, r, g, b


class View(NamedTuple):
    """Pose and field of view of a camera, in MuJoCo's conventions.

    Attributes:
        fovy: Vertical field of view, degrees.
        position: [3] in the world, metres.
        rotation: [3, 3] whose columns point to the camera's right, upwards and backwards, in the world.
        near: Distance of the nearest plane that is drawn, metres.
        far: Distance of the farthest one, metres.
    """

    fovy: float
    position: NDArray[np.float64]
    rotation: NDArray[np.float64]
    near: float
    far: float


class Picture(NamedTuple):
    """One rendered picture: depth and colours.

    Attributes:
        pixels: [height, width, 3] uint8, the first row is the highest.
        depth: [height, width] in [0, 1]; empty where nothing but the colours is needed.
        view: The camera.
    """

    pixels: NDArray[np.uint8]
    depth: NDArray[np.float32]
    view: View


def cloud_of(picture: Picture, settings: Mapping[str, Any]) -> NDArray[np.float32]:
    """Return the cloud of a picture, [P, 6], under `env.point_bounds` and `env.num_points`."""
    return make_cloud(*picture, settings["point_bounds"], settings["num_points"])


def metric_depth(depth: NDArray[Any], near: float, far: float) -> NDArray[np.float64]:
    """Return distances along the viewing axis, metres, of what a depth buffer holds.

    OpenGL's perspective projection stores `d = (1 - near / z) / (1 - near / far)`: 0 at the near plane, 1 at the far.
    """
    distance: NDArray[np.float64] = near / (1.0 - depth.astype(np.float64) * (1.0 - near / far))
    return distance


def world_points(depth: NDArray[Any], view: View) -> NDArray[np.float64]:
    """Return where in the world the centre of every pixel lies, [height, width, 3] metres.

    Element by element instead of a matrix product, whose rounding may depend on how many threads share it.

    Args:
        depth: [height, width] in [0, 1], the first row is the highest.
        view: The camera.
    """
    height, width = depth.shape
    slope = np.tan(np.radians(view.fovy) / 2) / (height / 2)  # of a ray, for each pixel from the picture's centre
    right = (np.arange(width) + 0.5 - width / 2) * slope
    up = (height / 2 - np.arange(height) - 0.5) * slope
    axes = view.rotation.T
    rays = right[None, :, None] * axes[0] + up[:, None, None] * axes[1] - axes[2]
    points: NDArray[np.float64] = view.position + metric_depth(depth, view.near, view.far)[:, :, None] * rays
    return points


def make_cloud(
    pixels: NDArray[np.uint8], depth: NDArray[Any], view: View, bounds: Sequence[float], num_points: int
) -> NDArray[np.float32]:
    """Return the cloud of a picture, [P, 6]: x, y, z in the world, metres, and r, g, b in [0, 1].

    Args:
        pixels: [height, width, 3], the first row is the highest.
        depth: [height, width] in [0, 1].
        view: The camera.
        bounds: The box that points are kept in, metres: low x, y, z, then high x, y, z.
        num_points: P.
    """
    points = world_points(depth, view)
    is_inside = ((points >= bounds[:3]) & (points <= bounds[3:])).all(-1)
    cloud = np.concatenate([points[is_inside], pixels[is_inside] / 255], axis=1, dtype=np.float32)
    return choose_points(cloud, num_points)


def choose_points(cloud: NDArray[np.float32], num_points: int) -> NDArray[np.float32]:
    """Return P of M points, [P, 6], evenly over the picture, row by row.

    Fewer points than P are repeated, each as often as the others or once more; of none, all numbers are zero.
    """
    if not len(cloud):
        return np.zeros((num_points, NUM_CHANNELS), np.float32)
    chosen: NDArray[np.float32] = cloud[np.arange(num_points) * len(cloud) // num_points]
    return chosen
