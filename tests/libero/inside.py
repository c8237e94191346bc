"""What the tests of this folder run under LIBERO's own interpreter: `python inside.py FUNCTION TASK`; prints JSON."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from asyncflow.config.libero import ARM_KEYS, CAMERAS, list_tasks
from asyncflow.config.observations import Field
from asyncflow.config.simulator_settings import SimulatorSettings
from asyncflow.config.task_table import Task
from asyncflow.simulators.libero.scene import import_libero
from asyncflow.simulators.libero.simulator import SETTLE, LiberoSimulator, axis_angle
from asyncflow.simulators.robosuite.simulator import quiet

import_libero()
from libero.libero.envs import OffScreenRenderEnv  # noqa: E402  quietly, once that has been set up
from robosuite.utils.transform_utils import quat2axisangle  # noqa: E402

SEED, SIZE, NUM_STEPS_WAIT = 7, 64, 10
ACTIONS = np.random.default_rng(0).uniform(-1.0, 1.0, (30, 7))
ACTIONS[:, 2] -= 0.5  # down, to touch


def make_settings(task: str, sees: bool = True) -> SimulatorSettings:
    (found,) = list_tasks(task)
    rendered = {f"images.{camera}": Field("images", (3, SIZE, SIZE), "uint8") for camera in CAMERAS if sees}
    own = Task(task, found.horizon, "", (*ARM_KEYS, "object"))
    return SimulatorSettings(own, found.horizon, own.obs_keys, rendered=rendered, camera_size=(SIZE, SIZE))


class Benchmark:
    """The benchmark's own environment, used as the published evaluations use it: newly built, with hard resets."""

    def __init__(self, task: str) -> None:
        (found,) = list_tasks(task)
        with quiet():
            suite = import_libero()[found.suite]()
            file = suite.get_task_bddl_file_path(found.number)
            self.env = OffScreenRenderEnv(bddl_file_name=file, camera_heights=SIZE, camera_widths=SIZE)
            self.states = suite.get_task_init_states(found.number)
            self.instruction = suite.get_task(found.number).language

    def reset(self, seed: int, num_steps_wait: int) -> None:
        with quiet():
            self.env.seed(seed)
            self.env.reset()
        self.obs = self.env.set_init_state(self.states[seed % len(self.states)])
        for _ in range(num_steps_wait):
            self.step(SETTLE)

    def step(self, action: Any) -> tuple[float, bool]:
        self.obs, reward, is_solved, _ = self.env.step(action)
        return reward, bool(is_solved)

    def simulator_state(self) -> Any:
        return self.env.get_sim_state()

    def images(self) -> Any:
        turned = [self.obs[f"{camera}_image"][::-1, ::-1] for camera in CAMERAS]
        return np.stack([image.transpose(2, 0, 1) for image in turned])


def run(simulator: LiberoSimulator, seed: int) -> list[Any]:
    simulator.reset(seed)
    return play(simulator)


def play(simulator: Any) -> list[Any]:
    """Return reward, success and state at the start and after each action."""
    start = (0.0, False, simulator.simulator_state().tolist())
    return [start, *((*simulator.step(action), simulator.simulator_state().tolist()) for action in ACTIONS)]


def is_same_observation(simulator: LiberoSimulator, own: dict[str, Any]) -> bool:
    """Whether every vector that the benchmark observes is the simulator's, too, and the state is made of them."""
    obs = simulator.observe_all()
    parts = [own["robot0_eef_pos"], axis_angle(own["robot0_eef_quat"]), own["robot0_gripper_qpos"], own["object-state"]]
    are_same = all(np.array_equal(obs[key], own[key]) for key in obs if key in own)
    return are_same and np.array_equal(simulator.observe(), np.concatenate(parts).astype(np.float32))


def compare(task: str) -> dict[str, bool]:
    """Compare a task's simulator with the benchmark, and with itself."""
    plain = LiberoSimulator(replace(make_settings(task, sees=False), fast_step=False), seed=1)
    plain.reset(SEED + 2)  # whose scene the next one copies, as it is now
    simulator, own = LiberoSimulator(make_settings(task), 0), Benchmark(task)
    own.reset(SEED, NUM_STEPS_WAIT)
    own_first, own_first_images = own.obs, own.images()
    simulator.reset(SEED)
    found = {
        "the first observation": is_same_observation(simulator, own_first),
        "the first images": np.array_equal(simulator.render()["images"], own_first_images),
        "the instruction": simulator.instruction == own.instruction,
        "50 initial states": len(simulator.initial_states) == 50
        and np.array_equal(simulator.initial_states, own.states),
    }
    own_steps = play(own)
    steps = run(simulator, SEED)
    found["every state, reward and success"] = steps == own_steps
    found["the last observation"] = is_same_observation(simulator, own.obs)
    images = simulator.render()["images"]
    found["the last images"] = np.array_equal(images, own.images())
    found["another seed is another episode"] = run(simulator, SEED + 1) != steps
    found["the episode again"] = run(simulator, SEED) == steps
    found["the images again"] = np.array_equal(simulator.render()["images"], images)
    simulator.close()
    found["without a renderer and the fast step"] = run(plain, SEED) == steps
    return found


def initial(task: str) -> dict[str, bool]:
    """Without settling, the simulator is in the initial state that its seed means, as the benchmark sets it."""
    simulator, own = LiberoSimulator(make_settings(task), 0, num_steps_wait=0), Benchmark(task)
    found = {}
    for seed in (0, 49, 50, 2**62 + 3):
        simulator.reset(seed)
        state = simulator.initial_states[seed % 50]
        found[f"state of seed {seed}"] = np.array_equal(
            simulator.simulator_state()[1:], state[1 : len(simulator.simulator_state())]
        )
    simulator.reset_to(3, 3)
    own.reset(3, 0)
    found["the observation"] = is_same_observation(simulator, own.obs)
    found["the images"] = np.array_equal(simulator.render()["images"], own.images())
    return found


def solve(task: str) -> dict[str, bool]:
    """Turn a knob by hand: both call it a success at the same step, and both show the burner's colour."""
    simulator, own = LiberoSimulator(make_settings(task), 0), Benchmark(task)
    own.reset(SEED, NUM_STEPS_WAIT)
    simulator.reset(SEED)
    found = {}
    before = simulator.render()["images"]
    for env in (simulator.env, own.env):
        env.env.object_states_dict["flat_stove_1"].set_joint(1.5)
    for step in range(3):
        answers = simulator.step(SETTLE), own.step(SETTLE)
        found[f"success at step {step}"] = answers[0] == answers[1] == (1.0, True)
        found[f"images at step {step}"] = np.array_equal(simulator.render()["images"], own.images())
    found["something is seen of it"] = not np.array_equal(before, simulator.render()["images"])
    simulator.reset(SEED)
    found["not after a reset"] = np.array_equal(before, simulator.render()["images"])
    return found


def obstacles(task: str) -> dict[str, bool]:
    """Where the fast step would not do what the benchmark's does, the benchmark's is taken, and a line says why."""
    plain = LiberoSimulator(make_settings(task, sees=False), 0)
    found = {"fast without a word": plain.notices == () and plain._step != plain._step_plainly}
    plain.env.env.robots[0].controller.uncoupling = False
    step, notices = plain._find_step(is_fast=True)
    found["another controller"] = step == plain._step_plainly and "OSC_POSE" in notices[0] and len(notices) == 1
    plain.env.env.robots[0].controller.uncoupling = True
    plain.env.sim.model._model.opt.integrator = 1  # RK4
    found["another integrator"] = "integrator" in plain._find_step(is_fast=True)[1][0]
    found["as it is asked"] = plain._find_step(is_fast=False) == (plain._step_plainly, ())
    return found


def draws(task: str) -> dict[str, bool]:
    """numpy's global generator is left as it was, and is not read by a step."""
    before = np.random.get_state()[1].tolist()
    simulator = LiberoSimulator(make_settings(task, sees=False), 0)
    run(simulator, SEED)
    found = {"the generator": before == np.random.get_state()[1].tolist()}
    quaternions = np.random.default_rng(0).normal(size=(50, 4))
    quaternions = [*(quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)), np.array([0.0, 0.0, 0.0, 1.0])]
    found["axis times angle"] = all(np.array_equal(axis_angle(q), quat2axisangle(q.copy())) for q in quaternions)
    return found


if __name__ == "__main__":
    print(json.dumps({key: bool(value) for key, value in globals()[sys.argv[1]](sys.argv[2]).items()}))
    sys.stdout.flush()
    os._exit(0)  # the benchmark frees its OpenGL contexts in an order that raises
