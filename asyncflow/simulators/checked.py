"""Checks simulators and specs from elsewhere against their contract, at every call.

A broken contract is a `ContractError`, which ends the run in one line: to try again would not help. A simulator gets
copies and its results are copied, so that neither side can change what the other one keeps.

Shapes: C cameras, P points of a cloud, A action size, D size of the `state` observation.
"""

from __future__ import annotations

import json
import numbers
from copy import deepcopy
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Callable, Mapping

import numpy as np

from asyncflow.config.contracts import broken, check_callable, name_of
from asyncflow.config.observations import INDEX, KINDS, STATE, TASK, VECTOR, Field, Shape, field_key
from asyncflow.errors import ContractError
from asyncflow.simulators.base import StepResult
from asyncflow.simulators.spec import EnvSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

_REAL = "fiub"  # kinds of dtypes that hold real numbers


class CheckedSimulator:
    """A `Simulator` from elsewhere; see there for what the methods do."""

    def __init__(self, simulator: Any, rooms: Mapping[str, Shape]) -> None:
        """Take over a simulator.

        Args:
            simulator: Used by nobody else from now on.
            rooms: Kind -> [C, ...], what the configuration lets cameras yield.

        Raises:
            ContractError: It lacks a method, its spec is none, or its cameras are not the configuration's.
        """
        self._simulator, self._name = simulator, name_of(simulator)
        self.spec = _check_simulator_spec(simulator, self._name)
        for kind in KINDS:
            _check_room(self.spec, kind, rooms.get(kind, (0,)), self._name)
        start: dict[str, Any] = {"reset_to": (0, 0)} if self.spec.num_start_states else {"reset": (0,)}
        methods = {**start, "step": (np.zeros(self.spec.action_dim, np.float32),), "observe": ()}
        for method, arguments in {**methods, **({"render": ()} if self.spec.rendered else {})}.items():
            check_callable(getattr(simulator, method, None), f"{self._name}.{method}", arguments)

    def reset(self, seed: int) -> None:
        """Start an episode."""
        self._simulator.reset(seed)

    def reset_to(self, seed: int, start_state: int) -> None:
        """Start an episode in one of the start states."""
        self._simulator.reset_to(seed, start_state)

    def step(self, action: NDArray[Any]) -> StepResult:
        """Execute one action, of which the simulator gets a copy."""
        answer = self._simulator.step(action.copy())
        if isinstance(answer, StepResult) or (isinstance(answer, (tuple, list)) and len(answer) == 2):
            reward, *flags = _as_number(answer[0]), *map(_as_flag, answer[1:])
            if reward is not None and None not in flags:
                terminated, truncated, is_success = flags if len(flags) == 3 else (flags[0], False, flags[0])
                return StepResult(reward, bool(terminated), bool(truncated), bool(is_success))
        raise broken(f"{self._name}.step", "returned", answer, "(reward, is_solved), a number and a bool")

    def observe(self) -> NDArray[np.float32]:
        """Return a copy of the `state` observation, [D]."""
        answer, shape = self._simulator.observe(), self.spec.state_shape
        state = _as_array(answer)
        if state is None or state.dtype.kind not in _REAL or state.shape != shape:
            raise broken(f"{self._name}.observe", "returned", answer, f"numbers of shape {shape}, as in its spec")
        return np.array(state, np.float32)

    def render(self) -> dict[str, NDArray[Any]]:
        """Return copies of what the cameras see."""
        method, answer, shapes = f"{self._name}.render", self._simulator.render(), self.spec.rendered
        if not isinstance(answer, Mapping) or set(answer) != set(shapes):
            raise broken(method, "returned", answer, f"a dictionary of {sorted(shapes)}")
        rendered = {}
        for kind, by_camera in shapes.items():
            shape = (len(by_camera), *next(iter(by_camera.values())))
            values, dtype = _as_array(answer[kind]), KINDS[kind].dtype
            is_alike = values is not None and values.dtype.kind == np.dtype(dtype).kind  # any float will do
            if values is None or values.shape != shape or not is_alike:
                raise broken(method, f"returned as {kind}", answer[kind], f"{dtype} of shape {shape}")
            rendered[kind] = np.array(values, dtype)
        return rendered


def check_spec(spec: Any, owner: str) -> EnvSpec:
    """Return a copy of a spec, its sizes as plain ints.

    Args:
        spec: What came from elsewhere.
        owner: Whose it is, as messages name it.

    Raises:
        ContractError: It is no `EnvSpec`, or something in it cannot be.
    """
    if not isinstance(spec, EnvSpec):
        raise broken(f"{owner}.spec", "is", spec, "an asyncflow.envs.base.EnvSpec")
    obs = {key: _check_field(key, field, f"{owner}.spec.obs") for key, field in spec.obs.items()}
    if STATE not in obs or len(obs[STATE].shape) not in (1, 2):
        raise broken(f"{owner}.spec.obs", "is", spec.obs, "`state` with a shape (D,) in it")
    if not isinstance(spec.env_meta, dict):
        raise broken(f"{owner}.spec.env_meta", "is", spec.env_meta, "a dictionary, which may be empty")
    checked = replace(
        spec,
        obs=obs,
        action_dim=_check_size(spec.action_dim, f"{owner}.spec.action_dim"),
        horizon=_check_size(spec.horizon, f"{owner}.spec.horizon"),
        obs_keys=_check_tuple(spec.obs_keys, f"{owner}.spec.obs_keys", str, "names"),
        obs_widths=_check_tuple(spec.obs_widths, f"{owner}.spec.obs_widths", int, "whole numbers"),
        action_low=_check_tuple(spec.action_low, f"{owner}.spec.action_low", float, "numbers"),
        action_high=_check_tuple(spec.action_high, f"{owner}.spec.action_high", float, "numbers"),
    )
    try:
        json.dumps(asdict(checked))
    except (TypeError, ValueError) as error:
        raise ContractError(f"{owner}.spec cannot be written as JSON, as policy files do: {error}") from None
    return deepcopy(checked)


def _check_simulator_spec(simulator: Any, name: str) -> EnvSpec:
    spec = check_spec(getattr(simulator, "spec", None), name)
    if list(spec.shapes(VECTOR)) != [STATE] or len(spec.state_shape) != 1:
        raise broken(f"{name}.spec.obs", "is", spec.obs, "`state` of shape (D,), and what cameras yield, alone")
    return spec


def _check_room(spec: EnvSpec, kind: str, room: Shape, owner: str) -> None:
    shapes = list(spec.shapes(kind).values())
    if shapes != [tuple(room[1:])] * room[0]:
        keys = f"env.{KINDS[kind].key} and env.{KINDS[kind].size_key}"
        expected = f"{room[0]} of shape {tuple(room[1:])}" if room[0] else "none"
        raise ContractError(f"{owner}.spec has {kind} of shapes {shapes}; expected {expected}, by {keys}")


def _check_field(key: Any, field: Field, what: str) -> Field:
    """Return a field with its sizes as plain ints."""
    if not isinstance(key, str) or not isinstance(field.shape, (tuple, list)):
        raise broken(what, f"has for {key}", field.shape, "a name and a shape, a tuple of sizes")
    shape = tuple(_check_size(size, f"{what}[{key!r}]") for size in field.shape)
    if field.kind == INDEX and (key, shape, field.dtype) == (TASK, (), "int64"):
        return Field(INDEX, (), "int64")
    is_named = field.kind == VECTOR or (field.kind in KINDS and key.startswith(field_key(field.kind, "")))
    if not is_named:
        raise broken(what, f"has for {key} the kind", field.kind, f"{VECTOR}, or for KIND.NAME one of {list(KINDS)}")
    kind = KINDS.get(field.kind)
    dtype = "float32" if kind is None else kind.dtype
    if field.dtype != dtype:
        raise broken(what, f"has for {key} the dtype", field.dtype, dtype)
    if kind is not None and not kind.fits(shape):
        raise broken(what, f"has for {key}", shape, kind.described)
    return Field(field.kind, shape, field.dtype)


def _check_tuple(values: Any, what: str, kind: Callable[[Any], Any], expected: str) -> tuple[Any, ...]:
    """Return values of numpy, too, as plain ones of a kind."""
    try:
        if not isinstance(values, str):
            return tuple(kind(value) for value in values)
    except (TypeError, ValueError):
        pass
    raise broken(what, "is", values, f"a tuple of {expected}")


def _check_size(size: Any, what: str) -> int:
    if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
        raise broken(what, "has", size, "a whole number of at least 1")
    return int(size)


def _as_array(value: Any) -> NDArray[Any] | None:
    """Return a value as an array; None where it is none, such as a tensor with a gradient or on a GPU."""
    try:
        return np.asarray(value)
    except Exception:  # whatever a class of another package raises
        return None


def _as_number(value: Any) -> float | None:
    if isinstance(value, numbers.Real):
        return float(value)
    array = _as_array(value)
    return float(array) if array is not None and array.shape == () and array.dtype.kind in _REAL else None


def _as_flag(value: Any) -> bool | None:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    number = _as_number(value)
    return bool(number) if number in (0.0, 1.0) else None
