"""One environment of gymnasium as a `Simulator`.

What gymnasium calls `terminated` ends an episode, and nothing bootstraps; `truncated` cuts it, and the value of its
true final observation bootstraps. Neither of them is a success: that is what `info` says.

Shapes: A action size, D size of the `state` observation.
"""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Iterator, Sequence

import numpy as np

from asyncflow.config.contracts import broken
from asyncflow.config.interpreters import how_to_install
from asyncflow.errors import ConfigError
from asyncflow.simulators.base import Simulator, StepResult
from asyncflow.simulators.spec import EnvSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUCCESS_KEYS = ("is_success", "success")  # of `info`, as gymnasium-robotics and Meta-World have them
PICTURE = 3  # dimensions of a space of uint8 that holds one


@dataclass(frozen=True)
class GymSettings:
    """Arguments of a `GymSimulator`, without its seed.

    Attributes:
        make_env: Makes one environment.
        horizon: Env steps until an episode is truncated; None means the environment's own time limit.
        obs_keys: Which parts of a `Dict` observation make the `state`; None means all.
        success_key: Key of `info` that tells whether the task is solved; None looks for one of `SUCCESS_KEYS`.
        task: As `EnvSpec.task`.
    """

    make_env: Callable[[], Any]
    horizon: int | None = None
    obs_keys: Sequence[str] | None = None
    success_key: str | None = None
    task: str = ""


def build(seed: int, env_id: str, horizon: int | None, obs_keys: list[str] | None, task: str) -> GymSimulator:
    """Make one environment of an id that an installed package registers; see `GymSettings`."""
    make = partial(make_registered, find_env(env_id))
    return GymSimulator(GymSettings(make, horizon, obs_keys, None, task), seed)


class GymSimulator(Simulator):
    """One environment of gymnasium, with continuous actions and vectors as observations.

    An episode is a function of its seed and its actions if the environment draws everything from the generator that
    `reset(seed=...)` seeds, as gymnasium asks of environments, and no wrapper keeps anything from earlier episodes, as
    `NormalizeObservation` does.

    Attributes:
        env: The environment.
        spec: What a policy must fit. `obs_keys` are the names of a `Dict` observation, nested ones with dots.
    """

    def __init__(self, settings: GymSettings, seed: int) -> None:
        """Make the environment, and try a reset from `seed` and a step.

        Raises:
            ConfigError: A space that asyncflow cannot use, no time limit, or an unknown observation.
            ContractError: `make_env` returned something else, or the environment does not keep gymnasium's interface.
        """
        gymnasium = import_gymnasium()
        self.env = settings.make_env()
        if not isinstance(self.env, gymnasium.Env):
            raise broken("make_env", "returned", self.env, "a gymnasium.Env, one environment and not several")
        self._name = str(self.env.unwrapped)
        self._action = _check_box(self.env.action_space, f"{self._name}: action_space", "continuous actions")
        boxes = dict(_name_boxes(self.env.observation_space, self._name))
        self._obs_keys = tuple(boxes if settings.obs_keys is None else settings.obs_keys)
        if unknown := [key for key in self._obs_keys if key not in boxes]:
            raise ConfigError(f"obs_keys: {self._name} observes no {unknown[0]!r}; it observes {', '.join(boxes)}")
        widths = tuple(math.prod(boxes[key].shape) for key in self._obs_keys)
        low, high = (np.float32(limit).ravel() for limit in (self._action.low, self._action.high))
        self._success_key = settings.success_key or self._try(seed)
        self.spec = EnvSpec(
            {"state": (sum(widths),)},
            action_dim=len(low),
            horizon=self._time_limit() if settings.horizon is None else settings.horizon,
            obs_keys=self._obs_keys,
            obs_widths=widths,
            action_low=tuple(map(float, low)),
            action_high=tuple(map(float, high)),
            task=settings.task,
            has_success=self._success_key is not None,
        )

    def reset(self, seed: int) -> None:
        """Start the episode that belongs to `seed`."""
        self._obs, _ = self._check_answer("reset", self.env.reset(seed=seed), 2)

    def step(self, action: NDArray[Any]) -> StepResult:
        """Execute one action, [A]."""
        space = self._action
        shaped = np.clip(action.astype(space.dtype).reshape(space.shape), space.low, space.high)
        answer = self._check_answer("step", self.env.step(shaped), 5)
        self._obs, reward, terminated, truncated, info = answer
        is_success = self._success_key is not None and bool(np.all(info.get(self._success_key, False)))
        return StepResult(reward, terminated, truncated, is_success)

    def observe(self) -> NDArray[np.float32]:
        """Return the `state` observation after the last step or reset, [D]."""
        parts = [np.ravel(_pick(self._obs, key)) for key in self._obs_keys]
        return np.concatenate(parts, dtype=np.float32)

    def _try(self, seed: int) -> str | None:
        """Take a step; return the key of `info` that tells success, None where there is none."""
        self.reset(seed)
        action = np.clip(0.0, self._action.low, self._action.high).astype(self._action.dtype)
        *_, info = self._check_answer("step", self.env.step(action), 5)
        return next((key for key in SUCCESS_KEYS if key in info), None)

    def _time_limit(self) -> int:
        spec = self.env.spec
        limit = spec.max_episode_steps if spec is not None else None
        if limit is None and self.env.has_wrapper_attr("_max_episode_steps"):  # of a TimeLimit put on by hand
            limit = self.env.get_wrapper_attr("_max_episode_steps")
        if limit is None:
            raise ConfigError(
                f"horizon = None: {self._name} has no time limit; set the env steps after which an episode is truncated"
            )
        return int(limit)

    def _check_answer(self, method: str, answer: Any, length: int) -> tuple[Any, ...]:
        if isinstance(answer, tuple) and len(answer) == length and isinstance(answer[-1], dict):
            return answer
        names = {2: "(obs, info)", 5: "(obs, reward, terminated, truncated, info)"}
        raise broken(f"{self._name}.{method}", "returned", answer, names[length])


def import_gymnasium() -> Any:
    """Import gymnasium, which is an optional extra.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module("gymnasium")
    except ImportError as error:
        mend = how_to_install("gymnasium")
        raise ConfigError(f"{sys.executable} cannot import gymnasium ({error}); run: {mend}") from None


def find_env(name: str) -> Any:
    """Return the `gymnasium.envs.registration.EnvSpec` of an id, whose module, as in `package:Name-v0`, is imported.

    Raises:
        ConfigError: There is no such environment, or what it needs is not installed; one line.
    """
    gymnasium, (module, _, env_id) = import_gymnasium(), name.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return gymnasium.spec(env_id)
    except (gymnasium.error.Error, ImportError) as error:
        raise ConfigError(f"gymnasium has no environment {name!r}: {_one_line(error)}") from None


def make_registered(env_spec: Any) -> Any:
    """Make what `find_env` found.

    Raises:
        ConfigError: It cannot be made, as where MuJoCo is missing.
    """
    gymnasium = import_gymnasium()
    try:
        return gymnasium.make(env_spec, disable_env_checker=True)  # asyncflow checks every answer itself
    except (gymnasium.error.Error, ImportError) as error:
        raise ConfigError(f"gymnasium cannot make {env_spec.id!r}: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _name_boxes(space: Any, owner: str, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, space) of every vector of an observation; that of a single one is `observation`."""
    spaces = import_gymnasium().spaces
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            yield from _name_boxes(part, owner, f"{name}.{key}" if name else str(key))
        return
    what = f"{owner}: observation_space" + (f" {name!r}" if name else "")
    box = _check_box(space, what, "vectors, or a Dict of them")
    if box.dtype == np.uint8 and len(box.shape) == PICTURE:
        raise ConfigError(f"{what} = {box} is a picture; write a Simulator whose `render` returns it as `images`")
    yield name or "observation", box


def _check_box(space: Any, what: str, expected: str) -> Any:
    if not isinstance(space, import_gymnasium().spaces.Box):
        raise ConfigError(f"{what} = {space}: expected {expected} (gymnasium.spaces.Box)")
    return space


def _pick(obs: Any, key: str) -> Any:
    """Return the part of an observation that a dotted name means."""
    if not isinstance(obs, dict):
        return obs
    if key in obs:
        return obs[key]
    first, _, rest = key.partition(".")
    return _pick(obs[first], rest)
