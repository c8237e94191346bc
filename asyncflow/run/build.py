"""Building a run: from a configuration, and a checkpoint where one goes on, to a `Trainer` and what evaluates it.

It finds a user's mistakes before simulators are built, and turns a `Config` into the arguments that a program of the
user's own would give.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from asyncflow.config.lerobot_folder import KIND as LEROBOT
from asyncflow.config.lerobot_folder import match_cameras, open_lerobot
from asyncflow.config.observations import STATE, VECTOR, Field
from asyncflow.config.sections import Config, EnvConfig, PolicyConfig
from asyncflow.config.tasks import check_cameras, is_described, resolve_task
from asyncflow.devices import check_compile, resolve_device
from asyncflow.envs.base import VecEnv
from asyncflow.envs.mapping import MappedVecEnv, NameMapping, check_names, map_names
from asyncflow.envs.source import adopt_environment
from asyncflow.envs.tasks import join_tasks
from asyncflow.policies import find_policy_code
from asyncflow.policies.policy_file import PolicyFile, check_saving
from asyncflow.ppo.advantages import make_estimator
from asyncflow.run.auxiliary import build_ppo, check_auxiliary
from asyncflow.run.checkpoint import Checkpoint
from asyncflow.run.folder import name_run_folder
from asyncflow.run.footprint import check_environments, check_rollouts
from asyncflow.run.parts import build_env, build_policy, read_start, settle_environment
from asyncflow.run.recipe import loop_arguments
from asyncflow.run.trainer import Trainer
from asyncflow.simulators.spec import EnvSpec


def check_start(config: Config) -> Path:
    """Find a user's mistakes before simulators are built, which takes seconds; return the run folder to create.

    Raises:
        ConfigError: The device, the task, its observations, the checkpoint or the policy cannot be had, the
            names in `policy.mapping` do not exist, or the folder already holds a run.
    """
    check_compile(config.policy.compile, resolve_device(config.trainer.device))
    make_estimator(config.algorithm)
    check_auxiliary(config)
    folder = name_run_folder(config)
    start = read_start(config)
    is_sized = is_described(config.env) and config.env.env_meta is None  # by the table of tasks, or the policy's file
    if start is not None:
        config = config.model_copy(update={"env": adopt_environment(config.env, start.env_spec)})
    check_cameras(config.env)
    spec = _foresee_spec(config, start)
    check_environments(config.env.num_envs, spec, is_described(config.env))
    check_rollouts(config, spec, resolve_device(config.trainer.device))
    if start is not None and config.env.env_meta is not None:
        has_widths = bool(start.env_spec.obs_widths) or config.policy.mapping.obs.state is None
        is_known = is_sized and spec.obs_keys == start.env_spec.obs_keys and has_widths
    else:
        is_known = is_sized
    if is_known or not config.policy.mapping.parts:
        mapping = NameMapping(config.policy.mapping, spec)
        if is_known:
            _check_folder(config.policy, mapping.spec)
        if find_policy_code(config.policy):
            build_policy(config, mapping, torch.device("cpu"))
    else:
        if is_described(config.env):  # only its simulator knows sizes
            check_names(config.policy.mapping, spec)
        find_policy_code(config.policy)
    return folder


def _check_folder(config: PolicyConfig, seen: EnvSpec) -> None:
    """Refuse a LeRobot folder that does not fit the environments; to build its model would take seconds."""
    if config.kind == LEROBOT:
        match_cameras(open_lerobot(config), config, seen.obs, seen.action_dim)


def _foresee_spec(config: Config, start: PolicyFile | None) -> EnvSpec:
    """Return what the environments will be like, as far as the configuration and the checkpoint say.

    Raises:
        ConfigError: Tasks observe or act otherwise than each other.
    """
    spec = EnvSpec({STATE: (1,)}, action_dim=1, horizon=1) if start is None else start.env_spec
    each = [_foresee_task(env, spec) for env in config.env.each_task()]
    return join_tasks(each, config.env.tasks) if config.env.tasks else each[0]


def _foresee_task(env: EnvConfig, spec: EnvSpec) -> EnvSpec:
    """Return what environments of one task will be like; `spec` is that of the checkpoint."""
    if not is_described(env):
        return spec
    settings = resolve_task(env)
    one_step = replace(
        spec,
        obs={STATE: Field(VECTOR, spec.state_shape[-1:]), **settings.rendered},
        obs_keys=settings.obs_keys,
        rendered_with=settings.rendered_with,
    )
    if env.env_meta is None:
        sizes = settings.task.obs_sizes()
        widths = tuple(sizes[key] for key in settings.obs_keys)
        one_step = replace(
            one_step,
            obs=one_step.obs | {STATE: Field(VECTOR, (sum(widths),))},
            obs_widths=widths,
            action_dim=settings.task.action_dim,
            action_low=(),
            action_high=(),
        )
    return one_step.with_history(env.n_obs_steps)


def build_trainer(config: Config, resumed: Checkpoint | None = None) -> Trainer:
    """Build the trainer of a run; its ring is not allocated yet.

    Args:
        config: The run.
        resumed: Where the run goes on.

    Raises:
        CheckpointError: The checkpoint does not fit the run.
        ConfigError: The device, the task or the checkpoint does not exist or does not fit, or memory does not suffice.
        EnvError: A simulator could not be built.
    """
    device = resolve_device(config.trainer.device)
    check_compile(config.policy.compile, device)
    torch.set_num_threads(config.trainer.num_threads)
    config = settle_environment(config, resumed)
    with ExitStack() as on_failure:
        env = build_env(config, "train", config.env.num_envs)
        on_failure.callback(env.close)
        mapping = NameMapping(config.policy.mapping, env.spec)
        policy = build_policy(config, mapping, device, resumed)
        check_saving(policy, config.policy, env.simulator_spec)
        ppo = build_ppo(config, policy, env.spec)
        trainer = Trainer(policy, map_names(env, mapping), ppo, **loop_arguments(config))
        if resumed is not None:
            trainer.restore(resumed)
        on_failure.pop_all()
    return trainer


def build_eval_env(config: Config, trainer: Trainer) -> VecEnv | None:
    """Build the evaluation's own environments; None for a run without evaluations."""
    if not config.trainer.eval_interval:
        return None
    origin = trainer.env.origin
    assert origin is not None  # `build_trainer` built them
    settled = config.model_copy(update={"env": origin.config})
    env = build_env(settled, "evaluation", min(config.env.num_envs, config.trainer.eval_episodes))
    return MappedVecEnv(env, trainer.env.mapping) if isinstance(trainer.env, MappedVecEnv) else env
