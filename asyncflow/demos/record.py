"""Demonstrations by scripted experts, written in robomimic's HDF5 layout.

This file records the episodes and writes the dataset.

Shapes: L recorded steps of one demonstration, A action size.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np

from asyncflow.config.controllers import find_action_limits, name_robots
from asyncflow.config.observations import IMAGES, asked_cameras
from asyncflow.config.sections import EnvConfig
from asyncflow.config.task_table import TASKS
from asyncflow.config.tasks import load_env_meta, resolve_task
from asyncflow.demos.experts import EXPERTS, Array, Expert, Obs
from asyncflow.demos.recorded import RECORDED, SETTINGS_KEY
from asyncflow.errors import ConfigError, EnvError
from asyncflow.files import check_output, publish_file, temporary_name
from asyncflow.seeding import derive_seed
from asyncflow.simulators.robosuite.simulator import RobosuiteSimulator

MAX_STEPS = 150
MAX_FAILURES_PER_DEMO = 20
VALID_FRACTION = 0.1


class Simulator(Protocol):
    """The environment that recording needs; observations are robomimic's, by name.

    An episode is a function of its seed and its actions, so that it can be played again.
    """

    env_meta: dict[str, Any]
    has_cameras: bool

    def reset(self, seed: int) -> Obs:
        """Start an episode."""

    def step(self, action: Array) -> tuple[Obs, float, bool]:
        """Execute one action; return the observation, the reward and whether the task is solved."""

    def render(self) -> Obs:
        """Return what the cameras see now; asked for only where there are any."""

    def model(self) -> str:
        """Return the scene's XML."""

    def state(self) -> Array:
        """Return the flattened simulator state."""

    def close(self) -> None:
        """Free the simulator."""


class RobomimicSimulator:
    """A `Simulator` around `RobosuiteSimulator`, with all that robomimic observes: few numbers, images and clouds."""

    def __init__(self, env_config: EnvConfig, seed: int) -> None:
        """Construct the simulator; `seed` decides what it keeps for good, such as the cube's size."""
        self._env = RobosuiteSimulator(resolve_task(env_config), seed)
        self._cameras = asked_cameras(env_config)
        self.has_cameras = bool(self._cameras)
        self.env_meta = deepcopy(self._env.spec.env_meta)
        if self._env.spec.rendered_with:
            self.env_meta[SETTINGS_KEY] = self._env.spec.rendered_with
        if IMAGES in self._cameras:  # as robomimic writes it
            height, width = env_config.camera_size
            sizes = {"camera_heights": height, "camera_widths": width}
            self.env_meta["env_kwargs"] |= {"camera_names": list(self._cameras[IMAGES]), **sizes}

    def reset(self, seed: int) -> Obs:
        """Start an episode."""
        self._env.reset(seed)
        return dict(self._env.observe_all())

    def step(self, action: Array) -> tuple[Obs, float, bool]:
        """Execute one action."""
        reward, is_success = self._env.step(action)
        return dict(self._env.observe_all()), reward, is_success

    def render(self) -> Obs:
        """Return what cameras see, by the names and in the shapes that datasets have."""
        rendered = self._env.render()
        return {
            camera + RECORDED[kind].suffix: RECORDED[kind].store(seen)
            for kind, cameras in self._cameras.items()
            for camera, seen in zip(cameras, rendered[kind], strict=True)
        }

    def model(self) -> str:
        """Return the scene's XML."""
        return str(self._env.env.sim.model.get_xml())

    def state(self) -> Array:
        """Return the flattened simulator state."""
        return np.array(self._env.env.sim.get_state().flatten())

    def close(self) -> None:
        """Free the simulator."""
        self._env.close()


@dataclass(frozen=True)
class DemoOptions:
    """Settings of collecting demonstrations.

    Attributes:
        num_demos: Successful demonstrations to write.
        seed: Seed of start states and noise.
        action_noise: Standard deviation of the normal noise on every action dimension.
        grasp_offset: Metres along x by which the expert misjudges the object, as a badly calibrated camera would.
        overwrite: Replace an existing file.
    """

    num_demos: int = 10
    seed: int = 0
    action_noise: float = 0.15
    grasp_offset: float = 0.0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.num_demos < 1:
            raise ConfigError(f"--num-demos {self.num_demos}: must be at least 1")
        if not 0 <= self.action_noise < math.inf:
            raise ConfigError(f"--action-noise {self.action_noise}: must be a finite number, and not negative")
        if not math.isfinite(self.grasp_offset):
            raise ConfigError(f"--grasp-offset {self.grasp_offset}: must be a finite number")


@dataclass(frozen=True)
class DemoResult:
    """Result of collecting demonstrations.

    Attributes:
        path: The dataset.
        num_demos: Successful demonstrations in it.
        num_failures: Attempts that did not solve the task and were left out.
        num_steps: Env steps in the dataset.
        wall_s: Seconds it took.
    """

    path: Path
    num_demos: int
    num_failures: int
    num_steps: int
    wall_s: float


@dataclass
class _Demo:
    """One recorded episode; lists have one entry a step."""

    seed: int
    model: str
    obs: list[Obs] = field(default_factory=list)
    actions: list[Array] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    states: list[Array] = field(default_factory=list)
    is_success: bool = False


def collect_demos(
    env_config: EnvConfig,
    out: str | Path,
    options: DemoOptions,
    make_simulator: Callable[[EnvConfig, int], Simulator] = RobomimicSimulator,
    on_progress: Callable[[int], None] = lambda _: None,
) -> DemoResult:
    """Record demonstrations and write the dataset in one step; failed attempts are repeated with another seed.

    Args:
        env_config: The task and how it is simulated.
        out: The HDF5 file to write.
        options: How many, and how noisy.
        make_simulator: Builds the environment from its configuration and a seed.
        on_progress: Called with the number of finished demonstrations.

    Raises:
        ConfigError: The task has no scripted expert, or the file exists and `overwrite` is false.
        EnvError: The expert failed too often, or an episode that is played again for the cameras goes otherwise.
    """
    start = time.perf_counter()
    out = Path(out)
    make_expert = _find_expert(env_config)
    check_output(out, options.overwrite, inputs=[env_config.env_meta_file])
    simulator = make_simulator(env_config, derive_seed(options.seed, "simulator", 0))
    try:
        demos, num_failures = _collect(simulator, make_expert, options, on_progress)
    finally:
        simulator.close()
    write_dataset(out, demos, simulator.env_meta)
    num_steps = sum(len(demo.actions) for demo in demos)
    return DemoResult(out, len(demos), num_failures, num_steps, time.perf_counter() - start)


def _find_expert(env_config: EnvConfig) -> Callable[[float], Expert]:
    task = resolve_task(env_config).task.env_name if env_config.env_meta else env_config.task_label
    if task not in EXPERTS:
        raise ConfigError(f"env.task = {task}: no scripted expert; tasks that have one: {', '.join(EXPERTS)}")
    if env_config.env_meta:
        _check_controller(load_env_meta(env_config.env_meta)["env_kwargs"], task, env_config.env_meta_file)
    return EXPERTS[task]


def _check_controller(env_kwargs: dict[str, Any], task: str, path: str | None) -> None:
    """Refuse a controller that executes an expert's actions otherwise than it means them."""
    size = TASKS[task].action_dim
    limits = find_action_limits(env_kwargs.get("controller_configs"), name_robots(env_kwargs), size)
    if limits != ((-1.0,) * size, (1.0,) * size):
        raise ConfigError(
            f"env.env_meta{f' = {path}' if path else ''}: the scripted expert needs a controller of deltas in [-1, 1]"
        )


def _collect(
    simulator: Simulator,
    make_expert: Callable[[float], Expert],
    options: DemoOptions,
    on_progress: Callable[[int], None],
) -> tuple[list[_Demo], int]:
    """Return successful demonstrations and the number of failed attempts."""
    demos: list[_Demo] = []
    num_failures = 0
    while len(demos) < options.num_demos:
        demo = _record(simulator, make_expert(options.grasp_offset), options, attempt=len(demos) + num_failures)
        if demo.is_success:
            if simulator.has_cameras:
                _film(simulator, demo)
            demos.append(demo)
            on_progress(len(demos))
            continue
        num_failures += 1
        if num_failures > MAX_FAILURES_PER_DEMO * options.num_demos:
            raise EnvError(
                f"the scripted expert failed {num_failures} times and succeeded {len(demos)} times; "
                f"lower --action-noise {options.action_noise} or --grasp-offset {options.grasp_offset}"
            )
    return demos, num_failures


def _record(simulator: Simulator, expert: Expert, options: DemoOptions, attempt: int) -> _Demo:
    """Play one episode until success or MAX_STEPS."""
    rng = np.random.default_rng(derive_seed(options.seed, "demo_noise", attempt))
    seed = derive_seed(options.seed, "demo", attempt)
    obs = simulator.reset(seed)
    demo = _Demo(seed, simulator.model(), obs=[obs])
    while len(demo.actions) < MAX_STEPS and not demo.is_success:
        action = expert.act(obs)
        action = np.clip(action + options.action_noise * rng.standard_normal(action.shape), -1, 1)
        demo.states.append(simulator.state())
        obs, reward, demo.is_success = simulator.step(action)
        demo.actions.append(action)
        demo.rewards.append(reward)
        demo.obs.append(obs)
    return demo


def _film(simulator: Simulator, demo: _Demo) -> None:
    """Play a demonstration again and add what cameras see; attempts that fail are thus never rendered.

    Raises:
        EnvError: It does not go as it did before.
    """
    simulator.reset(demo.seed)
    demo.obs[0] |= simulator.render()
    for obs, action, state in zip(demo.obs[1:], demo.actions, demo.states, strict=True):
        if not np.array_equal(simulator.state(), state):
            raise EnvError("a demonstration that was played again for the cameras did not go as before")
        simulator.step(action)
        obs.update(simulator.render())


def write_dataset(out: Path, demos: list[_Demo], env_meta: dict[str, Any]) -> None:
    """Write robomimic's layout under a temporary name, then rename it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(out)
    try:
        with h5py.File(temporary, "w") as file:
            data = file.create_group("data")
            data.attrs["env_args"] = json.dumps(env_meta)
            data.attrs["total"] = sum(len(demo.actions) for demo in demos)
            for index, demo in enumerate(demos):
                _write_demo(data.create_group(f"demo_{index}"), demo)
            _write_masks(file.create_group("mask"), len(demos))
        publish_file(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def _write_demo(group: h5py.Group, demo: _Demo) -> None:
    num_samples = len(demo.actions)
    group.attrs["num_samples"] = num_samples
    group.attrs["model_file"] = demo.model
    group["actions"] = np.stack(demo.actions)
    group["rewards"] = np.array(demo.rewards)
    group["dones"] = (np.arange(num_samples) == num_samples - 1).astype(np.int64)
    group["states"] = np.stack(demo.states)
    for key in demo.obs[0]:
        values = np.stack([obs[key] for obs in demo.obs])
        group[f"obs/{key}"] = values[:-1]
        group[f"next_obs/{key}"] = values[1:]


def _write_masks(group: h5py.Group, num_demos: int) -> None:
    """Hold out the last demonstrations for validation: a tenth, and one at least if there are two."""
    num_valid = max(1, round(VALID_FRACTION * num_demos)) if num_demos > 1 else 0
    names = np.array([f"demo_{index}" for index in range(num_demos)], dtype="S")
    group["train"] = names[: num_demos - num_valid]
    group["valid"] = names[num_demos - num_valid :]
