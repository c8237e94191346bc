"""One robosuite simulator, whose observations are named as robomimic names them.

It is built and seeded here, and its success and `state` vector are read. An episode is a function of the constructor's
seed, the episode's seed and the actions alone.

Shapes: A action size, D size of the `state` observation.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import logging
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Callable, Iterator

import numpy as np

from asyncflow.caches import prepare_caches
from asyncflow.config.controllers import name_robots
from asyncflow.config.env_meta import translate_kwargs
from asyncflow.config.observations import STATE
from asyncflow.config.simulator_settings import SimulatorSettings
from asyncflow.config.task_table import TASKS
from asyncflow.errors import ConfigError, EnvError
from asyncflow.simulators.robosuite.cameras import Cameras, choose_gl, import_robosuite
from asyncflow.simulators.robosuite.robosuite14 import (
    check_controllers,
    drawing_from,
    forget_grips,
    is_robosuite_14,
    load_controller,
    read_action_limits,
    translate_task,
)
from asyncflow.simulators.spec import EnvSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from asyncflow.config.task_table import Task


def preload() -> None:
    """Import what simulators need, and have numba load its functions: workers then share that memory.

    A simulator is built, stepped and thrown away for that. It has neither cameras nor a context of OpenGL.
    """
    prepare_caches()
    with quiet():
        import_robosuite()
    task = TASKS["Lift"]
    with contextlib.suppress(Exception):  # a worker that builds its own simulator says what is wrong
        warm = RobosuiteSimulator(SimulatorSettings(task, task.horizon, task.obs_keys), 0)
        warm.step(np.zeros(warm.spec.action_dim))
        warm.close()


def build(seed: int, settings: dict[str, Any]) -> RobosuiteSimulator:
    """Construct a simulator from settings as JSON holds them."""
    return RobosuiteSimulator(SimulatorSettings.from_json(settings), seed)


class RobosuiteSimulator:
    """A simulator that asks the simulation itself whether the task is solved.

    Attributes:
        env: robosuite's environment.
        spec: What a policy must fit.
        notices: What the user should know of how it is simulated, a line each.
    """

    def __init__(self, settings: SimulatorSettings, seed: int) -> None:
        """Construct the simulator; takes about a second.

        Args:
            settings: The task, from `asyncflow.config.tasks.resolve_task`.
            seed: Decides what an environment keeps for good, such as the size of Lift's cube.

        Raises:
            ConfigError: It lacks one of the `obs_keys` or cameras, nothing here can render, or robosuite cannot
                simulate what the `env_meta` describes.
        """
        if settings.rendering_key:
            choose_gl(settings.rendering_key)
        prepare_caches()
        with quiet():
            self._is_old = is_robosuite_14(import_robosuite())
            env_meta = settings.env_meta or build_env_meta(settings.task)
            with contextlib.nullcontext() if settings.env_meta is None else _refuse_description(env_meta["env_name"]):
                create, read_limits = (
                    (_create_14, read_action_limits) if self._is_old else (_create, _read_action_limits)
                )
                self.env = create(env_meta, seed)
                self._action_limits = read_limits(self.env)
                if settings.env_meta is not None:
                    self._draw(seed, lambda: _try_step(self.env, self._action_limits))
                self._raw_obs: dict[str, Any] = self._draw(seed, self.env.reset)
            self._obs_keys = settings.obs_keys
            self._step, self.notices = _find_step(self.env, settings.fast_step)
            self._cameras = Cameras(self.env.sim, settings) if settings.rendering_key else None
        low, high = self._action_limits.tolist()
        self.spec = EnvSpec(
            obs={STATE: self.observe().shape, **settings.rendered},
            action_dim=len(low),
            action_low=tuple(low),
            action_high=tuple(high),
            horizon=settings.horizon,
            env_meta=env_meta,
            obs_keys=settings.obs_keys,
            obs_widths=self._count_numbers(),
            rendered_with=settings.rendered_with,
            instruction=settings.instruction,
        )

    def reset(self, seed: int) -> None:
        """Start the episode that belongs to `seed`."""
        if self._is_old:
            forget_grips(self.env)
        else:
            # Placement samplers hold the generator itself, so its state is replaced, not the object.
            self.env.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        self._raw_obs = self._draw(seed, self.env.reset)

    def _draw(self, seed: int, reset: Callable[[], Any]) -> Any:
        """Call what draws; robosuite 1.4 does so from numpy's global generator."""
        with drawing_from(seed) if self._is_old else contextlib.nullcontext():
            return reset()

    def step(self, action: NDArray[Any]) -> tuple[float, bool]:
        """Execute one action, [A] clipped to the spec's limits; return its reward and whether the task is solved."""
        clipped = np.clip(np.asarray(action, np.float64), *self._action_limits)
        self._raw_obs, reward, _, _ = self._step(clipped)
        return float(reward), self._is_solved()

    def observe(self) -> NDArray[np.float32]:
        """Return the `state` observation after the last step, [D]."""
        obs = self.observe_all()
        missing = [key for key in self._obs_keys if key not in obs]
        if missing:
            raise ConfigError(
                f"env.obs_keys: the simulator has no {', '.join(missing)}; it has {', '.join(sorted(obs))}"
            )
        return np.concatenate([np.atleast_1d(obs[key]) for key in self._obs_keys], dtype=np.float32)

    def _count_numbers(self) -> tuple[int, ...]:
        """Return how many numbers each of the `obs_keys` has."""
        obs = self.observe_all()
        return tuple(np.size(obs[key]) for key in self._obs_keys)

    def render(self) -> dict[str, NDArray[Any]]:
        """Return what the cameras see after the last step, as `Cameras.render`.

        Raises:
            EnvError: It was built without cameras.
        """
        if self._cameras is None:
            raise EnvError("the simulator was built without cameras")
        return self._cameras.render()

    def observe_all(self) -> dict[str, NDArray[Any]]:
        """Return every observation after the last step, as robomimic names them: `object`, and each robot's own."""
        prefixes = tuple(robot.robot_model.naming_prefix for robot in self.env.robots)
        own = {key: np.array(value) for key, value in self._raw_obs.items() if key.startswith(prefixes)}
        parts = {key: value for key, value in own.items() if not key.endswith("proprio-state")}
        return {"object": np.array(self._raw_obs["object-state"]), **parts}

    def _is_solved(self) -> bool:
        answer = self.env._check_success()
        return bool(answer["task"] if isinstance(answer, dict) else answer)

    def simulator_state(self) -> NDArray[np.float64]:
        """Return MuJoCo's state as one vector, as robomimic's datasets store it; `get_state` would write XML files."""
        state: NDArray[np.float64] = self.env.sim.get_state().flatten()
        return state

    def close(self) -> None:
        """Free the simulator's memory; may be called twice."""
        if self._cameras is not None:
            self._cameras.close()
        if self.env is not None:
            self.env.close()
            self.env = self._step = None


_AS_ROBOMIMIC = {
    "has_renderer": False,
    "has_offscreen_renderer": False,
    "use_camera_obs": False,
    "camera_depths": False,
    "use_object_obs": True,
    "ignore_done": True,
}


def build_env_meta(task: Task) -> dict[str, Any]:
    """Return robomimic's description of a task: sparse reward, 20 Hz, robosuite's default arm controller."""
    with quiet():
        robosuite = import_robosuite()
        if is_robosuite_14(robosuite):
            controller, env_kwargs = load_controller(), translate_task(task.env_kwargs)
        else:
            controller, env_kwargs = _load_controller(task.robots[0]), task.env_kwargs
    return {
        "env_name": task.env_name,
        "env_version": robosuite.__version__,
        "type": 1,  # robomimic's EnvType.ROBOSUITE_TYPE
        "env_kwargs": {
            "robots": list(task.robots),
            "controller_configs": controller,
            "control_freq": 20,
            "reward_shaping": False,
            **env_kwargs,
        },
    }


def _load_controller(robot: str) -> Any:
    from robosuite.controllers import load_composite_controller_config  # noqa: PLC0415  seconds

    return load_composite_controller_config(controller="BASIC", robot=robot)


def _create(env_meta: dict[str, Any], seed: int) -> Any:
    """Build the environment of robosuite 1.5."""
    kwargs = translate_kwargs(deepcopy(env_meta))
    return _make(env_meta["env_name"], {**kwargs, "seed": seed})


def _create_14(env_meta: dict[str, Any], seed: int) -> Any:
    """Build the environment of robosuite 1.4, whose controllers are taken as they are."""
    kwargs = translate_kwargs(deepcopy(env_meta), is_converted=False)
    check_controllers(kwargs)
    with drawing_from(seed):
        return _make(env_meta["env_name"], kwargs)


def _make(env_name: str, kwargs: dict[str, Any]) -> Any:
    """Build an environment as robomimic's wrapper does, without its cameras."""
    import robosuite  # noqa: PLC0415  seconds

    _check_names(env_name, {key: value for key, value in kwargs.items() if key != "seed"})
    # A soft reset takes 1 ms instead of 100 and still draws everything anew but the objects' sizes.
    env = robosuite.make(env_name, **{**kwargs, **_AS_ROBOMIMIC, "hard_reset": False})
    for name in env.observation_names:
        if "joint_pos" in name or "eef_vel" in name:
            env.modify_observable(observable_name=name, attribute="active", modifier=True)
    return env


def _check_names(env_name: str, kwargs: dict[str, Any]) -> None:
    """Refuse robots and keywords that the installed robosuite does not have."""
    from robosuite.environments.base import REGISTERED_ENVS  # noqa: PLC0415
    from robosuite.robots import ROBOT_CLASS_MAPPING  # noqa: PLC0415

    for robot in name_robots(kwargs):
        if robot not in ROBOT_CLASS_MAPPING:
            known = ", ".join(ROBOT_CLASS_MAPPING)
            raise ConfigError(f"env_kwargs.robots: robosuite has no robot {robot!r}; robots: {known}")
    bases = REGISTERED_ENVS[env_name].__mro__ if env_name in REGISTERED_ENVS else ()
    keywords = {name for base in bases for name in inspect.signature(base.__init__).parameters} - {
        "self",
        "args",
        "kwargs",
    }
    for key in kwargs if keywords else ():
        if key not in keywords:
            near = difflib.get_close_matches(key, keywords, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; keywords: {', '.join(sorted(keywords))}"
            raise ConfigError(f"env_kwargs.{key}: {env_name} takes no such keyword{hint}")


@contextlib.contextmanager
def _refuse_description(env_name: str) -> Iterator[None]:
    """Make of what robosuite raises a refusal of the description; what the system raises stays its own."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"env.env_meta: {error}") from None
    except (OSError, MemoryError, ImportError):
        raise
    except Exception as error:
        said = " ".join(f"{type(error).__name__} {error}".split())
        raise ConfigError(
            f"env.env_meta: robosuite cannot simulate {env_name} with these env_kwargs: {said}"
        ) from error


def _try_step(env: Any, limits: NDArray[np.float64]) -> None:
    """Take a step from the middle of the limits: what every first step would raise shows before a run starts."""
    env.reset()
    obs, *_ = env.step(np.where(np.isfinite(limits).all(0), limits, 0.0).mean(0))
    broken = [key for key, value in obs.items() if not np.isfinite(value).all()]
    if broken:
        raise ConfigError(
            f"env_kwargs: after one step {broken[0]} is not finite; see gains and limits of the controller"
        )


def _read_action_limits(env: Any) -> NDArray[np.float64]:
    """Return the lowest and the highest action that a robosuite environment executes, [2, A].

    `action_spec` gives absolute targets the limits of deltas, to which robosuite does not clip them.
    """
    limits: NDArray[np.float64] = np.array(env.action_spec, np.float64)
    first = 0
    for robot in env.robots:
        is_whole_body = hasattr(
            robot.composite_controller, "joint_action_policy"
        )  # its inverse kinematics has no limit
        for part, (_, end) in robot._action_split_indexes.items() if not is_whole_body else ():
            controller = robot.part_controllers[part]
            if getattr(controller, "input_type", "delta") == "absolute" and controller.name != "IK_POSE":
                target = slice(first + end - len(controller.input_min), first + end)  # it comes after the gains
                limits[:, target] = [[-np.inf], [np.inf]]
        first += robot.action_dim
    return limits


def _find_step(env: Any, is_fast: bool) -> tuple[Any, tuple[str, ...]]:
    """Return what steps a robosuite environment, and a line about it if it is slower than it was asked to be."""
    if not is_fast:
        return env.step, ()
    if is_robosuite_14(import_robosuite()):
        return env.step, ("env.fast_step = true: robosuite's own step is taken, because robosuite is 1.4",)
    from asyncflow.simulators.robosuite.fast_step import FastStep  # noqa: PLC0415  imports robosuite

    fast = FastStep(env)
    slow = f"env.fast_step = true: robosuite's own step is taken, about half as fast, because {fast.obstacle}"
    return fast.step, (slow,) if fast.obstacle else ()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what robosuite prints and logs below the level of an error.

    robosuite stays quiet afterwards: it repeats its controller warnings at every reset.
    """
    logging.getLogger("robosuite_logs").addFilter(_is_error)  # adding the same filter twice adds it once
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
