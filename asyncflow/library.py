"""The functions for programs: make environments by task, make and load policies, evaluate.

`import asyncflow as af` shows these functions beside the classes; a program needs no configuration tree. The command
line builds the same objects from its configuration (`run.build`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from asyncflow.config.contracts import check_count
from asyncflow.config.presets import load_config
from asyncflow.config.sections import Config, PolicyConfig, validate
from asyncflow.config.tasks import check_cameras
from asyncflow.devices import resolve_device
from asyncflow.envs.base import VecEnv
from asyncflow.envs.mapping import NameMapping, map_names
from asyncflow.envs.source import adopt_environment
from asyncflow.errors import ConfigError
from asyncflow.policies import make_policy as build_policy
from asyncflow.policies.base import Policy
from asyncflow.policies.policy_file import load_into, load_policy_file, resolve_checkpoint
from asyncflow.policies.vla.foreign import without_weights
from asyncflow.run.collecting import free_env
from asyncflow.run.evaluate import EvalResult
from asyncflow.run.evaluate import evaluate as run_episodes
from asyncflow.run.footprint import check_environments
from asyncflow.run.parts import build_env, read_start, scale_untrained
from asyncflow.run.recipe import check_sizes
from asyncflow.run.start import choose_preset
from asyncflow.seeding import derive_seed
from asyncflow.signals import ctrl_c_calls
from asyncflow.simulators.spec import EnvSpec


def make_env(
    task: str,
    num_envs: int = 16,
    *,
    policy: Policy | None = None,
    n_action_steps: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> VecEnv:
    """Build environments of a task, as `asyncflow train --task NAME` does; waits until every simulator is there.

    Args:
        task: A task that `asyncflow tasks` lists: `Lift`, `Toy`, or one that a package registered.
        num_envs: Environments.
        policy: The policy that is to act in them. Its chunk length and its `policy.mapping` are taken, and of one from
            a file the environment that the file describes.
        n_action_steps: Actions of a chunk; None: the policy's, or else those of the task's preset.
        seed: From it the seeds of construction are derived.
        settings: Other keys of `env`, such as `horizon=100` or `cameras=["agentview"]`; see `asyncflow config`.

    Raises:
        ConfigError: The task or a setting is not known or not allowed.
        EnvError: A simulator could not be built.
    """
    config = _configure(task, num_envs, settings)
    made_for = policy.made_for if policy is not None else None
    if made_for is None and policy is None:
        start = read_start(config)
        made_for = None if start is None else start.env_spec
    env_config = config.env if made_for is None else adopt_environment(config.env, made_for)
    check_cameras(env_config)
    if made_for is not None:
        check_environments(num_envs, made_for, is_simulated=bool(made_for.env_meta))
    if n_action_steps is None:
        n_action_steps = config.policy.n_action_steps if policy is None else policy.n_action_steps
    num_actions = check_count("make_env", "n_action_steps", n_action_steps)
    chunks = config.policy.model_copy(update={"n_action_steps": num_actions})
    seeded = config.trainer.model_copy(update={"seed": seed})
    settled = config.model_copy(update={"env": env_config, "policy": chunks, "trainer": seeded})
    env = build_env(settled, "train", num_envs)
    if policy is None or policy.made_from is None:
        return env
    return map_names(env, NameMapping(policy.made_from.mapping, env.spec))


def _configure(task: str, num_envs: int, settings: dict[str, Any]) -> Config:
    """Return the configuration of a task's preset with other keys of `env`."""
    values = {"env.task": task, "env.num_envs": num_envs, **{f"env.{key}": value for key, value in settings.items()}}
    preset = choose_preset(values | {"policy.checkpoint": None})
    alone = {"buffer.buffer_size": num_envs, "algorithm.num_minibatches": 1}  # of which any number is a multiple
    return load_config(preset, values | alone)


def make_policy(
    kind: str, env: VecEnv | EnvSpec, *, seed: int = 0, device: str | torch.device = "cpu", **settings: Any
) -> Policy:
    """Build an untrained policy for environments.

    Args:
        kind: `gaussian`, `flow`, `vla`, or one that a package registered.
        env: The environments, or their `spec`. Of environments the length of a chunk is taken, too; a spec does not
            have it, and neither do some environments: `n_action_steps` is 4 then, unless it is given.
        seed: Of the first weights.
        device: Where the policy is to be.
        settings: Other keys of `policy`, such as `hidden_sizes=[64, 64]`; see `asyncflow config`.

    Raises:
        ConfigError: A setting is not known, not allowed, or does not fit the environments.
    """
    if not isinstance(env, VecEnv | EnvSpec):
        raise ConfigError(
            f"make_policy({kind!r}, {env!r}): expected environments, such as make_env(...), or their spec"
        )
    spec = env.spec if isinstance(env, VecEnv) else env
    if isinstance(env, VecEnv) and env.n_action_steps is not None:
        settings = {"n_action_steps": env.n_action_steps, **settings}
    settings = {"horizon": settings.get("n_action_steps", PolicyConfig().horizon), **settings}
    config = validate({"policy": {"kind": kind, **settings}}).policy
    policy = build_policy(config, spec, seed)
    scale_untrained(policy, spec, config)
    return _finish(policy, config, device)


def load_policy(name: str | Path, *, device: str | torch.device = "cpu", **settings: Any) -> Policy:
    """Load a policy with its weights.

    Args:
        name: Shipped weights such as `lift_flow`, a policy file, a checkpoint, a run folder, or what `Trainer.save`
            wrote.
        device: Where the policy is to be.
        settings: Keys of `policy` that replace those of the file, such as `noise_method="flow_sde"`.

    Raises:
        CheckpointError: Nothing of that name exists, it is damaged, or its class is a user's own.
        ConfigError: A setting is not known or not allowed.
    """
    file = load_policy_file(resolve_checkpoint(str(name)))
    config = validate({"policy": file.policy_config.model_dump(by_alias=True) | settings}).policy
    num_stored = sum(tensor.numel() for tensor in file.tensors.values())
    kept = without_weights(config)
    policy = build_policy(kept, file.mapping.spec, 0, num_stored=num_stored)
    load_into(policy, file)
    policy.made_for = file.env_spec
    return _finish(policy, config, device)


def _finish(policy: Policy, config: PolicyConfig, device: str | torch.device) -> Policy:
    policy.made_from = config
    policy.anneal(0)
    return policy.to(resolve_device(str(device)))


def evaluate(  # noqa: PLR0913  keyword arguments with defaults
    policy: Policy,
    env: VecEnv | str,
    num_episodes: int = 200,
    *,
    seed: int = 0,
    num_envs: int = 16,
    on_progress: Callable[[int], None] = lambda num_finished: None,
) -> EvalResult:
    """Measure how often a policy succeeds, with a 95 % interval, as `asyncflow eval` does.

    The policy decides without exploring. Environments that a trainer uses may be given: it goes on afterwards as if
    that had not been.
    With `algorithm.ema_decay`, evaluate within `with ppo.averaged_weights():`, or the weights that train decide.

    Args:
        policy: What decides; it is left as it is.
        env: Environments, or a task, whose environments are built for this evaluation.
        num_episodes: Episodes, exactly.
        seed: Of start states and noise.
        num_envs: Environments that are built for a task.
        on_progress: Called before every decision with the number of finished episodes.

    Raises:
        ConfigError: Policy and environments do not fit together.
        EnvError: Simulators failed too often, or far more episodes broke than are asked for.
    """
    num_episodes = check_count("evaluate", "num_episodes", num_episodes)
    seed = derive_seed(seed, "report")
    if isinstance(env, VecEnv):
        free_env(env)
        return _evaluate(policy, env, num_episodes, seed, on_progress)
    built = make_env(env, min(num_envs, num_episodes), policy=policy, seed=seed)
    try:
        return _evaluate(policy, built, num_episodes, seed, on_progress)
    finally:
        built.close()


def _evaluate(
    policy: Policy, env: VecEnv, num_episodes: int, seed: int, on_progress: Callable[[int], None]
) -> EvalResult:
    """Evaluate; Ctrl-C ends it between two decisions, when no chunk is under way."""
    check_sizes(policy, env)

    def check(num_finished: int) -> None:
        if was_interrupted():
            raise KeyboardInterrupt
        on_progress(num_finished)

    with ctrl_c_calls(lambda: None) as was_interrupted:
        return run_episodes(policy, env, num_episodes, seed, check)
