"""A simulator of the user's own by its name, `my_simulator:Reach`, as a task of the command line."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from asyncflow.config.contracts import broken
from asyncflow.errors import AsyncflowError, ConfigError
from asyncflow.simulators.imports import explain_import
from asyncflow.simulators.spec import EnvSpec

if TYPE_CHECKING:
    from asyncflow.simulators.base import Simulator


def build(seed: int, name: str, horizon: int | None) -> Simulator:
    """Import and construct it; its spec then names the task, so that its policies can be evaluated.

    Args:
        seed: Given to it, as to every simulator.
        name: `module:name` of its class, or of a function that returns one.
        horizon: Env steps until an episode is truncated; None means its own.

    Raises:
        ConfigError: It cannot be imported; one line.
        ContractError: It has no spec.
    """
    module, _, attribute = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except AsyncflowError:
        raise
    except BaseException as error:  # whatever a module raises that is imported
        raise ConfigError(f"env.task = {name}: {explain_import(error, module)}") from error
    simulator: Simulator = found(seed)
    spec = getattr(simulator, "spec", None)
    if not isinstance(spec, EnvSpec):
        raise broken(f"{name}.spec", "is", spec, "an asyncflow.EnvSpec")
    simulator.spec = replace(spec, task=name, horizon=spec.horizon if horizon is None else horizon)
    return simulator
