"""MimicGen's tasks: environments of robosuite 1.4, which importing MimicGen registers there."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from asyncflow.config.interpreters import KINDS, explain_absence, is_there
from asyncflow.errors import ConfigError
from asyncflow.simulators.imports import explain_import
from asyncflow.simulators.robosuite import simulator
from asyncflow.simulators.robosuite.cameras import import_robosuite
from asyncflow.simulators.robosuite.robosuite14 import is_robosuite_14

if TYPE_CHECKING:
    from asyncflow.simulators.robosuite.simulator import RobosuiteSimulator


def preload() -> None:
    """Import what simulators need, and have numba load its functions."""
    import_mimicgen()
    simulator.preload()


def build(seed: int, settings: dict[str, Any]) -> RobosuiteSimulator:
    """Construct a simulator from settings as JSON holds them."""
    import_mimicgen()
    return simulator.build(seed, settings)


def import_mimicgen() -> None:
    """Import MimicGen, which registers its environments.

    Raises:
        ConfigError: It is missing, or another package of its name; or robosuite is, or of another version.
    """
    install = f"{sys.executable} -m pip install"
    packages = [f"'{each}'" for each in KINDS["mimicgen"].packages]
    if not is_there("mimicgen", KINDS["mimicgen"].inside):
        raise ConfigError(
            f"{sys.executable} cannot simulate: {explain_absence('mimicgen')}; run: {install} {packages[-1]}"
        )
    with simulator.quiet():
        robosuite = import_robosuite()
        if not is_robosuite_14(robosuite):
            raise ConfigError(
                f"{sys.executable} cannot simulate MimicGen: its robosuite is {robosuite.__version__}, but 1.4 is "
                f"needed; run: {install} {' '.join(packages[:-1])}"
            )
        try:
            importlib.import_module("mimicgen")
            importlib.import_module("mimicgen.envs.robosuite.stack")  # which says what the line above only prints
        except Exception as error:  # whatever it or a package below it raises
            raise ConfigError(explain_import(error, "asyncflow")) from error
