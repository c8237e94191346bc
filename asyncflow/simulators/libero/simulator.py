"""One task of LIBERO as a `Simulator`, with the conventions of published vision-language-action policies.

An episode is what the benchmark's own `OffScreenRenderEnv` gives when it is newly built, seeded, reset and set to one
of the task's initial states, bit for bit; only faster: the scene is loaded once, and cameras are rendered only when an
observation is asked for. It is a function of its seed and its actions alone.

LIBERO is imported where a simulator is built, which takes seconds.

Shapes: S size of MuJoCo's state, D size of the `state` observation, C cameras.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Callable

import numpy as np

from asyncflow.config.libero import DEFAULTS, LiberoTask, list_tasks
from asyncflow.config.observations import IMAGES, STATE
from asyncflow.config.simulator_settings import SimulatorSettings
from asyncflow.errors import ConfigError
from asyncflow.simulators.libero.scene import build_env, import_libero, name_package
from asyncflow.simulators.robosuite.cameras import Cameras, choose_gl
from asyncflow.simulators.robosuite.robosuite14 import drawing_from
from asyncflow.simulators.robosuite.simulator import quiet
from asyncflow.simulators.spec import EnvSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

ACTION_DIM = 7  # deltas of position (3) and rotation (3), and the gripper: -1 opens it, 1 closes it
SETTLE = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])  # what things fall under: hold still, open the gripper
_PLACES = (  # of the data, what the renderer reads
    "xpos", "xquat", "xmat", "xipos", "ximat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "cam_xpos",
    "cam_xmat", "light_xpos", "light_xdir",
)  # fmt: skip


def preload() -> None:
    """Import what simulators need."""
    import_libero()


def build(seed: int, settings: dict[str, Any], num_steps_wait: int, rotate_images: bool) -> LiberoSimulator:
    """Construct a simulator from settings as JSON holds them."""
    return LiberoSimulator(SimulatorSettings.from_json(settings), seed, num_steps_wait, rotate_images)


class LiberoSimulator:
    """A simulator of one task.

    Attributes:
        env: The benchmark's `ControlEnv`.
        spec: What a policy must fit.
        notices: What the user should know of how it is simulated, a line each.
        instruction: What the robot is told to do.
        initial_states: [spec.num_start_states, S], those that the benchmark keeps.
    """

    def __init__(
        self, settings: SimulatorSettings, seed: int, num_steps_wait: int = 10, rotate_images: bool = True
    ) -> None:
        """Construct the simulator; takes three seconds, most of them for MuJoCo to compile the scene.

        Args:
            settings: The task's name stands in `task.env_name`.
            seed: Decides nothing that outlasts a reset.
            num_steps_wait: Env steps with which an episode begins, which nobody sees: things fall into place.
            rotate_images: Whether images are turned by 180 degrees, as published policies were trained on them; else
                they are the benchmark's, whose first row is the lowest.

        Raises:
            ConfigError: LIBERO is not installed or cannot be imported; or it lacks one of the `obs_keys` or cameras, or
                nothing here can render.
        """
        if settings.rendering_key:
            choose_gl(settings.rendering_key)
        suites = import_libero()
        (task,) = list_tasks(settings.task.env_name)
        self._num_steps_wait, self._rotate_images, self._obs_keys = num_steps_wait, rotate_images, settings.obs_keys
        with quiet(), drawing_from(seed):
            suite = suites[task.suite]()
            self.instruction: str = suite.get_task(task.number).language
            self.initial_states: NDArray[np.float64] = np.asarray(suite.get_task_init_states(task.number), np.float64)
            self.env, self._loaded = build_env(suite.get_task_bddl_file_path(task.number))
        self._gripper_action = self.env.robots[0].gripper.current_action.copy()
        self.env.sim.reset = self._reload
        self._cameras = self._build_cameras(settings) if settings.rendering_key else None
        self._step, self.notices = self._find_step(settings.fast_step)
        self.reset(seed)
        self.spec = self._describe(settings, task)

    def reset(self, seed: int) -> None:
        """Start an episode from the initial state at `seed % num_start_states`."""
        self.reset_to(seed, seed % len(self.initial_states))

    def reset_to(self, seed: int, start_state: int) -> None:
        """Start an episode from one of the initial states; the seed decides where fixtures stand.

        Args:
            seed: As `ControlEnv.seed` takes it.
            start_state: Its place among the initial states.
        """
        with quiet(), drawing_from(seed):
            self.env.reset()
        self.env.set_init_state(self.initial_states[start_state])
        for _ in range(self._num_steps_wait):
            self.step(SETTLE)

    def step(self, action: NDArray[Any]) -> tuple[float, bool]:
        """Execute one action, [7] in [-1, 1]; return its reward and whether the task is solved now."""
        reward, is_solved = self._step(np.asarray(action, np.float64))
        return float(reward), is_solved

    def observe(self) -> NDArray[np.float32]:
        """Return the `state` observation after the last step or reset, [D]."""
        obs = self.observe_all()
        missing = [key for key in self._obs_keys if key not in obs]
        if missing:
            raise ConfigError(f"env.obs_keys: LIBERO has no {', '.join(missing)}; it has {', '.join(sorted(obs))}")
        return np.concatenate([np.atleast_1d(obs[key]) for key in self._obs_keys], dtype=np.float32)

    def observe_all(self) -> dict[str, NDArray[Any]]:
        """Return every vector after the last step: the robot's, its hand's rotation as axis times angle, `object`."""
        obs = self.env.env._get_observations()
        own = {key: np.array(value) for key, value in obs.items() if key.startswith("robot0_")}
        own.pop("robot0_proprio-state", None)
        rotation = axis_angle(obs["robot0_eef_quat"])
        return {"object": np.array(obs["object-state"]), "robot0_eef_axis_angle": rotation, **own}

    def render(self) -> dict[str, NDArray[Any]]:
        """Return what the cameras see, as `Cameras.render`; only a simulator with cameras is asked.

        The benchmark renders, and reads most of an observation, in one of the last of an env step's 25 substeps, and
        not after them. Published policies have learned from that, and it is what this shows.
        """
        assert self._cameras is not None  # the spec has some
        model, colours = self.env.sim.model, self.env.sim.model.site_rgba.copy()
        self._seen.show(self._data, model)
        rendered = self._cameras.render()
        model.site_rgba[:] = colours
        if IMAGES in rendered:
            upright = rendered[IMAGES]  # [C, 3, height, width]
            # The benchmark's first row is the lowest; half a turn makes it the highest, and mirrors the picture.
            rendered[IMAGES] = upright[..., ::-1] if self._rotate_images else upright[..., ::-1, :]
        return rendered

    def simulator_state(self) -> NDArray[np.float64]:
        """Return MuJoCo's state as one vector, as the initial states are: time, positions, velocities."""
        state: NDArray[np.float64] = self.env.get_sim_state()
        return state

    def close(self) -> None:
        """Free the simulator's memory; may be called twice."""
        if self._cameras is not None:
            self._cameras.close()
        if self.env is not None:
            self.env.close()
            self.env = None

    def _build_cameras(self, settings: SimulatorSettings) -> Cameras:
        """Create cameras that see what the benchmark's would have seen when it reads its observables."""
        from robosuite.utils.binding_utils import MjData  # noqa: PLC0415  seconds
        from robosuite.utils.observables import Observable, sensor  # noqa: PLC0415

        sim = self.env.sim
        self._data, self._seen = MjData(sim.model), Moment(sim)

        @sensor(modality="moment")  # type: ignore[untyped-decorator]
        def keep_moment(_: Any) -> float:
            self._seen.keep(sim)
            return 0.0

        rate = self.env.env.control_freq
        self.env.env.add_observable(Observable("moment", keep_moment, sampling_rate=rate, active=False))
        return Cameras(sim, settings, self._data)

    def _find_step(self, is_fast: bool) -> tuple[Callable[[NDArray[Any]], tuple[float, bool]], tuple[str, ...]]:
        """Return what executes an action, and a line about it if it is slower than it was asked to be."""
        if not is_fast:
            return self._step_plainly, ()
        from asyncflow.simulators.libero.fast_step import FastStep, find_obstacle  # noqa: PLC0415  imports LIBERO

        obstacle = find_obstacle(self.env.env)
        if obstacle is None:
            return FastStep(self.env.env).step, ()
        return self._step_plainly, (f"env.fast_step = true: LIBERO's own step is taken, because {obstacle}",)

    def _step_plainly(self, action: NDArray[Any]) -> tuple[float, bool]:
        _, reward, is_solved, _ = self.env.step(action)
        return reward, bool(is_solved)

    def _reload(self) -> None:
        """Leave the simulation as if its scene had just been loaded; robosuite's soft reset calls it.

        A hard reset, the benchmark's default, loads the scene again, which takes two seconds. A soft one would keep
        the gripper's last command, and would start MuJoCo's solver from another guess.
        """
        import mujoco  # noqa: PLC0415

        model, data = self.env.sim.model, self.env.sim.data
        for name, values in self._loaded.items():
            getattr(model, name)[:] = values
        mujoco.mj_resetData(model._model, data._data)
        mujoco.mj_forward(model._model, data._data)  # as a new simulation is
        mujoco.mj_forward(model._model, data._data)  # as a new rendering context does
        self.env.robots[0].gripper.current_action = self._gripper_action.copy()

    def _describe(self, settings: SimulatorSettings, task: LiberoTask) -> EnvSpec:
        obs, own = self.observe_all(), {"num_steps_wait": self._num_steps_wait, "rotate_images": self._rotate_images}
        return EnvSpec(
            {STATE: self.observe().shape, **settings.rendered},
            action_dim=ACTION_DIM,
            horizon=settings.horizon,
            env_meta={"env_name": task.name, "env_version": name_package()},
            obs_keys=settings.obs_keys,
            obs_widths=tuple(np.size(obs[key]) for key in settings.obs_keys),
            task=task.name,
            instruction=self.instruction,
            num_start_states=len(self.initial_states),
            rendered_with={**settings.rendered_with, **{key: own[key] for key in own if own[key] != DEFAULTS[key]}},
        )


class Moment:
    """What a picture of a simulation depends on: where everything is, and colours, such as those of a lit burner.

    robosuite's MuJoCo integrates after it has computed where everything is: the positions of joints do not tell it.
    """

    def __init__(self, sim: Any) -> None:
        self._places = {name: getattr(sim.data, name).copy() for name in _PLACES}
        self._colours = sim.model.site_rgba.copy()

    def keep(self, sim: Any) -> None:
        """Take over the present moment."""
        for name, values in self._places.items():
            values[:] = getattr(sim.data, name)
        self._colours[:] = sim.model.site_rgba

    def show(self, data: Any, model: Any) -> None:
        """Write it to data that nothing else uses, and to the model."""
        for name, values in self._places.items():
            getattr(data, name)[:] = values
        model.site_rgba[:] = self._colours


def axis_angle(quaternion: NDArray[Any]) -> NDArray[np.float64]:
    """Return a rotation as its axis times its angle, [3], of a quaternion [4], x y z w, as openpi and OpenVLA do."""
    x, y, z, w = map(float, quaternion)
    w = min(max(w, -1.0), 1.0)
    sine = math.sqrt(1.0 - w * w)
    if sine == 0.0:
        return np.zeros(3)
    return np.array([x, y, z]) * 2.0 * math.acos(w) / sine
