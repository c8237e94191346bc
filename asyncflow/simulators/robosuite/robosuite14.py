"""What robosuite 1.4 does otherwise than 1.5: it draws from numpy's global generator, and controls arms, not robots.

robosuite is imported where it is needed.
"""

from __future__ import annotations

import contextlib
import random
import sys
from typing import TYPE_CHECKING, Any, Iterator

import numpy as np

from asyncflow.config.interpreters import KINDS
from asyncflow.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def is_robosuite_14(robosuite: Any) -> bool:
    """Tell whether the imported robosuite is 1.4.

    Raises:
        ConfigError: It is neither 1.4 nor 1.5.
    """
    version = tuple(map(int, robosuite.__version__.split(".")[:2]))
    if version not in ((1, 4), (1, 5)):
        raise ConfigError(
            f"{sys.executable} has robosuite {robosuite.__version__}; expected 1.5 or 1.4; run: {sys.executable} -m "
            f"pip install {' '.join(map(repr, KINDS['robosuite'].packages))}"
        )
    return version == (1, 4)


@contextlib.contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Let the global generators, from which robosuite 1.4 draws, begin at a seed, and put them back afterwards.

    Those are numpy's and, in environments of MimicGen, Python's own.
    """
    saved, own = np.random.get_state(), random.getstate()
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(saved)
        random.setstate(own)


def forget_grips(env: Any) -> None:
    """Let grippers be as new: a soft reset of 1.4.0 keeps the last command, from which the next one moves on.

    Later versions do so themselves.
    """
    for robot in env.robots:
        for gripper in robot.gripper.values() if isinstance(robot.gripper, dict) else [robot.gripper]:
            gripper.current_action = np.zeros(gripper.dof)


def load_controller() -> Any:
    """Return robosuite's default controller of an arm."""
    from robosuite.controllers import load_controller_config  # noqa: PLC0415  seconds

    return load_controller_config(default_controller="OSC_POSE")


def translate_task(env_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return keywords of a task of the table as robosuite 1.4 has them."""
    placed = env_kwargs.get("env_configuration")
    return env_kwargs if placed is None else {**env_kwargs, "env_configuration": f"single-arm-{placed}"}


def check_controllers(kwargs: dict[str, Any]) -> None:
    """Refuse controllers of robosuite 1.5, which describe a robot.

    Raises:
        ConfigError: There is one.
    """
    configs = kwargs.get("controller_configs")
    for config in configs if isinstance(configs, (list, tuple)) else [configs]:
        if isinstance(config, dict) and "body_parts" in config:
            raise ConfigError(
                "env_kwargs.controller_configs: of robosuite 1.5, and this interpreter has 1.4; leave env.python out"
            )


def read_action_limits(env: Any) -> NDArray[np.float64]:
    """Return the lowest and the highest action that an environment executes, [2, A]; absolute targets have none."""
    limits: NDArray[np.float64] = np.array(env.action_spec, np.float64)
    first = 0
    for robot in env.robots:
        is_bimanual = isinstance(robot.controller, dict)
        for arm in robot.arms if is_bimanual else (None,):
            controller = robot.controller[arm] if is_bimanual else robot.controller
            num_gripper = (robot.gripper[arm] if is_bimanual else robot.gripper).dof if _has_gripper(robot, arm) else 0
            end = first + len(controller.control_limits[0])
            if not getattr(controller, "use_delta", True):
                limits[:, end - len(controller.input_min) : end] = [[-np.inf], [np.inf]]
            first = end + num_gripper
    return limits


def _has_gripper(robot: Any, arm: str | None) -> bool:
    return bool(robot.has_gripper if arm is None else robot.has_gripper[arm])
