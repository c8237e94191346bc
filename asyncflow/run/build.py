"""Building a run: from a configuration, and a checkpoint where one goes on, to the parts that `Trainer` runs.

Owns which classes a configuration means and in which order they are built. Only this module tells the two buffer
types apart. It must not know the order of the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from asyncflow.config.lerobot_folder import KIND as LEROBOT
from asyncflow.config.lerobot_folder import match_cameras, open_lerobot, with_export
from asyncflow.config.sections import Config, PolicyConfig
from asyncflow.config.tasks import check_cameras, is_described, resolve_task
from asyncflow.device import check_compile, resolve_device
from asyncflow.envs import make_vec_env
from asyncflow.envs.base import EnvSpec, VecEnv
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.envs.mapping import NameMapping, check_names, map_names
from asyncflow.envs.source import adopt_environment, restore_environment, tell_change, tell_edit
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.metrics.timing import OverlapClock
from asyncflow.policies import find_policy_code, make_policy
from asyncflow.policies.base import Policy, is_scaled, scale_actions
from asyncflow.policies.policy_file import (
    FILE_NAME,
    PolicyFile,
    check_saving,
    check_tensors,
    load_into,
    load_policy_file,
    read_env_spec,
    resolve_checkpoint,
)
from asyncflow.policies.vla.foreign import without_weights
from asyncflow.ppo.advantages import make_estimator
from asyncflow.ppo.ppo import PPO
from asyncflow.ppo.promises import check_promises
from asyncflow.resources import check_memory
from asyncflow.rollout.channel import Channel
from asyncflow.rollout.collector import Collector, InlineCollector, ThreadedCollector
from asyncflow.rollout.latency import EmulatedLatency
from asyncflow.rollout.plan import plan_ring
from asyncflow.rollout.ring import RolloutRing
from asyncflow.rollout.weights import WeightPublisher, changing_tensors
from asyncflow.rollout.writer import CollectorSettings, RolloutWriter
from asyncflow.run.checkpoint import Checkpoint
from asyncflow.run.folder import name_run_folder
from asyncflow.run.footprint import check_environments, check_rollouts
from asyncflow.run.progress import Progress
from asyncflow.run.state import read_snapshots
from asyncflow.seeding import derive_seed

NUM_OPTIMIZER_COPIES = 5  # Adam's two moments, and what an abandoned update is put back from
NUM_ROLLOUT_COPIES = 2  # what an update trains on, and an epoch's order of it


@dataclass(frozen=True)
class Parts:
    """What a run is made of; `build_parts` makes it.

    Attributes:
        env: The collector's simulators.
        eval_env: The evaluation's own; None without evaluations.
        policy: What is trained.
        channel: What collector and trainer share.
        collector: Where rollouts come from.
        ppo: What trains on them.
        progress: How far the run is; the trainer moves it on.
    """

    env: VecEnv
    eval_env: VecEnv | None
    policy: Policy
    channel: Channel
    collector: Collector
    ppo: PPO
    progress: Progress

    def interrupt(self) -> None:
        """End every wait for simulators and for rollouts. Any thread or a signal handler; never waits."""
        self.channel.buffer.close()
        self.channel.publisher.close()
        self.collector.interrupt()
        if self.eval_env is not None:
            self.eval_env.interrupt()

    def close(self) -> None:
        """Stop the collector, then the simulators. Main thread; waits for the decision under way."""
        with ExitStack() as stack:
            stack.callback(self.env.close)
            if self.eval_env is not None:
                stack.callback(self.eval_env.close)
            stack.callback(self.collector.close)


def check_start(config: Config) -> Path:
    """Find a user's mistakes before simulators are built, which takes seconds; return the run folder to create.

    Raises:
        ConfigError: The device, the task, its observations, the checkpoint or the policy cannot be had, the
            names in `policy.mapping` do not exist, or the folder already holds a run.
    """
    check_compile(config.policy.compile, resolve_device(config.trainer.device))
    make_estimator(config.algorithm)
    folder = name_run_folder(config)
    start = _read_start(config)
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
        match_cameras(open_lerobot(config), config, seen.obs_shapes, seen.action_dim, seen.image_shapes)


def _foresee_spec(config: Config, start: PolicyFile | None) -> EnvSpec:
    """Return what the environments will be like, as far as the configuration and the checkpoint say."""
    spec = EnvSpec({"state": (1,)}, action_dim=1, horizon=1) if start is None else start.env_spec
    if not is_described(config.env):
        return spec
    settings = resolve_task(config.env)
    one_step = replace(
        spec,
        obs_shapes={"state": spec.obs_shapes["state"][-1:], **settings.point_obs_shapes},
        obs_keys=settings.obs_keys,
        image_shapes=settings.image_shapes,
        point_settings=settings.point_settings,
    )
    if config.env.env_meta is None:
        sizes = settings.task.obs_sizes()
        widths = tuple(sizes[key] for key in settings.obs_keys)
        shapes = one_step.obs_shapes | {"state": (sum(widths),)}
        one_step = replace(
            one_step,
            obs_shapes=shapes,
            obs_widths=widths,
            action_dim=settings.task.action_dim,
            action_low=(),
            action_high=(),
        )
    return one_step.with_history(config.env.n_obs_steps)


def build_parts(
    config: Config, on_plan: Callable[[int], None] = lambda num_bytes: None, resumed: Checkpoint | None = None
) -> Parts:
    """Build everything that trains and evaluates.

    Args:
        config: The run.
        on_plan: Told the ring's bytes before it is allocated.
        resumed: Where the run goes on.

    Raises:
        CheckpointError: The checkpoint lacks weights that the next rollouts act with, or does not fit the policy.
        ConfigError: The device, the task or the checkpoint does not exist or does not fit, or memory does not suffice.
        EnvError: A simulator could not be built.
    """
    device = resolve_device(config.trainer.device)
    check_compile(config.policy.compile, device)
    torch.set_num_threads(config.trainer.num_threads)
    config = settle_environment(config, resumed)
    with ExitStack() as on_failure:
        env = _build_env(config, "train", config.env.num_envs)
        on_failure.callback(env.close)
        mapping = NameMapping(config.policy.mapping, env.spec)
        env, eval_env = map_names(env, mapping), None
        if config.trainer.eval_interval:
            eval_env = _build_env(config, "evaluation", min(config.env.num_envs, config.trainer.eval_episodes))
            on_failure.callback(eval_env.close)
            eval_env = map_names(eval_env, mapping)
        policy = build_policy(config, mapping, device, resumed)
        check_saving(policy, config.policy, env.simulator_spec)
        if config.policy.is_from_elsewhere:
            check_promises(policy, config.policy.n_action_steps, env.spec)
        channel = _build_channel(config, policy, env.spec, on_plan)
        trainer = config.trainer
        ppo = PPO(policy, config.algorithm, seed=trainer.seed, total_updates=trainer.total_updates)
        progress = Progress()
        if resumed is not None:
            progress = Progress.from_state(resumed.state, resumed.journal)
            _check_journal(progress.journal, config, env.simulator_spec, resumed.path)
            _restore(config, resumed, channel, ppo)
        collector = _build_collector(config, env, policy, channel, progress)
        on_failure.pop_all()
    return Parts(env, eval_env, policy, channel, collector, ppo, progress)


def settle_environment(config: Config, resumed: Checkpoint | None = None) -> Config:
    """Return the configuration with the environment that the run simulates; see `env_source`."""
    if resumed is not None:
        env = restore_environment(config.env, read_env_spec(resumed.path / FILE_NAME))
    else:
        start = _read_start(config)
        env = config.env if start is None else adopt_environment(config.env, start.env_spec)
    return config.model_copy(update={"env": env})


def tell_environment(config: Config, resumed: Checkpoint | None = None) -> str | None:
    """Return a line for the user if `env.env_meta` and a policy file describe different environments."""
    if resumed is not None:
        return tell_edit(config.env, read_env_spec(resumed.path / FILE_NAME))
    start = _read_start(config)
    return None if start is None else tell_change(config.env, start.env_spec)


def _build_env(config: Config, purpose: str, num_envs: int) -> VecEnv:
    seed = derive_seed(config.trainer.seed, purpose)
    return make_vec_env(config.env, config.policy.n_action_steps, num_envs, seed)


def build_policy(
    config: Config, mapping: NameMapping, device: torch.device, resumed: Checkpoint | None = None
) -> Policy:
    """Return the policy that training starts from or goes on with, on `device`.

    Args:
        config: The run.
        mapping: `policy.mapping` for the environments that the policy is to act in.
        device: Where the policy is to be.
        resumed: Where the run goes on.

    Raises:
        ConfigError: The policy's keys do not fit together.
        CheckpointError: `policy.checkpoint` does not exist or does not fit.
    """
    policy_config = without_weights(with_export(config.policy, resumed.path)) if resumed else config.policy
    seen = mapping.spec
    file = None if resumed else _read_start(config)
    stored = resumed.policy if resumed else file.tensors if file else None
    num_stored = None if stored is None else sum(tensor.numel() for tensor in stored.values())
    policy = make_policy(
        policy_config,
        seen.obs_shapes,
        seen.action_dim,
        config.trainer.seed,
        seen.image_shapes,
        num_stored=num_stored,
    )
    if resumed is not None:
        check_tensors(policy.state_dict(), resumed.policy, str(resumed.path))
        policy.load_state_dict(resumed.policy)
    elif file is not None:
        _check_origin(config.policy, file, mapping)
        load_into(policy, file)
    else:
        _scale_untrained(policy, seen, config.policy)
    policy.anneal(resumed.state.updates if resumed else 0)
    return policy.to(device)


def _scale_untrained(policy: Policy, seen: EnvSpec, config: PolicyConfig) -> None:
    """Scale the actions of a policy that no file scales; `seen` is in the model's names."""
    scale_actions(policy, seen.action_limits)
    is_unlimited = not all(bool(limit.isfinite().all()) for limit in seen.action_limits)
    if is_unlimited and "policy.mapping.action" not in config.mapping.parts and is_scaled(policy):
        raise ConfigError(
            f"policy.checkpoint = {config.checkpoint}: the environment's controller takes absolute targets, whose "
            "range only demonstrations tell; give a policy that `asyncflow pretrain` made of them"
        )


def _read_start(config: Config) -> PolicyFile | None:
    """Return the file whose weights a run starts from; None from scratch, or where LeRobot's folder gives them."""
    name = config.policy.checkpoint
    return load_policy_file(resolve_checkpoint(name)) if name and config.policy.kind != LEROBOT else None


def _check_origin(config: PolicyConfig, file: PolicyFile, mapping: NameMapping) -> None:
    """Refuse a policy that was made for other observations or actions: a network takes any of the right size."""
    name = f"policy.checkpoint = {config.checkpoint}"
    for key, value in file.mapping.parts.items():
        if key not in config.mapping.parts:
            raise CheckpointError(f"{name}: made with {key} = {value}, which the run leaves out")
    obs_keys = mapping.source.obs_keys
    if config.mapping.obs.state is None and file.env_spec.obs_keys != obs_keys:
        raise CheckpointError(
            f"{name}: made for env.obs_keys = {list(file.env_spec.obs_keys)}, the run has {list(obs_keys)}"
        )
    what = "images" if config.mapping.obs.images is not None else "env.cameras"
    seen, shown = (_describe_cameras(each.spec, what) for each in (file.mapping, mapping))
    if seen != shown:
        raise CheckpointError(f"{name}: made for {seen}; the run has {shown}")


def _describe_cameras(spec: EnvSpec, what: str) -> str:
    keys: dict[str, Any] = {what: list(spec.image_shapes)}
    for shape in spec.image_shapes.values():
        keys["env.camera_size"] = list(shape[-2:])
    keys["env.n_obs_steps"] = spec.n_obs_steps
    if spec.point_shapes:
        keys["env.point_clouds"] = list(spec.point_shapes)
        keys |= {f"env.{key}": value for key, value in sorted(spec.point_settings.items())}
    return ", ".join(f"{key} = {value}" for key, value in keys.items())


def _build_channel(config: Config, policy: Policy, spec: EnvSpec, on_plan: Callable[[int], None]) -> Channel:
    """Plan the ring, check that it fits, and allocate it and the snapshots of the weights."""
    num_slots = config.max_policy_lag + 1 if config.trainer.buffer_type == "vla" else 1
    plan = plan_ring(policy, spec, config.env.num_envs, config.num_steps, num_slots)
    device = next(policy.parameters()).device
    snapshots = (config.max_policy_lag + 1) * sum(t.nbytes for t in changing_tensors(policy).values())
    trained = NUM_OPTIMIZER_COPIES * sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    rollouts = plan.num_bytes + NUM_ROLLOUT_COPIES * plan.slot_bytes
    check_memory(rollouts + snapshots + trained, device, "buffer.buffer_size or buffer.max_policy_lag")
    on_plan(plan.num_bytes)  # after the check: a run that does not fit leaves no folder
    buffer = RolloutRing(plan, device, config.buffer.on_full == "overwrite")
    return Channel(buffer, WeightPublisher(policy, config.max_policy_lag), OverlapClock())


def _restore(config: Config, resumed: Checkpoint, channel: Channel, ppo: PPO) -> None:
    channel.buffer.restore(resumed.state.next_rollout, asdict(resumed.state.books))
    snapshots, own = read_snapshots(resumed.groups), changing_tensors(ppo.policy)
    for version, tensors in snapshots.items():
        check_tensors(own, tensors, f"{resumed.path}: version {version} of the weights")
    channel.publisher.restore(snapshots)
    updates, lag = resumed.state.updates, _fixed_lag(config) or 0
    missing = set(range(max(0, updates - lag), updates + 1)) - channel.publisher.snapshots().keys()
    if missing:  # the collector would wait for them for ever
        versions = ", ".join(str(version) for version in sorted(missing))
        raise CheckpointError(f"{resumed.path}: lacks the weights of version {versions}, with which the run goes on")
    ppo.load_state_tensors(resumed.groups.get("optimizer", {}))
    ppo.num_nonfinite_steps = resumed.state.num_nonfinite_steps


def _check_journal(journal: EpisodeJournal | None, config: Config, spec: EnvSpec, path: Path) -> None:
    """Refuse to replay episodes of other environments or of other chunks than the run's."""
    if journal is None:
        return
    expected = (config.policy.n_action_steps, spec.action_dim)
    shapes = {tuple(chunk.shape) for chunks in journal.chunks for chunk in chunks}
    if len(journal.episodes) != config.env.num_envs or shapes - {expected}:
        raise CheckpointError(
            f"{path}: its journal is of {len(journal.episodes)} environments and chunks of {sorted(shapes)}; the run "
            f"has {config.env.num_envs} and {expected} (policy.n_action_steps, action size)"
        )


def _fixed_lag(config: Config) -> int | None:
    """Return L where every rollout has a version of its own to act with; None where that is the newest."""
    return config.max_policy_lag if config.buffer.lag_mode == "fixed" else None


def _build_collector(config: Config, env: VecEnv, policy: Policy, channel: Channel, progress: Progress) -> Collector:
    settings = CollectorSettings(
        seed=config.trainer.seed,
        gamma=config.algorithm.gamma,
        is_success_continued=config.algorithm.success_value == "continue",
        num_env_groups=config.collector.num_env_groups,
        max_policy_lag=_fixed_lag(config),
        inference_latency=EmulatedLatency.from_config(config.trainer, "inference", config.policy.emulated_latency_s),
        env_latency=EmulatedLatency.from_config(config.trainer, "env", config.env.emulated_latency_s),
        compile=config.policy.compile,
    )
    writer = RolloutWriter(env, policy, channel, settings, progress.journal)
    if config.trainer.buffer_type == "standard":
        return InlineCollector(writer, channel)
    total = config.trainer.total_updates if config.buffer.on_full == "block" else None
    return ThreadedCollector(writer, channel, None if total is None else total - progress.updates)
