"""Behaviour cloning: a policy with a velocity field from a robomimic dataset, by flow matching.

Owns the reading of datasets and the supervised loop. It must not know where demonstrations
come from, nor about reinforcement learning; the critic and the learned noise stay as they were initialised.

Shapes: B chunks in a batch, M chunks in the dataset, L steps of one demonstration, P predicted actions (horizon),
A action size, D state size, Q points of a cloud.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import Tensor

from asyncflow.camera_data import read_clouds, read_images, take_point_settings
from asyncflow.config import Config, EnvConfig, PolicyConfig
from asyncflow.envs.base import EnvSpec
from asyncflow.envs.tasks import POINTS, TASKS, Task, check_env_meta, parse_env_meta
from asyncflow.errors import ConfigError
from asyncflow.examples import Examples, cut_chunks, cut_histories
from asyncflow.lerobot_folder import KIND as LEROBOT
from asyncflow.policies import Policy, make_policy
from asyncflow.policies.base import Normalizer
from asyncflow.policies.foreign import VELOCITY_METHODS
from asyncflow.policies.velocity import VelocityPolicy
from asyncflow.policy_file import check_output, save_policy
from asyncflow.presets import default_horizon
from asyncflow.seeding import derive_seed


@dataclass(frozen=True)
class PretrainOptions:
    """How a policy is trained on demonstrations.

    Attributes:
        num_steps: Optimiser steps.
        batch_size: Chunks in a batch, B, drawn with replacement.
        learning_rate: Adam step size.
        seed: Seed of the initial weights, the batches, the noise, the times and the shifts.
        max_shift: Pixels by which images are shifted at most, in either direction.
    """

    num_steps: int = 1000
    batch_size: int = 256
    learning_rate: float = 1e-3
    seed: int = 0
    max_shift: int = 4

    def __post_init__(self) -> None:
        if self.max_shift < 0:
            raise ConfigError(f"--max-shift {self.max_shift}: must not be negative")
        for name in ("num_steps", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {getattr(self, name)}: must be positive")


@dataclass(frozen=True)
class PretrainResult:
    """What pre-training did.

    Attributes:
        path: The policy file.
        num_demos: Demonstrations used.
        num_chunks: Chunks cut from them, one a step.
        first_loss: Mean flow matching loss of the first tenth of the steps.
        final_loss: Mean loss of the last tenth.
        wall_s: Seconds it took.
    """

    path: Path
    num_demos: int
    num_chunks: int
    first_loss: float
    final_loss: float
    wall_s: float


@dataclass(frozen=True)
class Demonstrations:
    """A dataset in memory.

    Attributes:
        env_meta: robomimic's description of the environment.
        horizon: Env steps until an episode of its task is truncated.
        obs_keys: The observations that `states` concatenates.
        states: One [L, D] float32 tensor a demonstration.
        actions: One [L, A] float32 tensor a demonstration.
        images: Camera -> one [L, 3, height, width] uint8 tensor a demonstration.
        points: Camera -> one [L, Q, 6] float32 tensor a demonstration.
        point_settings: As `EnvSpec.point_settings`.
    """

    env_meta: dict[str, Any]
    horizon: int
    obs_keys: tuple[str, ...]
    states: list[Tensor]
    actions: list[Tensor]
    images: dict[str, list[Tensor]] = field(default_factory=dict)
    points: dict[str, list[Tensor]] = field(default_factory=dict)
    point_settings: dict[str, Any] = field(default_factory=dict)


def pretrain(
    dataset: str | Path,
    out: str | Path,
    config: Config,
    options: PretrainOptions,
    on_progress: Callable[[int], None] = lambda _: None,
) -> PretrainResult:
    """Train a policy with a velocity field on a robomimic dataset and write it as a policy file.

    Args:
        dataset: HDF5 file in robomimic's layout.
        out: The policy file to write.
        config: `policy` says what to build, but for its `checkpoint`. `env` supplies `obs_keys` and `horizon`, both
            the task's own by default, `cameras`, `point_clouds` and `n_obs_steps`; the task itself, the size of images
            and how clouds are made are the dataset's.
        options: Length, batch and seed.
        on_progress: Called with the number of finished steps.

    Raises:
        ConfigError: The dataset cannot be used, `out` cannot be written, or the policy has no velocity field, names
            of its own, or a LeRobot folder.
    """
    start = time.perf_counter()
    check_output(Path(out))
    policy_config, env_config = config.policy, config.env
    if policy_config.kind == LEROBOT:
        raise ConfigError(
            f"policy.kind = {LEROBOT}: LeRobot itself trains its policies on demonstrations; see lerobot-train"
        )
    if policy_config.mapping.parts:
        raise ConfigError(f"{next(iter(policy_config.mapping.parts))}: pre-training is in the simulator's own names")
    demos = read_dataset(dataset, env_config)
    examples = make_examples(demos, env_config.n_obs_steps, policy_config.horizon)
    spec = _make_spec(demos).with_history(env_config.n_obs_steps)
    built = make_policy(policy_config, spec.obs_shapes, spec.action_dim, options.seed, spec.image_shapes)
    policy = _require_velocity(built, policy_config)
    fit_normalizers(policy, demos)
    losses = train_flow(policy, examples, options, on_progress)
    save_policy(out, policy, policy_config.model_copy(update={"checkpoint": None}), spec)
    tenth = max(1, len(losses) // 10)
    return PretrainResult(
        path=Path(out),
        num_demos=len(demos.states),
        num_chunks=len(examples),
        first_loss=losses[:tenth].mean().item(),
        final_loss=losses[-tenth:].mean().item(),
        wall_s=time.perf_counter() - start,
    )


def _require_velocity(policy: Policy, config: PolicyConfig) -> VelocityPolicy:
    """Return the policy, or refuse one that flow matching cannot train.

    Raises:
        ConfigError: It has no velocity field.
    """
    if isinstance(policy, VelocityPolicy):
        return policy
    is_foreign = config.kind == "vla"
    what = f"policy.vla.model_class = {config.vla.model_class}" if is_foreign else f"policy.kind = {config.kind}"
    raise ConfigError(
        f"{what}: has no velocity field, which pre-training needs; `flow` and `vla` have one, and a model from "
        f"elsewhere with the methods {', '.join(VELOCITY_METHODS)}"
    )


def _make_spec(demos: Demonstrations) -> EnvSpec:
    clouds = {POINTS + camera: tuple(points[0].shape[1:]) for camera, points in demos.points.items()}
    return EnvSpec(
        obs_shapes={"state": (demos.states[0].shape[1],), **clouds},
        action_dim=demos.actions[0].shape[1],
        horizon=demos.horizon,
        env_meta=demos.env_meta,
        obs_keys=demos.obs_keys,
        image_shapes={camera: tuple(images[0].shape[1:]) for camera, images in demos.images.items()},
        point_settings=demos.point_settings,
    )


def make_examples(demos: Demonstrations, n_obs_steps: int, horizon: int) -> Examples:
    """Return an example for every step of every demonstration."""
    return Examples(
        states=torch.cat(demos.states),
        images={camera: torch.cat(images) for camera, images in demos.images.items()},
        frames=cut_histories([len(states) for states in demos.states], n_obs_steps),
        chunks=cut_chunks(demos.actions, horizon),
        points={camera: torch.cat(points) for camera, points in demos.points.items()},
    )


def read_dataset(dataset: str | Path, env_config: EnvConfig) -> Demonstrations:
    """Load the low-dimensional observations and actions of every demonstration, and what the asked cameras saw.

    Raises:
        ConfigError: A missing file, not HDF5, not robomimic's layout, of another simulator, missing observations or
            actions, or no demonstrations.
    """
    path = Path(dataset)
    if not path.is_file():
        raise ConfigError(f"--dataset {path}: no such file")
    try:
        file = h5py.File(path, "r")
    except OSError:
        raise ConfigError(f"--dataset {path}: not an HDF5 file, or truncated") from None
    with file:
        try:
            return _read_demonstrations(file, env_config, path)
        except (OSError, KeyError, RuntimeError) as error:  # what h5py raises for damaged blocks and broken links
            raise ConfigError(f"--dataset {path}: damaged: {' '.join(str(error).split())}") from None


def _read_demonstrations(file: h5py.File, env_config: EnvConfig, path: Path) -> Demonstrations:
    env_meta = _read_env_meta(file, path)
    point_settings = take_point_settings(env_meta, env_config, f"--dataset {path}")
    names = sorted(file["data"], key=lambda name: (len(name), name))  # demo_2 before demo_10
    if not names:
        raise ConfigError(f"--dataset {path}: no demonstrations under `data`")
    task = _find_task(env_meta, env_config, path)
    obs_keys = tuple(env_config.obs_keys or task.obs_keys)
    groups = [file["data"][name] for name in names]
    for group in groups:
        _check_demo(group, obs_keys, path)
    states = [torch.cat([_read(group["obs"][key]) for key in obs_keys], dim=1) for group in groups]
    actions = [_read(group["actions"]) for group in groups]
    if len({(row.shape[1], action.shape[1]) for row, action in zip(states, actions, strict=True)}) > 1:
        raise ConfigError(f"--dataset {path}: demonstrations differ in the size of their observations or actions")
    images, points = _read_cameras(groups, env_config, point_settings, f"--dataset {path}")
    return Demonstrations(
        env_meta=env_meta,
        horizon=env_config.horizon or default_horizon(task),
        obs_keys=obs_keys,
        states=states,
        actions=actions,
        images=images,
        points=points,
        point_settings=point_settings,
    )


def _read_cameras(
    groups: list[h5py.Group], env_config: EnvConfig, point_settings: dict[str, Any], source: str
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Return images and point clouds by camera, one tensor a demonstration each."""
    images = {camera: [read_images(group, camera, source) for group in groups] for camera in env_config.cameras}
    if any(len({image.shape[1:] for image in images[camera]}) > 1 for camera in images):
        raise ConfigError(f"{source}: demonstrations differ in the size of their images")
    clouds = {
        camera: [read_clouds(group, camera, point_settings["num_points"], source) for group in groups]
        for camera in env_config.point_clouds
    }
    return images, clouds


def _find_task(env_meta: dict[str, Any], env_config: EnvConfig, path: Path) -> Task:
    """Return the dataset's task, or one made of the configuration's keys where asyncflow does not know it."""
    name = env_meta.get("env_name")
    for task in TASKS.values():
        if task.env_name == name:
            return task
    if env_config.horizon is None or env_config.obs_keys is None:
        raise ConfigError(f"--dataset {path}: asyncflow does not know {name}; set env.horizon and env.obs_keys")
    return Task(str(name), env_config.horizon, "described by a dataset", tuple(env_config.obs_keys))


def _read_env_meta(file: h5py.File, path: Path) -> dict[str, Any]:
    source = f"--dataset {path}"
    if not isinstance(file.get("data"), h5py.Group) or "env_args" not in file["data"].attrs:
        raise ConfigError(f"{source}: no attribute `env_args` on group `data`; not a robomimic dataset")
    source += ": attribute `env_args`"
    return check_env_meta(parse_env_meta(file["data"].attrs["env_args"], source), source)


def _check_demo(demo: Any, obs_keys: tuple[str, ...], path: Path) -> None:
    """Refuse a demonstration that lacks something, or whose arrays are not one row of numbers for each of its steps."""
    obs: Any = demo.get("obs") if isinstance(demo, h5py.Group) else None
    available = sorted(obs) if isinstance(obs, h5py.Group) else []
    missing = [key for key in obs_keys if key not in available]
    if missing:
        raise ConfigError(
            f"--dataset {path}: {demo.name} lacks the observations {', '.join(missing)}; "
            f"available: {', '.join(available) or 'none'} (env.obs_keys)"
        )
    if "actions" not in demo:
        raise ConfigError(f"--dataset {path}: {demo.name} lacks `actions`")
    arrays = [demo["actions"], *(obs[key] for key in obs_keys)]
    num_steps = {len(array) if _is_numeric(array) else 0 for array in arrays}
    if len(num_steps) > 1 or 0 in num_steps:
        raise ConfigError(
            f"--dataset {path}: {demo.name} must hold one row of numbers a step, in actions and obs alike"
        )


def _is_numeric(dataset: Any) -> bool:
    return isinstance(dataset, h5py.Dataset) and dataset.ndim > 0 and dataset.dtype.kind in "biuf"


def _read(dataset: h5py.Dataset) -> Tensor:
    """Return a dataset as [L, size] float32."""
    return torch.from_numpy(dataset[()]).float().reshape(len(dataset), -1)


def fit_normalizers(policy: VelocityPolicy, demos: Demonstrations) -> None:
    """Map the demonstrations' range of every dimension to [-1, 1].

    A model without asyncflow's `obs_normalizer` scales its inputs itself, and its actions are in the simulator's
    units; it is left as it is.
    """
    obs_normalizer, encoder = getattr(policy, "obs_normalizer", None), getattr(policy, "point_encoder", None)
    if not isinstance(obs_normalizer, Normalizer):
        return
    fitted = [(obs_normalizer, demos.states), (policy.action_normalizer, demos.actions)]
    if encoder is not None:
        fitted.append((encoder.normalizer, [part.flatten(0, 1) for part in chain(*demos.points.values())]))
    for normalizer, rows in fitted:
        values = torch.cat(rows)
        normalizer.set_range(values.amin(0), values.amax(0))


def train_flow(
    policy: VelocityPolicy, examples: Examples, options: PretrainOptions, on_progress: Callable[[int], None]
) -> Tensor:
    """Minimise the flow matching loss with Adam and return it for every step, [num_steps].

    Args:
        policy: Trained in place, on the CPU; only what its velocity depends on, and is not frozen, has a gradient.
        examples: What to train on.
        options: Length, batch and seed.
        on_progress: Called with the number of finished steps.
    """
    shifts = torch.Generator().manual_seed(derive_seed(options.seed, "random_shift"))
    generator = torch.Generator().manual_seed(derive_seed(options.seed, "pretrain"))
    optimizer = torch.optim.Adam(policy.actor_parameters(), lr=options.learning_rate)
    losses = torch.empty(options.num_steps)
    for step in range(options.num_steps):
        rows = torch.randint(len(examples), (options.batch_size,), generator=generator)
        noise = torch.randn((options.batch_size, *policy.sampler.chunk_shape), generator=generator)
        times = torch.rand(options.batch_size, generator=generator)
        obs = examples.observe(rows, shifts, options.max_shift)
        loss = policy.flow_matching_loss(obs, examples.chunks[rows], noise, times)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()
        on_progress(step + 1)
    return losses
